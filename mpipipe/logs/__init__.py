"""Answers questions about a run from the files in its folder: no MPI, no torch."""
