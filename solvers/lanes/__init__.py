"""Batches of solves as lanes of one program."""
