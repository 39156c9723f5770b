"""Benches: each prints a table, and writes the same numbers as JSON where asked."""
