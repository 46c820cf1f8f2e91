"""What holds while a run learns: the host in evaluation mode, Ctrl-C between chunks only."""

import os
import signal
import threading
from contextlib import contextmanager

import torch


@contextmanager
def quiet_host(model):
    """Evaluation mode, dropout off; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager_host(model):
    """Compiled modules of the host run as they are written: a graph neither asks a context nor shows what is inside it."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield  # the stance is the whole process's: left alone where nothing is compiled
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def interrupt_between_chunks():
    """Yields a function that raises KeyboardInterrupt if Ctrl-C was pressed since.

    Within a chunk Ctrl-C only takes note, so that memory and place in the text never part.

    Where Ctrl-C does not mean KeyboardInterrupt here (another thread, a handler of the caller's), nothing changes.
    """
    mine = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    pressed = False

    def handler(signum, frame):
        nonlocal pressed
        if not pressed:
            os.write(2, b"\nstopping after this chunk\n")  # print() may not be called from a signal handler
        pressed = True

    def check():
        if pressed:
            raise KeyboardInterrupt

    if mine:
        signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
