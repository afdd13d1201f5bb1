"""Reversible solvers: every step can be undone."""
