"""Brownian paths that can be reconstructed."""
