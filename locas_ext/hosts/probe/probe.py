"""The probe: one recorded forward over a few tokens, and two over a window of them, compared with what a memory needs.

- Each FFN computes its formula; one that does not takes its memory beside its own forward.
- No token sees a later one; a host in which one does is refused.
- A chunk behind a cache of its context computes what one forward computes, and has a backward; otherwise windows are read in
  one forward.
- How often a context's forward writes into the cache: with the last time it ends.
"""

import os
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from locas_ext.caller import caller_stacklevel
from locas_ext.hosts.context_cache import ContextCache, holds_keys_and_values_only, logits_on, one_forward
from locas_ext.hosts.lengths import lengths_of
from locas_ext.hosts.registry import Host
from locas_ext.hosts.sharding import gathered
from locas_ext.hosts.window_reading import FULL, SHORT, Verdict, Way, cheapest

from .agreement import rounds_whole_texts
from .causality import leak
from .formula import DidNotRun, difference
from .gradient import Embedded, embedded
from .recording import record
from .undisturbed import undisturbed

# The first so many of the probe's tokens are the context; the others differ between its two texts.
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


def _watched(host: Host) -> list[nn.Module]:
    """The modules to record: the FFNs with all inside them."""
    return list(dict.fromkeys(module for ffn in host.ffns.values() for module in (*ffn.module.modules(), *ffn.projections())))


def _check(host: Host, texts: Tensor) -> None:
    model, reading = host.model, host.reading
    recording = record(model, texts, _watched(host))
    if not recording.result.isfinite().all():
        raise ArithmeticError("its logits are not finite")
    if (moved := leak(model, texts, recording.result, _CONTEXT)) is not None:
        raise _Refused(
            f"{type(model).__name__} is not causal as it is: other last tokens of a text move the logits of earlier ones by "
            f"{moved:.2g} of their spread, so a chunk would be scored with its own tokens in sight; expected a model whose "
            "tokens see only those before them"
        )
    for layer, ffn in host.ffns.items():
        try:
            with gathered(model, ffn.module):
                ffn.differs = difference(ffn, recording)
        except DidNotRun as error:
            raise _Refused(f"the FFN of layer {layer} of {type(model).__name__} {error}") from None
        if host.ranks is not None and not host.ranks.all(ffn.differs is None):
            ffn.differs = ffn.differs or "it computes something else on another process"
    if reading.lengths.divides(_CONTEXT, len(texts[0])) is None:
        _choose_way(host, texts[0], recording.result[0, _CONTEXT:])


def _choose_way(host: Host, text: Tensor, expected: Tensor) -> None:
    """Notes how the host reads windows: in two forwards where those give the logits of one, and have a backward.

    A backward costs as much as a forward. It is tried where one may fail: behind states, and with weights that are quantized.
    """
    model, reading = host.model, host.reading
    context, inputs = text.split([_CONTEXT, _CHUNK])
    coarse = rounds_whole_texts(model)

    def read(way: Way) -> Tensor:
        cache = ContextCache(model, text.device, None)
        cache.fill(model, context[None])
        reading.writes = cache.written
        logits = logits_on(model, inputs, cache, _CONTEXT if way.positions else None)
        gradients.pull(logits)
        return logits

    with embedded(model, wanted=coarse or not reading.plain_cache) as gradients:
        verdict = cheapest(Verdict(FULL), read, expected, inputs, coarse, (FULL._replace(positions=True),), reading.ranks)
    if verdict.way.in_two:
        verdict = replace(verdict, way=SHORT._replace(positions=verdict.way.positions))  # a run compares what that adds
    else:
        with embedded(model) as gradients:
            _check_backward(model, context, inputs, gradients)
    reading.verdicts[0] = verdict
    reading.plain_cache &= verdict.way.in_two


def _check_backward(model: Any, context: Tensor, inputs: Tensor, gradients: Embedded) -> None:
    """Refuses a host through whose one forward no gradient comes back."""
    try:
        gradients.pull(one_forward(model, context, inputs))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _Refused(
            f"no gradient comes back through the forward of {type(model).__name__}, so nothing can be learned in it: a forward "
            f"with gradient and its backward raise {type(error).__name__}: {error}"
        ) from None


def probe(host: Host) -> ProbeReport:
    """Looks at a host before a memory is bound to it, and leaves it as it was; LOCAS_PROBE=0 turns it off.

    What it finds is noted in `host.reading` and in each FFN. Raises ValueError for a host that no memory can learn a text
    with: one that is not causal, or whose FFNs do not take part in its forward.
    """
    began = time.perf_counter()
    host.reading.lengths, host.reading.plain_cache = lengths_of(host.model.config), holds_keys_and_values_only(host.model)
    off = os.environ.get("LOCAS_PROBE", "1") == "0"
    skipped = "LOCAS_PROBE is 0" if off else None
    if not off:
        try:
            with undisturbed(host.model):
                _check(host, _texts(host))
        except _Refused as refusal:
            raise ValueError(str(refusal)) from None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a host's forward may raise where it cannot run yet
            skipped = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"{type(host.model).__name__} could not be probed, so its FFNs and its attention are taken for what its config "
                f"says: {skipped}",
                stacklevel=caller_stacklevel(),
            )
    host.reading.unprobed, host.reading.compares = skipped, not off
    return ProbeReport(time.perf_counter() - began, skipped)
