"""Compiled programs, and what runs them: a batch of sequences, layer by layer, sampling."""
