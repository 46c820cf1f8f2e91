class LocasError(ValueError):
    """A memory file, a memory folder or a run that cannot be used, with what was wrong and what to do.

    >>> import tempfile
    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> memory.slots.fill_(float("nan")).isfinite().any().item()
    False
    >>> try:
    ...     memory.save_pretrained(tempfile.gettempdir() + "/never-made")
    ... except locas.LocasError as error:
    ...     print(str(error).partition(":")[0])
    cannot save the memory
    """


class Interrupted(Exception):
    """Ctrl-C ended a command; the message says what was kept."""
