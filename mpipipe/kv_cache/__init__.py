"""What is remembered of earlier tokens: page accounting and cache tensors."""
