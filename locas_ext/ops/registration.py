"""How an operator is registered with torch.library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("locas", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Registers locas::NAME for a schema "NAME(...) -> ...".

    fake: gives outputs of the right shape and dtype for tensors without data. backward, setup: the autograd formula;
    without one, an operator that returns something refuses a gradient.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=torch.Tag.needs_exact_strides)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"locas::{name}", fake, lib=_library)
    if "!" in schema:
        return  # works in place on tensors without a gradient

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"locas::{name} has no gradient; trace with gradients enabled to record an operator that has one")

    torch.library.register_autograd(f"locas::{name}", backward or refuse, setup_context=setup, lib=_library)
