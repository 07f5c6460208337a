"""What was asked for: the configuration tree and the prompt file."""
