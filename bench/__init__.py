"""Measurements: each script states in its first lines what it compares."""
