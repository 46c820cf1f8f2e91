"""The host's requires_grad: off while a memory is attached, and on again where it was attach that turned it off."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, inference_mode, nn
from torch.utils.weak import WeakIdKeyDictionary

from locas_ext.hosts.sharding import let_go
from locas_ext.hosts.split import is_split

# The freezes that still hold each host tensor that attach froze: a fork's host is the same tensors.
_holders: Any = WeakIdKeyDictionary()


class HostFreeze:
    """What one memory froze of its host."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.frozen: dict[str, Tensor] = {}

    def hold(self) -> None:
        """Turns requires_grad off wherever it is on."""
        let_go(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen[name] = parameter
            elif _holders.get(parameter):  # frozen by the memory of another model on the same weights
                self.frozen[name] = parameter
        self._register()

    def _register(self) -> None:
        for parameter in self.frozen.values():
            _holders.setdefault(parameter, WeakSet()).add(self)

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
                _holders[self.frozen[name]].discard(self)
                self.frozen[name] = now[name]
        self._register()

    def _follow_resized_head(self) -> None:
        """resize_token_embeddings makes a new head, with the old one's flags; all else stays the parameter it was."""
        head = self.model.get_output_embeddings()
        parameters = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
        heads = {name: p for name, p in self.model.named_parameters() if id(p) in parameters and name in self.frozen}
        self._follow([name for name, parameter in heads.items() if parameter.shape != self.frozen[name].shape])

    def _follow_offloaded(self) -> None:
        """accelerate puts a new parameter in the place of an offloaded one after each forward, with the old one's flags."""
        hooked = {name for name, module in self.model.named_modules() if hasattr(module, "_hf_hook")}
        self._follow([name for name in self.frozen if name.rpartition(".")[0] in hooked])

    def _follow_sharded(self) -> None:
        """fully_shard puts a sharded parameter in the place of a whole one, with its flags."""
        now = dict(self.model.named_parameters())
        self._follow([name for name, old in self.frozen.items() if is_split(now.get(name)) and not is_split(old)])

    def release(self) -> None:
        """Turns requires_grad on again where it is still as `hold` left it and no other memory needs it so.

        Where a library has since built modules of its own around the host's (PEFT's adapters), what is trainable is its
        affair, and stays.
        """
        let_go(self.model)
        self._follow_resized_head()
        self._follow_offloaded()
        self._follow_sharded()
        now = {id(parameter): name for name, parameter in self.model.named_parameters()}
        rebuilt = any(id(parameter) in now and now[id(parameter)] != name for name, parameter in self.frozen.items())
        for parameter in self.frozen.values():
            holders = _holders.get(parameter, WeakSet())
            holders.discard(self)
            if not holders and not rebuilt:
                with inference_mode(parameter.is_inference()):  # only there may such a tensor be asked for a gradient
                    parameter.requires_grad_(True)
        self.frozen = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostFreeze":
        """For a copied model: it holds what the original held, of tensors of its own or, in a fork, of the same ones."""
        new = memo[id(self)] = object.__new__(HostFreeze)
        new.model, new.frozen = copy.deepcopy((self.model, self.frozen), memo)
        new._register()
        return new
