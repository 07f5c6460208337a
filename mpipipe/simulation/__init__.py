"""The real scheduler against scripted stage and link times: no GPU, no torch, no MPI, no clock."""
