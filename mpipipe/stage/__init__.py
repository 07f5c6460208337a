"""How one rank runs a micro-batch (every rank)."""
