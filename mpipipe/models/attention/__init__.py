"""Attention backends, one per file, and the choice between them."""
