"""How a memory's rows begin (docs/method.md, "Initialization")."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.hosts.ffn import Rows, mean_row_norm
from locas_ext.hosts.sharding import companions
from locas_ext.ops import token_nll
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.base import PatchedFFN
from locas_ext.signals import uninterrupted
from locas_ext.state.scope import scoped

from .chunk import Window
from .inputs import TokenIds, require_same, token_ids
from .peers import Peers
from .run_guards import eager_host, quiet_host
from .update import Backprop

# AdamW rates beyond do harm with init="activation" and scale="host". Measured on the shipped model (d 256, r 64, 6,144 tokens
# of Nostromo): perplexity 47.4 alone; 46.8 at 2e-4, 49.5 at 1e-3, 58.5 at 4e-3. Half of the first, as wider hosts bear less.
ACTIVATION_AT_HOST_SCALE = 1e-4


def _unit_rows(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def initial_rows(
    config: LocasConfig,
    importance: Tensor,
    host_rows: tuple[Rows, ...],
    ffn_input: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """The rows [r, d] float32 that decide when one layer's slots fire: gate and key, or of Locas-MLP the key.

    importance: [m]; host_rows: the host's own such rows, each [m, d]; ffn_input: [T, d], the layer's FFN inputs over the
    chunk. The generator is a CPU one, so a seed means the same memory on every device.
    """
    rows = _chosen_rows(config, importance, host_rows, ffn_input, generator)
    if config.row_length == "unit":
        return [_unit_rows(plane) for plane in rows]
    if config.init in ("gaussian", "activation"):  # not the host's rows
        return [_unit_rows(plane) * mean_row_norm(host) for plane, host in zip(rows, host_rows, strict=True)]
    return rows


def _chosen_rows(
    config: LocasConfig,
    importance: Tensor,
    host_rows: tuple[Rows, ...],
    ffn_input: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """What the init chooses, of any length; arguments as in `initial_rows`."""
    rank, d = config.rank, host_rows[0].shape[1]
    if config.init == "gaussian":
        rows = torch.randn(len(host_rows), rank, d, generator=generator, dtype=torch.float32, device="cpu").to(
            host_rows[0].device
        )
        return list(rows)
    if config.init == "activation":
        tokens = ffn_input.shape[0]
        if rank > tokens:
            raise ValueError(f"init='activation' takes one token per slot: rank is {rank}, but the chunk has {tokens} tokens")
        chosen = torch.randperm(tokens, generator=generator, device="cpu")[:rank].to(ffn_input.device)
        return [ffn_input[chosen]] * len(host_rows)
    if config.init == "random":
        neurons = torch.randperm(importance.shape[0], generator=generator, device="cpu")[:rank].to(importance.device)
    else:
        neurons = importance.topk(rank, largest=config.init == "topk").indices
    return [rows[neurons] for rows in host_rows]


def _bears_little(config: LocasConfig) -> bool:
    return (config.init, config.scale) == ("activation", "host")


def default_learning(config: LocasConfig, given: Mapping[str, Any]) -> dict[str, float]:
    """The AdamW rate of a memory that does not bear Backprop's own default, unless a rate is given; empty for the others.

    given: fields of Backprop; None: left to the default
    """
    of_adamw = given.get("optimizer") != "sgd" and given.get("learning_rate") is None
    return {"learning_rate": ACTIVATION_AT_HOST_SCALE} if of_adamw and _bears_little(config) else {}


def check_rate(config: LocasConfig, update: object) -> None:
    """ValueError for a learning rate at which rows of FFN inputs are known to diverge with the host's scale.

    Slots along FFN inputs answer nearly every token, all together, each by its input's squared length.
    """
    if not _bears_little(config) or not isinstance(update, Backprop):
        return
    rates = {name: getattr(update, name) for name in ("learning_rate", "gate_learning_rate", "value_learning_rate")}
    name, rate = max(rates.items(), key=lambda item: item[1] or 0)
    if update.optimizer != "sgd" and rate > ACTIVATION_AT_HOST_SCALE:
        raise ValueError(
            f"{name} is {rate:g}, at which init='activation' with scale='host' diverges: such slots "
            "answer nearly every token at once, each more strongly than a neuron of the host. Attach with scale='paper' or "
            f"init='topk', or learn with a learning_rate of at most {ACTIVATION_AT_HOST_SCALE:g}; on_divergence='ignore' "
            "lets it run"
        )


@contextmanager
def _observe(attachment: Attachment, rows: dict[PatchedFFN, list[Tensor]], finite: list[Tensor], peers: Peers | None):
    """Collects each layer's initial rows during one forward, and in `finite` whether what went into each FFN is."""
    generator = torch.Generator("cpu").manual_seed(attachment.config.seed)

    def observe(ffn: PatchedFFN, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        finite.append(x.isfinite().all())
        if ffn not in rows:  # one that runs several times begins with what its first call uses
            importance = ffn.importance(x) if peers is None else peers.mean_importance(ffn.importance(x), len(x))
            rows[ffn] = initial_rows(attachment.config, importance, ffn.host_rows(x), x, generator)

    # A graph knows no contexts: a compiled host is observed in eager code.
    with scoped(attachment.state, observer=observe), eager_host(attachment.host.model):
        yield


def _first_slots(attachment: Attachment, ids: Tensor, forward: Callable[[Tensor], Any], peers: Peers | None = None) -> Tensor:
    """Runs `forward` over ids [n], as [1, n], through the host alone. Returns the slots that what it saw makes.

    forward: raises what speaks against beginning with this text; peers: those who begin with the same slots, for what all of
    them saw
    """
    state = attachment.state
    rows: dict[PatchedFFN, list[Tensor]] = {}
    seen: list[Tensor] = []
    with state.disable(), _observe(attachment, rows, seen, peers), torch.no_grad():
        forward(ids[None])
    first = state.arenas[0].slots
    slots = first.new_zeros(len(state.layers), state.planes, state.rank, state.hidden_size)
    for index, ffn in enumerate(attachment.ffns):
        for plane, values in enumerate(rows[ffn]):
            slots[index, plane] = values if state.ranks is None else state.ranks.mine(values)
    if peers is not None:
        peers.first(slots)
    finite = bool(torch.isfinite(slots).all()) and (peers is not None or all(map(bool, seen)))  # peers have compared losses
    if not (finite if state.ranks is None else state.ranks.all(finite)):
        raise LocasError("the host's activations on this text are not finite; the memory was not initialized")
    return slots


def initialize(attachment: Attachment, input_ids: TokenIds) -> None:
    """See `Memory.initialize`."""
    host = attachment.host
    ids = token_ids(input_ids, host.vocab_size, at_least=1)
    require_same(companions(host.model), ids, attachment.config)
    if len(ids) > host.max_positions:
        raise ValueError(f"input_ids holds {len(ids)} tokens; expected at most {host.max_positions}, the host's positions")
    with attachment.exclusive("initialize"), quiet_host(host.model), torch.inference_mode(False):
        slots = _first_slots(attachment, ids.to(host.input_device()), lambda x: host.read(input_ids=x, use_cache=False))
        with uninterrupted():
            attachment.state.set_slots(slots, version=0)
            attachment.stream, attachment.texts = None, []


def score_and_initialize(
    attachment: Attachment, window: Window, scored: Callable[[Tensor], None], peers: Peers | None = None
) -> None:
    """The first chunk: scored by the host, which also shows which neurons it uses.

    scored: is given the summed NLL before anything changes, and raises what speaks against it; peers: those who begin with the
    same slots
    """
    window = window.to(attachment.host.input_device())

    def forward(x: Tensor) -> None:
        logits = attachment.host.model(input_ids=x, use_cache=False).logits[0, -len(window.targets) - 1 : -1]
        scored(token_nll(logits, window.targets.to(logits.device)).sum())

    ids = torch.cat([window.context, window.inputs, window.targets[-1:]])
    attachment.state.set_slots(_first_slots(attachment, ids, forward, peers), version=0)
