"""Where the FFNs of each supported model family live. A new family is a new row of HOSTS."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from locas_ext.ops.activations import INDEX

from .ffn import Conv1DFFN, FusedGatedFFN, GatedFFN, HostFFN, TwoLayerFFN
from .text_config import max_positions
from .window_reading import WindowReading


@dataclass(frozen=True)
class HostFamily:
    """Names inside a decoder layer and its config; the defaults are Llama's, which most families follow."""

    layers: str = "layers"  # inside the decoder
    ffn: str | None = "mlp"  # inside a layer; None: the projections are the layer's own
    kind: Callable[[nn.Module, str], HostFFN] = GatedFFN
    activation_key: str = "hidden_act"
    width_key: str = "intermediate_size"


_LLAMA = HostFamily()
_GEMMA = HostFamily(activation_key="hidden_activation")
_PHI3 = HostFamily(kind=FusedGatedFFN)

HOSTS: dict[str, HostFamily] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": _PHI3,
    "gpt2": HostFamily(
        layers="h", kind=partial(Conv1DFFN, names=("c_fc", "c_proj")), activation_key="activation_function", width_key="n_inner"
    ),
    "gpt_neox": HostFamily(kind=partial(TwoLayerFFN, names=("dense_h_to_4h", "dense_4h_to_h"))),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA,
    "opt": HostFamily(
        ffn=None, kind=partial(TwoLayerFFN, names=("fc1", "fc2")), activation_key="activation_function", width_key="ffn_dim"
    ),
    "phi": HostFamily(kind=partial(TwoLayerFFN, names=("fc1", "fc2"))),
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}


@dataclass(frozen=True)
class Host:
    """A causal language model as the memory sees it."""

    model: PreTrainedModel
    ffns: tuple[HostFFN, ...]  # one a decoder layer
    width_key: str  # the config's name of intermediate_size
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    reading: WindowReading = field(default_factory=WindowReading)  # how its windows are read, as far as probed

    @property
    def config(self):
        return self.model.config.get_text_config(decoder=True)

    @property
    def is_gated(self) -> bool:
        """Whether the FFNs have a gate projection, for a gated memory to stand beside."""
        return isinstance(self.ffns[0], GatedFFN)

    def input_device(self) -> torch.device:
        """Where token ids go: the embedding's device, or the CPU where a hook brings its weight only when needed."""
        weight = self.model.get_input_embeddings().weight
        return torch.device("cpu") if weight.is_meta else weight.device

    def hidden_state_like(self) -> torch.Tensor:
        """An empty tensor with the dtype and device of the hidden states, as the embedding makes them."""
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.empty(0, dtype=dtype, device=self.input_device())


def inspect_host(model) -> Host:
    """Finds the FFNs of a model.

    Raises TypeError if it is no transformers model, ValueError if it has no language-model head, is of a family that
    is not supported, or uses an activation without a kernel; the message says what would work.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile() returned
    if hasattr(model, "get_base_model"):  # a PEFT wrapper
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is {type(model).__name__}; expected a transformers causal language model, "
            "such as AutoModelForCausalLM.from_pretrained(...) returns"
        )
    config = model.config.get_text_config(decoder=True)
    family = HOSTS.get(config.model_type)
    if family is None:
        raise ValueError(f"model type {config.model_type!r} is not supported: {_why_not(config)}")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head, so it cannot be trained on text; "
            "load it with AutoModelForCausalLM"
        )
    activation = getattr(config, family.activation_key)
    if activation not in INDEX:
        raise ValueError(f"the host's activation {activation!r} has no kernel; supported: {', '.join(INDEX)}")
    layers = getattr(model.get_decoder(), family.layers)
    modules = [layer if family.ffn is None else getattr(layer, family.ffn) for layer in layers]
    return Host(
        model=model,
        ffns=tuple(family.kind(module, activation) for module in modules),
        width_key=family.width_key,
        hidden_size=config.hidden_size,
        # GPT-2's may be None, which means this
        intermediate_size=getattr(config, family.width_key) or 4 * config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions(model),
    )


_SPARSE = "its FFN silences all but the strongest neurons of a token, so more neurons would change the host's own"
_NOT_YET = "its two-layer FFN is not among those known here"
_REFUSED = {"gemma3n_text": _SPARSE, **dict.fromkeys(("bloom", "falcon", "mpt"), _NOT_YET)}


def _why_not(config) -> str:
    supported = f"supported model types are {', '.join(HOSTS)}"
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in experts):
        return f"a mixture of experts has an FFN per expert and no single one to widen; {supported}"
    if config.model_type in _REFUSED:
        return f"{_REFUSED[config.model_type]}; {supported}"
    return f"where its FFN lives is not known here; {supported}"
