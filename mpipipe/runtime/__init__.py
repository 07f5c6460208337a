"""Boot, session, shutdown: the only place that wires the parts."""
