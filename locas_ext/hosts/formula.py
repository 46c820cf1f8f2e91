"""Whether an FFN computes its formula: looked at on the object, not concluded from a name."""

import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers.activations import ACT2FN

from locas_ext.ops.activations import INDEX

_TRANSFORMERS = os.path.dirname(transformers.__file__)
SPLITTING = "transformers.distributed.tensor_parallel"  # what splits a host among processes


def class_name(module: Any) -> str:
    """A module's class with where it is from, for messages."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def bound_forward(module: nn.Module) -> Any:
    """The forward in a module's own dict that a memory and accelerate's hooks stand around; None: it is the class's."""
    attributes = module.__dict__
    forward = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    for patch in getattr(getattr(forward, "__self__", None), "patches", ()):  # a patched FFN's
        if patch.module is module:
            forward = patch.replaced
    if getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module:
        return None  # the class's own, bound
    return forward


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """Who listens to a module's forward or backward, by the hooks' ids.

    Without transformers' own hook on a module that several processes compute alike (tp_plan): it adds up the gradients of its
    parameters, of which there are none while they are frozen.
    """
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return {}
    hooks = {
        **module._forward_hooks,
        **module._forward_pre_hooks,
        **module._backward_hooks,
        **module._backward_pre_hooks,
    }
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return hooks
    return {number: hook for number, hook in hooks.items() if not sums_gradients(hook)}


def sums_gradients(function: Any) -> bool:
    """Whether a function is the one by which transformers adds up what several processes make of a parameter's gradient."""
    name = getattr(function, "__qualname__", "")
    return getattr(function, "__module__", None) == SPLITTING and name.startswith("ReplicatedWithGradAllReduce.")


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody listens to a module's forward or backward."""
    return bool(hooks_of(module))


@functools.cache
def class_obstacle(kind: Any, forward: Any, modeling: str) -> str | None:
    """Why a module of this class may compute something else than the family's FFN, or None.

    forward: the class's present one. modeling: the name of the module that defines the decoder layer: transformers defines
    the FFN in the same file, and a subclass or a patched class has a forward from somewhere else.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    owner = next(cls for cls in kind.__mro__ if "forward" in cls.__dict__)
    if not modeling.startswith("transformers.models.") or owner.__module__ != modeling:
        return f"is a {name}, which {modeling} does not define"
    layers = [forward]
    while (inner := getattr(layers[-1], "__wrapped__", None)) is not None:  # transformers decorates some of its own
        layers.append(inner)
    files = [getattr(getattr(layer, "__code__", None), "co_filename", "") for layer in layers]
    own = layers[-1].__qualname__ == f"{owner.__qualname__}.forward" and files[-1] == sys.modules[modeling].__file__
    if not own or not all(file.startswith(_TRANSFORMERS) for file in files):
        return f"is a {name} whose forward was replaced"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """What makes one activation module of a class another than the next."""

    def comparable(value: Any) -> Any:
        return (value.func, value.args, value.keywords) if isinstance(value, functools.partial) else value

    settings = {name: comparable(value) for name, value in module.__dict__.items() if not name.startswith("_")}
    return {name: value for name, value in settings.items() if name not in ("training", "forward")}


def _plain_activations(activation: str) -> list[nn.Module]:
    index = INDEX[activation]
    torch_own = ([nn.SiLU()], [nn.GELU("tanh")], [nn.GELU()], [nn.ReLU(), nn.ReLU(inplace=True)], [], [])[index]
    return [ACT2FN[name] for name, number in INDEX.items() if number == index] + torch_own


@functools.cache
def _plain_kinds(activation: str) -> list[tuple[type[nn.Module], Any, dict[str, Any]]]:
    return [(type(act), type(act).forward, _settings(act)) for act in _plain_activations(activation)]


def is_plain_activation(act: Any, activation: str) -> bool:
    """Whether an activation module's class and settings are those of the function of this transformers name."""
    kinds = _plain_kinds(activation)
    return any(
        type(act) is kind and kind.forward is forward and _settings(act) == settings for kind, forward, settings in kinds
    )


@dataclass(frozen=True)
class Seen:
    """The objects that computed an FFN when its numbers were compared with the formula: only as long as they stay, it holds.

    forward: that of the module's class; activation: class, forward and settings of its activation module, None without one
    """

    forward: Any
    activation: tuple[Any, Any, dict[str, Any]] | None

    @classmethod
    def now(cls, module: Any, act: Any) -> "Seen":
        """Looks at a module and its activation module, or None for one without."""
        return cls(type(module).forward, None if act is None else (type(act), type(act).forward, _settings(act)))

    def obstacle(self, module: Any, act: Any) -> str | None:
        """What is no longer as it was, or None."""
        now = Seen.now(module, act)
        if now.forward is not self.forward:
            return f"the FFN is a {class_name(module)} whose forward is not the one that was probed"
        return (
            None if now.activation == self.activation else f"its activation is a {class_name(act)}, not the one that was probed"
        )
