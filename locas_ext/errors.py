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


class DivergenceWarning(UserWarning):
    """A run's memory makes its text harder than the host alone does, with what to change.

    `Memory.memorize` warns once per run, unless `on_divergence` is "ignore".

    >>> import warnings
    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", locas.DivergenceWarning)  # a run that diverges now ends with this exception
    ...     report = memory.memorize(list(range(3, 51)), window=16, stride=8, progress=False)
    >>> report.diverged is None
    True
    """


class Interrupted(Exception):
    """Ctrl-C ended a command; the message says what was kept."""


_NO_ROOM = ("can't allocate memory", "out of memory", "size calculation overflowed", "multiplication overflow")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for what was asked: what torch says of that is often a plain RuntimeError.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    True
    """
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM))
