"""A memory's numbers: arenas, what they share, and the place in a text. No forward, no kernels."""
