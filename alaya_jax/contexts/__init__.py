"""Stored contexts in memory: which ones there are, and which have their pages in the pool."""
