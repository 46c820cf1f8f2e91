"""Whether a host's tokens see later ones: two texts that differ in their last tokens only tell."""

import torch
from torch import Tensor, nn

from .agreement import COARSE, distances, rounding, rounds_whole_texts


def _moved(logits: Tensor, others: Tensor, same: int) -> float:
    """How far the logits [n, V] of two texts are apart where the texts are the same, as a part of their spread."""
    return distances(others[:same], logits[:same]).max().item()


def leak(model: nn.Module, texts: Tensor, logits: Tensor, same: int) -> float | None:
    """How far a host's earlier logits follow its later tokens, as a part of their spread; None: not at all.

    texts: [2, n], the first `same` tokens of both the same; logits: [2, n, V], theirs from one forward
    """
    moved = _moved(logits[0], logits[1], same)
    if moved == 0:
        return None
    if rounds_whole_texts(model):
        return moved if not moved <= COARSE else None

    # Two rows of one forward may be summed in other orders. Two forwards of one row are not, up to what chance does.
    def alone(row: int) -> Tensor:
        return model(input_ids=texts[row : row + 1], use_cache=False, return_dict=True).logits[0]

    with torch.no_grad():
        first, second, again = alone(0), alone(1), alone(0)
    moved, chance = _moved(first, second, same), _moved(first, again, same)
    return moved if not moved <= 4 * chance + 1e-5 + rounding(first) / 2 else None
