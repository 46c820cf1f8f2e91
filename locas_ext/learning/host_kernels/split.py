"""The modules of a host that is split among processes (tp_plan), by their local weights: products, sums, nothing else.

transformers runs them through DTensors, which sums the gradient of what goes into query, key and value three times. Here it is
summed once, and a CUDA graph holds plain collectives.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas_ext.hosts.split import is_split, local, split_obstacle, style_of
from locas_ext.ops.ranks import Ranks


class EnteredOnce:
    """What goes into several modules of one parent: it enters the local part once for all of them."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.modules = ranks, 0
        self.latest: tuple[Tensor, Tensor, int] | None = None  # the input, as it entered, the modules still to come

    def of(self, x: Tensor) -> Tensor:
        if self.latest is not None and self.latest[0] is x:
            _, entered, left = self.latest
        else:
            entered, left = self.ranks.enter(x), self.modules
        self.latest = (x, entered, left - 1) if left > 1 else None
        return entered


class SplitOutputs:
    """Stands in for a linear layer of whose outputs each process has a part."""

    dim: ClassVar[int] = 0

    def __init__(self, module: Any, entered: EnteredOnce):
        self.module, self.entered = module, entered
        entered.modules += 1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.entered.of(x), local(self.module.weight), local(self.module.bias))


class SplitHead(SplitOutputs):
    """The same where the outputs of all processes are put side by side: an LM head."""

    def __init__(self, module: Any, entered: EnteredOnce):
        super().__init__(module, entered)
        self.lengths = entered.ranks.lengths(len(local(module.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return self.entered.ranks.joined(super().forward(x), self.lengths)


class SplitInputs:
    """Stands in for a linear layer of whose inputs each process has a part."""

    dim: ClassVar[int] = 1

    def __init__(self, module: Any, entered: EnteredOnce):
        self.module, self.ranks = module, entered.ranks

    def forward(self, x: Tensor) -> Tensor:
        y = self.ranks.total(F.linear(x, local(self.module.weight)))
        return y if self.module.bias is None else y + local(self.module.bias)


class SplitEmbedding:
    """Stands in for an embedding of whose rows each process has a part. No gradient reaches it."""

    def __init__(self, module: Any, ranks: Ranks):
        self.module, self.ranks = module, ranks
        self.first = ranks.before(len(local(module.weight)))  # the first row that is here

    def forward(self, ids: Tensor) -> Tensor:
        weight = local(self.module.weight)
        places = ids - self.first
        outside = (places < 0) | (places >= len(weight))
        with torch.no_grad():
            rows = F.embedding(places.clamp(0, len(weight) - 1), weight).masked_fill_(outside[..., None], 0)
            return self.ranks.total(rows)


SplitModule = SplitOutputs | SplitInputs | SplitEmbedding


def split_modules(modules: Iterable[nn.Module], ranks: Ranks) -> list[SplitModule]:
    """What stands in for those of these modules, and of their children, that are split in a way known here."""
    found = list[SplitModule]()
    for parent in modules:
        entered = EnteredOnce(ranks)
        for child in parent.children():
            kinds = (kind for kind in (SplitOutputs, SplitInputs) if split_obstacle(child, kind.dim) is None)
            if (kind := next(kinds, None)) is not None:
                found.append(kind(child, entered))
            elif type(child) is nn.Embedding and _is_split_by_rows(child):
                found.append(SplitEmbedding(child, ranks))
    return found


def split_head(head: Any, ranks: Ranks) -> list[SplitModule]:
    """What stands in for an LM head that is split, if it is."""
    return [SplitHead(head, EnteredOnce(ranks))] if split_obstacle(head, 0, joins=True) is None else []


def _is_split_by_rows(embedding: nn.Embedding) -> bool:
    weight: Any = embedding.weight
    plain = embedding.max_norm is None and not weight.requires_grad and style_of(embedding) is not None
    return plain and is_split(weight) and all(placement.is_shard(0) for placement in weight.placements)
