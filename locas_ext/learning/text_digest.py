"""What identifies a text: a digest of its token ids that can be saved and resumed."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # ids


class TextDigest:
    """SHA-256 over blocks of 64 ids, each hashed together with the digest of those before it.

    So the digest of a longer text follows from that of its beginning, which a file can hold:

        blocks = H(... H(H(H() ids[0:64]) ids[64:128]) ...)        hexdigest() = H(blocks rest), where there is a rest
    """

    def __init__(self, blocks: str = hashlib.sha256().hexdigest(), rest: Sequence[int] = ()):
        """blocks: the digest of the whole blocks so far, in hexadecimal; rest: the ids behind them, fewer than 64"""
        self.blocks = blocks
        self._rest = torch.tensor(rest, dtype=torch.int64, device="cpu")

    def update(self, ids: Tensor) -> None:
        """Takes in more of the text: ids [n] int64."""
        ids = torch.cat([self._rest, ids])
        whole = len(ids) - len(ids) % BLOCK
        for start in range(0, whole, BLOCK):
            self.blocks = _digest(self.blocks, ids[start : start + BLOCK])
        self._rest = ids[whole:]

    def hexdigest(self) -> str:
        """The digest of all ids so far, 64 hexadecimal digits."""
        return _digest(self.blocks, self._rest) if len(self._rest) else self.blocks


def _digest(before: str, ids: Tensor) -> str:
    return hashlib.sha256(bytes.fromhex(before) + ids.numpy().tobytes()).hexdigest()


def text_digest(ids: Tensor) -> str:
    """The digest of a whole text, ids [n] int64."""
    digest = TextDigest()
    digest.update(ids)
    return digest.hexdigest()


def format1_digest(ids: Tensor) -> str:
    """What a stream saved with format 1 has for a text digest."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
