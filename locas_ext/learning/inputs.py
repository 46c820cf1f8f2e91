"""A text as token ids, checked."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locas_ext.ops.ranks import Ranks

TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]]  # [n] or [1, n]


def token_ids(input_ids: TokenIds, vocab_size: int, at_least: int) -> Tensor:
    """[n] int64 on the CPU from a list or an integer tensor [n] or [1, n]; ValueError or TypeError names what is off."""
    if not isinstance(input_ids, Tensor):
        said = f"input_ids is a {type(input_ids).__name__}; expected token ids, a tensor or list of integers"
        if isinstance(input_ids, Mapping):  # what a tokenizer returns
            raise TypeError(f"{said}, such as its ['input_ids']")
        try:
            input_ids = torch.tensor(input_ids, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{said} ({error})") from None
        if input_ids.numel() == 0:
            input_ids = input_ids.long()
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids is {input_ids.dtype}; expected integers")
    if input_ids.is_meta:
        raise ValueError("input_ids is on the meta device and holds no numbers; expected a tensor with data")
    if input_ids.layout is not torch.strided:
        raise TypeError(f"input_ids is a {input_ids.layout} tensor; expected a dense one (to_dense())")
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected [n] or [1, n]")
    if input_ids.numel() < at_least:
        count = "1 token" if input_ids.numel() == 1 else f"{input_ids.numel()} tokens"
        raise ValueError(f"input_ids holds {count}; expected at least {at_least}")
    with torch.inference_mode(False):
        ids = input_ids.detach().to("cpu", torch.int64, copy=True)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids holds token {low if low < 0 else high}; expected ids from 0 to {vocab_size - 1}, the host's vocabulary"
        )
    return ids


def require_same(ranks: Ranks | None, ids: Tensor, settings: object) -> None:
    """ValueError unless all processes that share the memory were given the same text and settings."""
    if ranks is not None and not ranks.same((hashlib.sha256(ids.numpy().tobytes()).digest(), repr(settings))):
        raise ValueError(
            f"the {ranks.size} processes that the host is split among (tp_plan, fully_shard) were given different texts, "
            "settings or saved runs; expected the same input_ids, settings and resume in all of them"
        )
