"""Which host a memory belongs to: its type and sizes, and a few of its weights.

One checkpoint has other weights in another dtype, by its rounding, so the weights are compared and not hashed. Two hosts are
the same if all of the sampled weights lie as close as the roundings of both sides can explain, and three in four are equal
once both sides are rounded to the coarser one's dtype. A dtype here is the coarsest that holds a side's samples exactly,
whatever tensor they came in: weights that were kept in bfloat16 once are bfloat16. So a host that was fine-tuned is another
host as soon as a quarter of its weights, or one of them by more than a rounding, has moved.

The vocabulary may grow or shrink: a memory does not touch it.
"""

import base64
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .ffn import Rows
from .registry import Host
from .sharding import gathered

SAMPLES = 64  # of a layer
_EQUAL_SHARE = 0.75  # a float16 copy rounded to bfloat16 differs from a direct one in 1 of 16: where it fell on a tie
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the coarsest first


def _sizes(host: Host) -> dict:
    return {
        "model_type": host.config.model_type,
        "hidden_size": host.hidden_size,
        "intermediate_size": host.intermediate_size,
        "num_hidden_layers": host.depth,
    }


def _first_rows(host: Host) -> Iterator[Rows]:
    """Per FFN the input rows: of a gated FFN the gate's. Each is to be read before the next is asked for."""
    like = host.hidden_state_like()
    for ffn in host.ffns.values():
        with gathered(host.model, ffn.module):
            yield ffn.sample_source(like)


def _at(rows: Rows, places: Tensor) -> Tensor:
    """The numbers of rows [m, d] at these places, counted through all of them."""
    if isinstance(rows, Tensor):
        return rows.detach().reshape(-1)[places]
    width = rows.shape[1]
    return rows[places // width].gather(1, (places % width)[:, None])[:, 0]


def _sample(rows: Rows) -> Tensor:
    """[SAMPLES] float32 on the CPU, evenly spread over the whole."""
    places = torch.arange(SAMPLES, device=rows.device) * (rows.shape.numel() - 1) // (SAMPLES - 1)
    return _at(rows, places).to("cpu", torch.float32)


def fingerprint(host: Host) -> dict:
    """What is kept of a host to know it again, ready for JSON: type, sizes, and per layer 64 float32 numbers in base64."""
    samples = [base64.b64encode(_sample(weight).numpy().astype("<f4").tobytes()).decode() for weight in _first_rows(host)]
    return {**_sizes(host), "samples": samples}


def differences(saved: dict, host: Host) -> list[str]:
    """What of a host is not as a fingerprint says, in words; empty for the same host."""
    sizes = _sizes(host)
    different = [f"{name} {saved[name]!r} there, {sizes[name]!r} here" for name in sizes if saved[name] != sizes[name]]
    if different:
        return different
    if len(saved.get("samples", host.ffns)) != len(host.ffns):
        return [f"{len(saved['samples'])} layers with an FFN there, {len(host.ffns)} here"]
    if "weights_sha256" in saved:
        return [] if saved["weights_sha256"] == _format1_hash(host) else ["other weights (weights_sha256)"]
    there = torch.stack([_decode(samples) for samples in saved["samples"]])
    here = torch.stack([_sample(weight) for weight in _first_rows(host)])
    return [] if _same(there, here) else [f"other weights ({_apart(there, here)} of {here.numel()} samples differ)"]


def _decode(samples: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(samples)), dtype=torch.float32)


# ---- comparing --------------------------------------------------------------------------------------------------
def _dtype_of(samples: Tensor) -> torch.dtype:
    """The coarsest dtype that holds them exactly."""
    return next(dtype for dtype in _DTYPES if torch.equal(samples.to(dtype).float(), samples) or dtype == torch.float32)


def _half_step(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a number may lie from its rounding: half the distance of its neighbours, that of subnormal ones at least."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(samples.abs().clamp_min(info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(samples, info.eps / 2), exponent)


def _apart(there: Tensor, here: Tensor) -> int:
    return int((there != here).sum())


def _same(there: Tensor, here: Tensor) -> bool:
    there, here = torch.nan_to_num(there), torch.nan_to_num(here)
    dtypes = _dtype_of(there), _dtype_of(here)
    coarser = min(dtypes, key=_DTYPES.index)
    larger = torch.maximum(there.abs(), here.abs())
    explained = sum(_half_step(larger, dtype) for dtype in dtypes)
    equal = there.to(coarser) == here.to(coarser)
    return bool(((there - here).abs() <= explained).all() and equal.float().mean() >= _EQUAL_SHARE)


# ---- format 1 ---------------------------------------------------------------------------------------------------
def _format1_hash(host: Host) -> str:
    """What files of format 1 hold: a hash over samples rounded to bfloat16."""
    digest = hashlib.sha256()
    for weight in _first_rows(host):
        count = weight.shape.numel()
        places = torch.arange(0, count, max(1, count // 64), device=weight.device)
        samples = _at(weight, places).to("cpu", torch.bfloat16)
        digest.update(samples.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
