"""How a text is read: the same windows for every method, so that their losses compare."""

from dataclasses import dataclass
from typing import Any

from locas_ext.checks import boolean, integer
from locas_ext.hosts.text_config import bos_token_id, max_positions


@dataclass(frozen=True)
class Protocol:
    """The window, the stride and the BOS of a run (docs/method.md, "The online protocol").

    Attributes:
        window: W, the most tokens the model sees at once, chunk and BOS included
        stride: S, the tokens of a chunk
        bos: whether the host's BOS token stands before every window
    """

    window: int
    stride: int
    bos: bool

    @property
    def room(self) -> int:
        """How many tokens of the text a window holds."""
        return self.window - 1 if self.bos else self.window

    @classmethod
    def of(cls, model: Any, window: object, stride: object, bos: object, prefix: str = "") -> "Protocol":
        """The protocol for a host, with what is None filled in; ValueError or TypeError for what does not fit.

        Args:
            model: the host, a transformers causal language model
            window: int from 2 to the host's positions; None: 2048, or the host's positions if fewer
            stride: int from 1 to the tokens of the text in a window; None: window // 4
            bos: bool
            prefix: stands before the names in messages, such as "--"
        """
        bos, most = boolean("bos", bos), max_positions(model)
        if bos and bos_token_id(model) is None:
            raise ValueError("bos is True, but the host's config has no bos_token_id")
        window = integer(f"{prefix}window", min(2048, most) if window is None else window, 2, most, "the host's positions")
        room, why = (window - 1, "the window without its BOS token") if bos else (window, "the window")
        stride = integer(f"{prefix}stride", max(1, window // 4) if stride is None else stride, 1, room, why)
        return cls(window, stride, bos)
