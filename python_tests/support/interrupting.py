"""Runs that are stopped after some chunks."""

import torch

from support.helpers import SETTINGS, attached, repeated_text


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


def memorize_until_interrupted(folder, tell):
    """Sends the end of each chunk; at Ctrl-C saves the memory and sends its version."""
    torch.set_num_threads(1)
    memory = attached()[1]
    try:
        memory.memorize(repeated_text(16, 500), **SETTINGS, callback=lambda chunk: tell.send(chunk.end))
    except KeyboardInterrupt:
        memory.save_pretrained(folder, optimizer=True)
        tell.send(memory.version)


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
