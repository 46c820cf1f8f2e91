"""What other libraries put around a transformers model."""

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile's and PEFT's wrappers. ValueError for a wrapper that adds to the input."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile() returned
    if not hasattr(model, "get_base_model"):  # no PEFT wrapper
        return model
    wrapper: Any = model
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            kind = getattr(adapter.peft_type, "value", adapter.peft_type)
            raise ValueError(
                f"model is a {type(model).__name__} of type {kind}, which puts a learned prompt before the text, and a memory "
                "reads the text through the model inside, without it; attach to model.get_base_model() to leave the prompt out"
            )
    return wrapper.get_base_model()
