"""Known architectures as HF-style JSON files beside this module."""
