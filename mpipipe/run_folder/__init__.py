"""The files of a run; neither MPI nor torch."""
