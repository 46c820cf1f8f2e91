"""The host's requires_grad: off while a memory is attached, and on again where it was attach that turned it off."""

import copy
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, inference_mode, nn

from locas_ext.hosts.sharding import let_go
from locas_ext.hosts.split import is_split

# Of each host tensor that attach froze, by its identity, the freezes that still hold: a fork's host is the same tensors. A
# freeze keeps its tensors alive, so no identity comes twice. Tensors with weak references could not be swapped by `.to()`.
_holders: dict[int, "WeakSet[HostFreeze]"] = {}
_registering = threading.Lock()  # models may get their memories in several threads


class HostFreeze:
    """What one memory froze of its host."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.frozen: dict[str, Tensor] = {}
        self.places: dict[str, nn.Module] = {}  # the modules that have them

    def hold(self) -> None:
        """Turns requires_grad off wherever it is on."""
        let_go(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen[name] = parameter
            elif _holders.get(id(parameter)):  # frozen by the memory of another model on the same weights
                self.frozen[name] = parameter
        self.places = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self.frozen}
        self._register()

    def _register(self) -> None:
        with _registering:
            for place in [place for place, holders in _holders.items() if not holders]:
                del _holders[place]  # of models that were dropped with their memory
            for parameter in self.frozen.values():
                _holders.setdefault(id(parameter), WeakSet()).add(self)

    @contextmanager
    def following(self) -> Iterator[None]:
        """The parameters that this block puts in the place of frozen ones count as frozen in their place."""
        before = dict(self.model.named_parameters())
        yield
        self._follow({name for name, old in self.frozen.items() if before.get(name) is old})

    def _follow(self, names: Collection[str]) -> None:
        now = dict(self.model.named_parameters())
        for name in names:
            if name in now and now[name] is not self.frozen[name]:
                _holders[id(self.frozen[name])].discard(self)
                self.frozen[name] = now[name]
        self._register()

    def _follow_resized_head(self) -> None:
        """resize_token_embeddings makes a new head, with the old one's flags; all else stays the parameter it was."""
        head = self.model.get_output_embeddings()
        parameters = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
        heads = {name: p for name, p in self.model.named_parameters() if id(p) in parameters and name in self.frozen}
        self._follow([name for name, parameter in heads.items() if parameter.shape != self.frozen[name].shape])

    def _follow_in_place(self) -> None:
        """Some put a new parameter with the old one's flags in its place: accelerate after each forward of an offloaded module,
        fully_shard, load_state_dict(assign=True), `.to()` where torch is set to overwrite."""
        now = dict(self.model.named_modules())
        names = []
        for name, old in self.frozen.items():
            path, _, own = name.rpartition(".")
            new: Any = self.places[name]._parameters.get(own)
            stands_in = new is not None and new.shape == old.shape and (type(new) is type(old) or is_split(new))
            if now.get(path) is self.places[name] and stands_in and not new.requires_grad:
                names.append(name)
        self._follow(names)

    def release(self) -> None:
        """Turns requires_grad on again where it is still as `hold` left it and no other memory needs it so.

        Where a library has since built modules of its own around the host's (PEFT's adapters), what is trainable is its
        affair, and stays.
        """
        let_go(self.model)
        self._follow_resized_head()
        self._follow_in_place()
        now = {id(parameter): name for name, parameter in self.model.named_parameters()}
        rebuilt = any(id(parameter) in now and now[id(parameter)] != name for name, parameter in self.frozen.items())
        for parameter in self.frozen.values():
            holders = _holders.get(id(parameter), WeakSet())
            holders.discard(self)
            if not holders and not rebuilt:
                with inference_mode(parameter.is_inference()):  # only there may such a tensor be asked for a gradient
                    parameter.requires_grad_(True)
        self.frozen, self.places = {}, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostFreeze":
        """For a copied model: it holds what the original held, of tensors of its own or, in a fork, of the same ones."""
        new = memo[id(self)] = object.__new__(HostFreeze)
        new.model, new.frozen, new.places = copy.deepcopy((self.model, self.frozen, self.places), memo)
        new._register()
        return new
