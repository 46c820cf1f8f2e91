"""Eight standard tasks answered offline, by log-probability."""
