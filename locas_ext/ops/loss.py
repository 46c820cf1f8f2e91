"""The loss of memorizing: one native kernel for plain tensors, plain torch where code is traced or transformed."""

import torch
from torch import Tensor

from .autograd import TokenNllFunction
from .checks import KERNEL_DTYPES, check_logits
from .routes import by_address


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Each token's negative log-likelihood, in nats: what memorizing learns from.

    Args:
        logits: [..., V], float32, bfloat16 or float16, or float64 (in plain torch); computed in float32 or better
        targets: [...], int64, each in [0, V)

    Returns:
        [T] float32 (float64 for float64 logits), T tokens in all. The gradient flows to logits, once.

    Raises:
        TypeError: an argument is not a tensor
        ValueError: a shape, dtype or device does not fit, or a target on the CPU is not in [0, V)

    Source: arXiv 2602.05085, section 3; docs/method.md, "Learning".

    >>> nll = token_nll(torch.zeros(2, 5), torch.tensor([0, 4]))
    >>> [round(value, 4) for value in nll.tolist()]  # ln 5: all 5 ids are equally likely
    [1.6094, 1.6094]
    """
    check_logits("token_nll", logits, targets)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    plain = by_address(logits, targets)
    if plain and targets.is_cpu and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(f"token_nll: targets holds an id outside [0, {logits.shape[1]})")
    if plain and logits.dtype in KERNEL_DTYPES:
        return TokenNllFunction.apply(logits, targets)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -wide.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
