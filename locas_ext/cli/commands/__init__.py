"""One file per command: its arguments and their help."""
