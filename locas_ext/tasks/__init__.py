"""What the command line does, one task a file. Tasks use a memory through its public face only."""


class Interrupted(Exception):
    """Ctrl-C ended a task; the message says what was kept."""
