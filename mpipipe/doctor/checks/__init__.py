"""Checks of what was read: pure functions from facts to findings."""
