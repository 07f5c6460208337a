"""Compares runs: strong and weak scaling, batch sizes, each case its own launch."""
