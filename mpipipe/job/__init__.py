"""`mpipipe run`: from a configuration to the merged file."""
