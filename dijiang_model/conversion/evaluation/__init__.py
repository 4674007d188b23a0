"""Measures what a conversion lost and what its state remembers: reports with tables and plots."""
