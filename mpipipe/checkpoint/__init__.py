"""What is on disk: `config.json` and weight headers, without torch."""
