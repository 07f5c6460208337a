"""What happened: structured logs, time accounting, summaries."""
