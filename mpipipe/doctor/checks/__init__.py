"""Judging what was read: pure functions from facts to findings."""
