"""The probe: one recorded forward over a few tokens, and two over a window of them, compared with what a memory needs.

- Each FFN computes its formula; one that does not takes its memory beside its own forward.
- No token sees a later one; a host in which one does is refused.
- A chunk behind a cache of its context computes what one forward computes; otherwise windows are read in one forward.
- The attention that runs last, whatever its number: a context's forward ends there.
"""

import os
import time
import warnings
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.hosts.context_cache import two_forwards
from locas_ext.hosts.lengths import lengths_of
from locas_ext.hosts.registry import Host
from locas_ext.hosts.window_reading import Verdict, Way, cheapest

from .agreement import rounds_whole_texts
from .causality import leak
from .formula import DidNotRun, difference
from .recording import Recording, record
from .undisturbed import undisturbed

# Of the probe's tokens the first so many are the context, and the others differ between its two texts.
_CONTEXT, _CHUNK = 4, 2


class _Refused(ValueError):
    """What no memory can learn a text with."""


@dataclass(frozen=True)
class ProbeReport:
    """What the probe cost, and why it did not run, or None."""

    seconds: float
    skipped: str | None = None


def _texts(host: Host) -> Tensor:
    """Two texts [2, n] that differ in the last tokens only, of tokens that stand for nothing special."""
    config, device = host.config, host.input_device()
    special = {value for name, value in vars(config).items() if name.endswith(("token_id", "token_index"))}
    rows = min(host.vocab_size, host.model.get_input_embeddings().weight.shape[0])
    plain = [token for token in range(min(rows, 256)) if token not in special] or [0]
    n = _CONTEXT + _CHUNK
    tokens = [plain[(7 * i + 3) % len(plain)] for i in range(n + _CHUNK)]
    return torch.tensor([tokens[:n], tokens[:_CONTEXT] + tokens[n:]], dtype=torch.int64, device=device)


def _cache_index(module: Any) -> int | None:
    """An attention's number in a KV cache; None for other modules."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


def _last_layer(recording: Recording) -> int | None:
    """The number in the cache of the attention that began last, if none with that number ran before."""
    indices = [index for call in recording.calls if (index := _cache_index(call.module)) is not None]
    order = [index for index, _ in groupby(indices)]  # a layer and its attention may both have the number
    return order[-1] if order and order[-1] not in order[:-1] else None


def _watched(host: Host) -> list[nn.Module]:
    """The modules to record: the FFNs with all inside them, and whatever has a number in the cache."""
    found = {module: None for ffn in host.ffns.values() for module in (*ffn.module.modules(), *ffn.projections())}
    found |= {module: None for module in host.model.modules() if _cache_index(module) is not None}
    return list(found)


def _check(host: Host, texts: Tensor) -> None:
    model, reading = host.model, host.reading
    recording = record(model, texts, _watched(host))
    if not recording.logits.isfinite().all():
        raise ArithmeticError("its logits are not finite")
    if (moved := leak(model, texts, recording.logits, _CONTEXT)) is not None:
        raise _Refused(
            f"{type(model).__name__} is not causal as it is: other last tokens of a text move the logits of earlier ones by "
            f"{moved:.2g} of their spread, so a chunk would be scored with its own tokens in sight; expected a model whose "
            "tokens see only those before them"
        )
    for layer, ffn in host.ffns.items():
        try:
            ffn.differs = difference(ffn, recording)
        except DidNotRun as error:
            raise _Refused(f"the FFN of layer {layer} of {type(model).__name__} {error}") from None
    reading.last_layer = _last_layer(recording)
    context, inputs = texts[0].split([_CONTEXT, _CHUNK])

    def read(way: Way) -> Tensor:
        return two_forwards(model, context, inputs, reading.last_layer if way == Way.SHORT else None)

    if reading.lengths.divides(_CONTEXT, len(texts[0])) is not None:
        return
    expected = recording.logits[0, _CONTEXT:]
    reading.verdicts[0] = cheapest(Verdict(), read, expected, inputs, rounds_whole_texts(model))


def probe(host: Host) -> ProbeReport:
    """Looks at a host before a memory is bound to it, and leaves it as it was; LOCAS_PROBE=0 turns it off.

    What it finds is noted in `host.reading` and in each FFN. Raises ValueError for a host that no memory can learn a text
    with: one that is not causal, or whose FFNs do not take part in its forward.
    """
    began = time.perf_counter()
    host.reading.lengths = lengths_of(host.model.config)
    off = os.environ.get("LOCAS_PROBE", "1") == "0"
    skipped = "LOCAS_PROBE is 0" if off else None
    if not off:
        try:
            with undisturbed(host.model):
                _check(host, _texts(host))
        except _Refused as refusal:
            raise ValueError(str(refusal)) from None
        except Exception as error:  # whatever a host's forward may raise where it cannot run yet
            skipped = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{type(host.model).__name__} could not be probed, so its FFNs and its attention are taken for what its config "
                f"says: {skipped}",
                stacklevel=5,
            )
    host.reading.unprobed, host.reading.compares = skipped, not off
    return ProbeReport(time.perf_counter() - began, skipped)
