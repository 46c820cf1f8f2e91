"""`locas locomo`: questions about long dialogues."""
