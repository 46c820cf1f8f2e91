"""What a model's config says of its texts: how many positions, and which token begins one."""

from typing import Any

_POSITIONS = 2048  # of a model that does not limit them


def max_positions(model: Any) -> int:
    """The most tokens that the model can see at once; 2048 where its config does not say."""
    try:
        stated = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    except RuntimeError:  # where the config's layers differ from one another
        stated = None
    return stated if isinstance(stated, int) and stated > 0 else _POSITIONS


def bos_token_id(model: Any) -> int | None:
    """The model's BOS token; None if its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
