"""What a model's config says of its texts: how many positions, and which token begins one."""

from typing import Any


def max_positions(model: Any) -> int:
    """The most tokens that the model can see at once."""
    return model.config.get_text_config(decoder=True).max_position_embeddings


def bos_token_id(model: Any) -> int | None:
    """The model's BOS token; None if its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
