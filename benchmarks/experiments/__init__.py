"""Measurements of single questions; the log has their answers."""
