class LocasError(ValueError):
    """A memory file, a memory folder or a run that cannot be used, with what was wrong and what to do."""


class DivergenceWarning(UserWarning):
    """A run's memory makes its text harder than the host alone does, with what to change."""


class Interrupted(Exception):
    """Ctrl-C ended a command; the message says what was kept."""
