"""Reading: what the machine, the launch and the job look like."""
