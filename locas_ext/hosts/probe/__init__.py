"""One short forward at attach shows whether a host computes what the memory takes for granted."""
