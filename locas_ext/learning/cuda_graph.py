"""Work on a GPU captured as a CUDA graph, and what of a host stands in the way. captured.py says when a step is."""

import functools
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers import masking_utils, modeling_utils

from locas_ext.hosts.formula import hooks_of
from locas_ext.patching.attachment import Attachment

from .run_guards import surrounded


def obstacle(attachment: Attachment) -> str | None:
    """Why this memory's step cannot be captured, or None."""
    state, model = attachment.state, attachment.host.model
    if os.environ.get("LOCAS_CUDA_GRAPH", "1") == "0":
        return "LOCAS_CUDA_GRAPH is 0"
    devices = {parameter.device for parameter in model.parameters()}  # slots follow their layers at the next forward
    if len(devices) > 1 or len(state.arenas) > 1:
        return f"the host lies on several devices ({', '.join(sorted(map(str, devices)))})"
    if not _is_capturable(device := devices.pop()):
        return f"the host is on {device}"
    if attachment.backend == "reference" or model.dtype == torch.float64:
        return "the reference backend waits for the device"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if (why := surrounded(model)) is not None:
        return why
    if state.ranks is not None and (why := next(filter(None, (ffn.obstacle() for ffn in attachment.ffns)), None)) is not None:
        return f"the host is split among {state.ranks.size} processes, and its own code runs an FFN, as {why}"
    if _has_any_global_hook():
        return "all modules have hooks"
    for name, module in model.named_modules():
        if hooks_of(module).keys() - attachment.hook_ids():
            return f"{name or 'the model'} has hooks"
    return None


def _is_capturable(device: torch.device) -> bool:
    return device.type == "cuda"


# ---- what CUDA does -------------------------------------------------------------------------------------------
@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Rehearsal and capture share a stream, so that cuBLAS's workspace for it is not part of any graph's memory."""
    return torch.cuda.Stream(device)


@contextmanager
def _error_at_synchronization():
    """RuntimeError at the end if torch waited for the device inside, which a captured stream may not."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # "error" would also hit other threads
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA" in str(warning.message):
            raise RuntimeError(f"{warning.filename}:{warning.lineno} waits for the device")


@contextmanager
def _as_in_a_capture():
    """Inside, transformers does what it does while a stream is captured: it makes every attention mask and leaves out its
    warnings, instead of reading from the device whether they are needed."""
    modules = [module for module in (masking_utils, modeling_utils) if hasattr(module, "is_tracing")]
    originals = [module.is_tracing for module in modules]
    for module in modules:
        module.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.is_tracing = original


def rehearse(work: Callable[[], None], device: torch.device) -> None:
    """Runs the work once on a side stream: libraries set themselves up, and what cannot be captured is an error here.

    A failed capture would leave torch's random generator unusable; a failed rehearsal leaves nothing.
    """
    torch.cuda.empty_cache()  # what eager steps left belongs to another stream, which the side stream cannot use
    current, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side), _as_in_a_capture(), _error_at_synchronization():
            work()
    finally:
        current.wait_stream(side)


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """-> a function that does the work again, on the same tensors."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may go on using the device
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        work()
    return graph.replay
