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
    host_rows: tuple[Tensor, ...],
    ffn_input: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """The rows [r, d] float32 of length 1 that decide when one layer's slots fire: gate and key, or of Locas-MLP the key.

    importance: [m]; host_rows: the host's own such rows, each [m, d]; ffn_input: [T, d], the layer's FFN inputs over the
    chunk. The generator is a CPU one, so a seed means the same memory on every device.
    """
    rank, d = config.rank, host_rows[0].shape[1]
    if config.init == "gaussian":
        rows = torch.randn(len(host_rows), rank, d, generator=generator).to(host_rows[0].device)
        return [_unit_rows(plane) for plane in rows]
    if config.init == "activation":
        tokens = ffn_input.shape[0]
        if rank > tokens:
            raise ValueError(
                f"init='activation' takes one token a slot: rank is {rank}, but the chunk has {tokens} tokens"
            )
        chosen = torch.randperm(tokens, generator=generator)[:rank].to(ffn_input.device)
        return [_unit_rows(ffn_input[chosen])] * len(host_rows)
    if config.init == "random":
        neurons = torch.randperm(importance.shape[0], generator=generator)[:rank].to(importance.device)
    else:
        neurons = importance.topk(rank, largest=config.init == "topk").indices
    return [_unit_rows(rows[neurons]) for rows in host_rows]
