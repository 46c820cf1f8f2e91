"""Next-token distributions: their losses, and how far one model's are from another's. Sums are in float64, nats."""

import hashlib

import torch
from torch import Tensor

_BLOCK = 1 << 22  # float64 numbers at once


def _blocks(*logits: Tensor):
    """The rows of tensors [n, vocab_size] in float64, a few at a time."""
    rows = max(1, _BLOCK // logits[0].shape[-1])
    for block in zip(*(tensor.split(rows) for tensor in logits), strict=True):
        yield [tensor.double() for tensor in block]


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Summed over the targets [n], in nats; logits [n, vocab_size]."""
    taken = targets[:, None].split(max(1, _BLOCK // logits.shape[-1]))
    parts = [block.log_softmax(-1).gather(1, column) for (block,), column in zip(_blocks(logits), taken, strict=True)]
    return -torch.cat(parts).sum().item()


def divergence(host_logits: Tensor, logits: Tensor) -> float:
    """KL(host || other) summed over n positions, in nats; both logits [n, vocab_size]."""
    total = 0.0
    for host, other in _blocks(host_logits, logits):
        host, other = host.log_softmax(-1), other.log_softmax(-1)
        p = host.exp()
        # A token that the host rules out (a logit of -inf) adds nothing, whatever the other says of it.
        total += torch.where(p > 0, p * (host - other), 0.0).sum().item()
    return total


def digest(logits: Tensor) -> bytes:
    """SHA-256 over every bit of the logits."""
    return hashlib.sha256(logits.contiguous().cpu().view(torch.uint8).numpy().data).digest()
