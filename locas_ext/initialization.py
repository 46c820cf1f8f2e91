"""How a memory's rows begin (docs/method.md, "Initialization")."""

import torch
from torch import Tensor

from .config import LocasConfig


def _unit_rows(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def check_rank(config: LocasConfig, intermediate_size: int) -> None:
    """ValueError if an init that clones neurons asks for more than the host has."""
    if config.init in ("topk", "bottomk", "random") and config.rank > intermediate_size:
        raise ValueError(
            f"rank is {config.rank}, but the host's FFN has only {intermediate_size} neurons to clone with "
            f"init={config.init!r}; expected a rank from 1 to {intermediate_size}, or init='gaussian'"
        )


def initial_rows(
    config: LocasConfig,
    importance: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    ffn_input: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Gate and key rows [r, d] float32 of length 1 for one layer.

    importance: [m]; gate_weight, up_weight: [m, d]; ffn_input: [T, d], the layer's FFN inputs over the chunk.
    The generator is a CPU one, so a seed means the same memory on every device.
    """
    rank, d = config.rank, gate_weight.shape[1]
    if config.init == "gaussian":
        rows = torch.randn(2, rank, d, generator=generator).to(gate_weight.device)
        return _unit_rows(rows[0]), _unit_rows(rows[1])
    if config.init == "activation":
        tokens = ffn_input.shape[0]
        if rank > tokens:
            raise ValueError(
                f"init='activation' takes one token a slot: rank is {rank}, but the chunk has {tokens} tokens"
            )
        chosen = torch.randperm(tokens, generator=generator)[:rank].to(ffn_input.device)
        rows = _unit_rows(ffn_input[chosen])
        return rows, rows.clone()
    if config.init == "random":
        neurons = torch.randperm(importance.shape[0], generator=generator)[:rank].to(importance.device)
    else:
        neurons = importance.topk(rank, largest=config.init == "topk").indices
    return _unit_rows(gate_weight[neurons]), _unit_rows(up_weight[neurons])
