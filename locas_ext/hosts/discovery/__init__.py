"""Where a host's FFNs are, found by structure and numbers: no name, no config key and no weight is read."""
