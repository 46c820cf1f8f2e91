"""One forward of a model, recorded: what went into each module and what came out, in the order in which they ran."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from locas_ext.hosts.cache_names import cache_argument
from locas_ext.signals import uninterrupted


class Call(NamedTuple):
    """One call of a module. Tensors are copies: what the model changes in place later does not show."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> Tensor:
        """The first tensor among the arguments."""
        return next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))

    @property
    def result(self) -> Tensor:
        """The output, or the first of several."""
        return self.output if isinstance(self.output, Tensor) else next(v for v in self.output if isinstance(v, Tensor))


class Recording:
    """The calls of one forward, in the order in which they began, and what it gave: a model's logits [batch, n, V]."""

    def __init__(self, calls: list[Call], result: Any):
        self.calls, self.result = calls, result
        self._of: dict[nn.Module, list[Call]] = {}
        self._order: dict[int, int] = {}
        for place, call in enumerate(calls):
            self._of.setdefault(call.module, []).append(call)
            self._order[id(call)] = place

    def of(self, module: nn.Module) -> list[Call]:
        """The calls of one module; empty if it did not run."""
        return self._of.get(module, [])

    def order(self, call: Call) -> int:
        """The place of one of the calls among all."""
        return self._order[id(call)]


def _copied(value: Any) -> Any:
    """The tensors in an argument or output, copied; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return value


@torch.no_grad()
def recorded_run(modules: Iterable[nn.Module], run: Callable[[], Any]) -> Recording:
    """Calls `run` with the calls of these modules recorded.

    The recording keeps no reference to what the modules themselves hold, and no hook stays on them.
    """
    begun: list[Call | None] = []
    open_calls: list[tuple[int, tuple, dict]] = []

    def enter(module, args, kwargs):
        open_calls.append((len(begun), _copied(args), {name: _copied(value) for name, value in kwargs.items()}))
        begun.append(None)

    def leave(module, args, kwargs, output):
        place, args, kwargs = open_calls.pop()
        begun[place] = Call(module, args, kwargs, _copied(output))

    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        result = run()
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()
    return Recording([call for call in begun if call is not None], result)


def record(model: Any, ids: Tensor, modules: Iterable[nn.Module] | None = None, cache: DynamicCache | None = None) -> Recording:
    """Runs ids [batch, n] through a causal language model.

    modules: whose calls are recorded; None: those of every module in the model
    cache: an empty one, which then holds the text's keys and values; None: without a KV cache
    """
    inputs = {"input_ids": ids, **cache_argument(model, cache), "use_cache": cache is not None}
    watched = model.modules() if modules is None else modules
    return recorded_run(watched, lambda: model(**inputs, return_dict=True).logits)
