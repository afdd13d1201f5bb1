"""Exact discrete adjoints: one solve, forwards and backwards."""
