"""torch's global settings, for the time of a block."""

import contextlib

import torch


@contextlib.contextmanager
def setting(put, value, before):
    """Inside, a setting is `value`; put: sets it."""
    put(value)
    try:
        yield
    finally:
        put(before)


DEFAULTS = {
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "device meta": lambda: setting(torch.set_default_device, "meta", None),
}
