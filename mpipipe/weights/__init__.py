"""How tensors get from disk into memory."""
