"""Experiments around a run: they change nothing of it."""
