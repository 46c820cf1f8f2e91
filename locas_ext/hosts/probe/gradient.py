"""Whether a gradient comes back through a host's forward: what its embedding gives stands in for what a memory adds."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Embedded:
    """What a host's embedding gave in forwards with gradient, latest last; their graphs begin there."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        self.calls.append(output.detach().requires_grad_())
        return self.calls[-1].clone()  # hosts that change it in place change the copy

    def pull(self, logits: Tensor) -> None:
        """Goes back from logits to the latest call, as learning does; raises whatever a host's backward raises.

        RuntimeError also where torch only warns that an operation has no backward, and takes its gradient for zero.
        """
        if not (self.calls and logits.requires_grad):
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*an autograd kernel was not registered")
            try:
                torch.autograd.grad(logits.float().sum(), self.calls[-1], allow_unused=True)
            except UserWarning as warning:
                raise RuntimeError(str(warning).partition(". ")[0]) from None


@contextmanager
def embedded(model: Any, wanted: bool = True) -> Iterator[Embedded]:
    """Inside, gradients are on, and every forward's graph begins at what the embedding gives; unless not wanted.

    Off for weights made in inference mode, which torch lets into no graph: such a host can be attached to and not learn.
    """
    found = Embedded()
    if not wanted or any(parameter.is_inference() for parameter in model.parameters()):
        yield found
        return
    handle = model.get_input_embeddings().register_forward_hook(found.hook)
    try:
        with torch.enable_grad():
            yield found
    finally:
        handle.remove()
