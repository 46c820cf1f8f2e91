"""How a text is read by every method of a run: the same windows, so that they compare."""

from dataclasses import dataclass

from .inputs import positions


@dataclass(frozen=True)
class Protocol:
    """docs/method.md, "The online protocol".

    window: the most tokens seen at once
    stride: the tokens of a chunk
    bos: whether the host's BOS token stands before every window
    """

    window: int
    stride: int
    bos: bool

    @property
    def room(self) -> int:
        """Tokens of the text in a window."""
        return self.window - 1 if self.bos else self.window

    @classmethod
    def of(cls, host, window: int | None, stride: int | None, bos: bool) -> "Protocol":
        """window None: 2048 or the host's positions if fewer; stride None: a quarter of the window.

        Raises ValueError for what does not fit the host.
        """
        most = positions(host)
        window = min(2048, most) if window is None else window
        if not 2 <= window <= most:
            raise ValueError(f"--window is {window}; expected an integer from 2 to {most}, the host's positions")
        protocol = cls(window, max(1, window // 4) if stride is None else stride, bos)
        if not 1 <= protocol.stride <= protocol.room:
            raise ValueError(
                f"--stride is {protocol.stride}; expected an integer from 1 to {protocol.room}, what the window holds"
            )
        if bos and host.config.get_text_config(decoder=True).bos_token_id is None:
            raise ValueError("bos: the host's config has no bos_token_id")
        return protocol
