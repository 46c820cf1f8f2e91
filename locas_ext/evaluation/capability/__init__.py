"""`locas capability`: what a memory does to everything else the host can do."""
