"""Where we run: launcher, ranks, cores, memory."""
