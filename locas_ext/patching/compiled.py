"""`disabled()` in a compiled graph: a graph cannot ask the context it runs in, an op can."""

import itertools
import weakref

import torch
from torch import Tensor

from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scope_of

_states: "weakref.WeakValueDictionary[int, MemoryState]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(state: MemoryState) -> int:
    """The number by which `in_use` finds a memory."""
    number = next(_numbers)
    _states[number] = state
    return number


@torch.library.custom_op("locas::in_use", mutates_args=())
def in_use(x: Tensor, number: int) -> Tensor:
    """[] of x's dtype: 1, or 0 where the memory of this number is off in the context that runs this."""
    state = _states.get(number)
    return x.new_full((), 0.0 if state is None or scope_of(state).disabled else 1.0)


@in_use.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return x.new_empty(())
