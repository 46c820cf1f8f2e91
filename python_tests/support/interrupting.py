"""Runs that are stopped after some chunks."""


class Stop(Exception):
    pass


def stop_after(chunks, error=Stop):
    """A callback that raises once `chunks` chunks are done."""
    seen = []

    def callback(chunk):
        seen.append(chunk)
        if len(seen) == chunks:
            raise error

    return callback


def ctrl_c_at(monkeypatch, module, name, call):
    """A module's function that stands for Ctrl-C at its `call`-th call. -> the arguments of all calls"""
    calls, works = [], getattr(module, name)

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return works(*arguments)

    monkeypatch.setattr(module, name, counted)
    return calls
