"""`locas recall`: what can be asked of a text that is no longer in the window."""
