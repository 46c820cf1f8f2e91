"""What `bench.census` asks one language model, through the public API only."""

import tempfile
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

import locas_ext as locas
from bench.small_hosts import small_host

WINDOW, STRIDE, RANK = 64, 32, 8
LEARNED, SAME = 0.05, 1e-2  # nats a token
MERGED = 1e-3  # of the logits' spread
TEXT = torch.randint(4, 100, (50,), generator=torch.Generator().manual_seed(3)).repeat(4)
SETTINGS: dict[str, Any] = dict(window=WINDOW, stride=STRIDE, learning_rate=2e-2, progress=False, on_divergence="ignore")


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


def loss(rows: Tensor, ids: Tensor) -> float:
    """Nats a token of ids [n] under logits [n, V], the first token excepted."""
    return functional.cross_entropy(rows[:-1], ids[1:]).item()


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


class HostState:
    """What a host was, to compare it with."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.logits = logits(model, TEXT[:WINDOW])  # first, as a first forward may keep tables in its modules
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.rest = self._rest()

    def _rest(self) -> dict[str, Any]:
        modules = self.model.named_modules()
        return {
            "requires_grad": {name: parameter.requires_grad for name, parameter in self.model.named_parameters()},
            "modules": {name: (type(module).__name__, sorted(module.__dict__)) for name, module in modules},
            "config": str(self.model.config.to_dict()),
        }

    def changes(self, but: str = "") -> list[str]:
        """What is no longer as it was; but: what is not looked at."""
        rest, weights = self._rest(), self.model.state_dict()
        changed = [name for name in rest if rest[name] != self.rest[name] and name != but]
        if list(weights) != list(self.weights) or not all(same_bits(weights[name], self.weights[name]) for name in weights):
            changed.append("weights")
        if not same_bits(logits(self.model, TEXT[:WINDOW]), self.logits):
            changed.append("logits")
        return changed


def is_causal(model: Any, rows: Tensor) -> bool:
    """Whether the first logits stay where the later tokens are others; rows: those of the text's window."""
    other = torch.cat([TEXT[:STRIDE], TEXT[:STRIDE].flip(0)])
    return bool((logits(model, other)[:STRIDE] - rows[:STRIDE]).abs().max() <= 1e-3 * rows.std())


def context_error(memory: Any, model: Any) -> float:
    """The largest difference, in nats a token, of a full window's chunk as memorize scores it and one plain forward does.

    The forward is over the window's tokens but its last one, which predicts nothing: where random weights make ties in a host's
    choice of keys (Doge, DeepSeek V3.2), how they fall changes with the number of tokens.
    """
    errors = []
    for chunk in memory.memorize(TEXT, **SETTINGS | {"learning_rate": 0.0}).chunks:
        if chunk.end >= WINDOW:
            begin = chunk.end - WINDOW
            rows = logits(model, TEXT[begin : chunk.end - 1])[chunk.start - begin - 1 :]
            expected = functional.cross_entropy(rows, TEXT[chunk.start : chunk.end], reduction="sum").item()
            errors.append(abs(chunk.nll - expected) / chunk.tokens)
    return max(errors)


def place(status: Any) -> str:
    """Where one layer's memory stands: in the host's FFN as one op, between its projections, or beside the module."""
    if status.path == "whole":
        return "whole"
    # Locas-MLP slots stand at the hidden vector's place of a two-layer FFN, whatever module holds that.
    is_between = "between the projections" in status.reason or status.reason.startswith("Locas-MLP")
    return "between" if is_between else "beside"


def attached(model: Any, variant: str) -> Any:
    return locas.attach(model, locas.LocasConfig(rank=RANK, scale=0.5, variant=variant))


def examine(name: str) -> dict[str, Any]:
    """The verdict on one class, with what it rests on."""
    try:
        model = small_host(getattr(transformers, name))
    except ImportError as error:
        return {"verdict": "not built", "why": f"a package is not installed: {error}"}
    except Exception as error:
        return {"verdict": "not built", "why": f"no small model could be made: {told(error)}"}
    try:
        before = HostState(model)
    except ImportError as error:
        return {"verdict": "not built", "why": f"a package is not installed: {error}"}
    except Exception as error:
        return {"verdict": "not built", "why": f"its forward takes more than token ids: {told(error)}"}
    if not before.logits.isfinite().all():
        return {"verdict": "not built", "why": "the small model's logits are not finite"}
    found: dict[str, Any] = {"type": model.config.get_text_config(decoder=True).model_type}
    for variant in ("glu", "mlp"):
        try:
            memory = attached(model, variant)
        except (ValueError, TypeError) as error:
            found |= {"verdict": "refused", "why": told(error)}
            if changes := before.changes():
                return found | {"verdict": "not bitwise", "why": f"attach was refused and changed {', '.join(changes)}"}
        else:
            found |= {"variant": variant, "why": ""} | learned(memory, model, before)
            return found | (merged(model, variant, before) if found["verdict"] == "works" else {})
    return found


def learned(memory: Any, model: Any, before: HostState) -> dict[str, Any]:
    """Learns the text, detaches, and says what came of it."""
    ids, changes = TEXT[:WINDOW], []
    if not same_bits(logits(model, ids), before.logits):
        changes.append("logits at attach")
    memory.memorize(TEXT, **SETTINGS)
    losses = [loss(before.logits, ids), loss(logits(model, ids), ids)]
    error = context_error(memory, model)
    status = memory.status()
    with memory.disabled():
        if not same_bits(logits(model, ids), before.logits):
            changes.append("logits while disabled")
    memory.detach()
    changes += before.changes()
    verdict, why = "works", ""
    if changes:
        verdict, why = "not bitwise", f"changed: {', '.join(changes)}"
    elif not is_causal(model, before.logits):
        verdict = "not causal"
    elif not error <= SAME:
        verdict, why = "wrong context", f"a chunk's score is {error:.1e} nats a token off"
    elif not losses[1] < losses[0] - LEARNED:
        verdict, why = "no learning", f"the loss fell by {losses[0] - losses[1]:.3f} nats a token"
    return {
        "verdict": verdict,
        "why": why,
        "loss": losses,
        "context_error": error,
        "places": Counter(place(layer) for layer in status),
        "reasons": sorted({layer.reason for layer in status}),
        "windows": status[0].windows,
    }


def merged(model: Any, variant: str, before: HostState) -> dict[str, Any]:
    """Merges what was learned, and reads the saved model with plain transformers."""
    memory, ids = attached(model, variant), TEXT[:WINDOW]
    memory.memorize(ids, **SETTINGS)
    expected = logits(model, ids)
    try:
        memory.merge_and_unload(pad_to_multiple_of=16)
    except ValueError as error:
        return {"merge": "refused", "merge_why": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
    errors = [((logits(each.eval(), ids) - expected).abs().max() / expected.std()).item() for each in (model, again)]
    problems = [f"logits {error:.1e} of their spread away" for error in errors if not error <= MERGED]
    problems += [f"{key}: {sorted(names)[:3]}" for key, names in info.items() if names]
    locas.unmerge(model)
    problems += [f"unmerge changes {what}" for what in before.changes(but="config")]
    return {"merge": "wrong" if problems else "works", "merge_why": ", ".join(problems), "merge_errors": errors}
