"""What a model's config says of its texts: how many positions, and which token begins one."""

from typing import Any

# What configs call the number of positions; transformers gives most of them the first name.
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "context_length")
NO_END = 1 << 30  # positions of a host that has no last one


def _setting(config: Any, name: str) -> Any:
    """A value of a config; None where there is none, or one per layer, for which transformers raises RuntimeError."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def max_positions(model: Any) -> int:
    """The most tokens that the model can see at once; NO_END where its config names no end."""
    config = model.config.get_text_config(decoder=True)
    stated = (_setting(config, name) for name in _POSITIONS)
    return next((value for value in stated if isinstance(value, int) and value > 0), NO_END)


def bos_token_id(model: Any) -> int | None:
    """The model's BOS token; None if its config names none."""
    return _setting(model.config.get_text_config(decoder=True), "bos_token_id")
