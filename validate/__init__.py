"""Takes: an engine directory, and the checkpoint for the PyTorch reference. Gives: a report with a verdict.

May import: ``plugins``, ``exporter``, ``engines``.
"""
