"""What the layers compute: transformers' modules with our attention and cache."""
