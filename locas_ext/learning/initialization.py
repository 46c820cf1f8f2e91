"""How a memory's rows begin (docs/method.md, "Initialization")."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.hosts.ffn import Rows, mean_row_norm
from locas_ext.ops import token_nll
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.base import PatchedFFN
from locas_ext.state.scope import scoped

from .chunk import Window
from .inputs import TokenIds, token_ids
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
        rows = [_unit_rows(plane) for plane in rows]
    elif config.init in ("gaussian", "activation"):
        rows = [_unit_rows(plane) * mean_row_norm(host) for plane, host in zip(rows, host_rows, strict=True)]
    return rows


def _chosen_rows(
    config: LocasConfig,
    importance: Tensor,
    host_rows: tuple[Rows, ...],
    ffn_input: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """The rows that the init chooses, as long as they are."""
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
        neurons = importance.topk(rank, largest=config.init != "bottomk").indices
    return [rows[neurons] for rows in host_rows]


def _bears_little(config: LocasConfig) -> bool:
    return (config.init, config.scale) == ("activation", "host")


def default_learning(config: LocasConfig, given: Mapping[str, Any]) -> dict[str, float]:
    """The AdamW rate of a memory that does not bear Backprop's own default, unless a rate is given; empty for the others.

    given: fields of Backprop; None: left to the default
    """
    of_adamw = given.get("optimizer") in (None, "adamw") and given.get("learning_rate") is None
    return {"learning_rate": ACTIVATION_AT_HOST_SCALE} if of_adamw and _bears_little(config) else {}


def check_rate(config: LocasConfig, update: object) -> None:
    """ValueError for a learning rate at which rows of FFN inputs are known to diverge with the host's scale.

    Slots along FFN inputs answer nearly every token, all together, each by its input's squared length.
    """
    if not _bears_little(config) or not isinstance(update, Backprop):
        return
    if update.optimizer == "adamw" and update.learning_rate > ACTIVATION_AT_HOST_SCALE:
        raise ValueError(
            f"learning_rate is {update.learning_rate:g}, at which init='activation' with scale='host' diverges: such slots "
            "answer nearly every token at once, each more strongly than a neuron of the host. Attach with scale='paper' or "
            f"init='topk', or learn with a learning_rate of at most {ACTIVATION_AT_HOST_SCALE:g}; on_divergence='ignore' "
            "lets it run"
        )


class _Observation:
    """What one forward shows of each FFN, and one backward where the init asks for it."""

    def __init__(self, attachment: Attachment):
        self.attachment, self.with_gradient = attachment, attachment.config.init == "gradient"
        self.inputs: dict[PatchedFFN, Tensor] = {}
        self.outputs: dict[PatchedFFN, Tensor] = {}

    @contextmanager
    def __call__(self):
        handles = [self._hooked(ffn) for ffn in self.attachment.ffns] if self.with_gradient else []
        # A graph knows no contexts: a compiled host is observed in eager code.
        try:
            with (
                scoped(self.attachment.state, observer=self._observe),
                eager_host(self.attachment.host.model),
                torch.set_grad_enabled(self.with_gradient),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _observe(self, ffn: PatchedFFN, x: Tensor) -> None:
        if ffn not in self.inputs:  # one that runs several times begins with what its first call uses
            self.inputs[ffn] = x.detach().reshape(-1, x.shape[-1])

    def _hooked(self, ffn: PatchedFFN):
        def hook(module, arguments, y):
            first = y if isinstance(y, Tensor) else y[0]
            if not first.requires_grad:  # below the first FFN nothing needs a gradient
                first = first.detach().requires_grad_()
            self.outputs.setdefault(ffn, first)
            return first if isinstance(y, Tensor) else type(y)((first, *y[1:]))

        return ffn.modules()[-1].register_forward_hook(hook)

    def rows(self, loss: Tensor) -> list[list[Tensor]]:
        """Each FFN's rows. loss: of the forward"""
        attachment, config = self.attachment, self.attachment.config
        generator = torch.Generator("cpu").manual_seed(config.seed)
        ffns = attachment.ffns
        gradients: list[Tensor | None] = [None] * len(ffns)
        if self.with_gradient:
            found = torch.autograd.grad(loss, [self.outputs[ffn] for ffn in ffns])
            gradients = [gradient.reshape(-1, gradient.shape[-1]) for gradient in found]
        rows = []
        for ffn, gradient in zip(ffns, gradients, strict=True):
            x = self.inputs[ffn]
            importance = ffn.importance(x) if gradient is None else ffn.wanted(x, gradient)
            rows.append(initial_rows(config, importance, ffn.host_rows(x), x, generator))
        return rows


def _initialize_from(attachment: Attachment, ids: Tensor, forward: Callable[[Tensor], Any]) -> Any:
    """Runs `forward` over ids [n], as [1, n], through the host alone, sets the slots from what it saw, returns its result."""
    state, observation = attachment.state, _Observation(attachment)
    with state.disable(), observation():
        result = forward(ids[None])
        rows = observation.rows(result)
    first = state.arenas[0].slots
    slots = first.new_zeros(len(state.layers), state.planes, state.rank, state.hidden_size)
    with torch.no_grad():
        for index, of_ffn in enumerate(rows):
            for plane, values in enumerate(of_ffn):
                slots[index, plane] = values
    if not torch.isfinite(slots).all():
        raise LocasError("the host's activations on this text are not finite; the memory was not initialized")
    state.set_slots(slots, version=0)
    return result.detach() if isinstance(result, Tensor) else result


def initialize(attachment: Attachment, input_ids: TokenIds) -> None:
    """See `Memory.initialize`."""
    host = attachment.host
    ids = token_ids(input_ids, host.vocab_size, at_least=2 if attachment.config.init == "gradient" else 1)
    if len(ids) > host.max_positions:
        raise ValueError(f"input_ids holds {len(ids)} tokens; expected at most {host.max_positions}, the host's positions")

    def forward(x: Tensor) -> Tensor | None:
        if attachment.config.init != "gradient":
            host.read(input_ids=x, use_cache=False)
            return None
        logits = host.model(input_ids=x, use_cache=False).logits[0, :-1]
        return token_nll(logits, x[0, 1:].to(logits.device)).sum()

    with attachment.exclusive("initialize"), quiet_host(host.model), torch.inference_mode(False):
        _initialize_from(attachment, ids.to(host.input_device()), forward)
    attachment.stream, attachment.texts = None, []


def score_and_initialize(attachment: Attachment, window: Window) -> Tensor:
    """The first chunk: scored by the host, which also shows which neurons it uses. Returns the summed NLL."""
    window = window.to(attachment.host.input_device())

    def forward(x: Tensor) -> Tensor:
        logits = attachment.host.model(input_ids=x, use_cache=False).logits[0, -len(window.targets) - 1 : -1]
        return token_nll(logits, window.targets.to(logits.device)).sum()

    return _initialize_from(attachment, torch.cat([window.context, window.inputs, window.targets[-1:]]), forward)
