"""Cases for the conformance runner (plugins/native/conformance), with what must come out by the oracle.

``python -m tests.plugins.conformance`` makes and judges them, see ``__main__.py``.
"""
