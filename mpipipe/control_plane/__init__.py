"""Messages between ranks: msgpack over MPI, or within one process."""
