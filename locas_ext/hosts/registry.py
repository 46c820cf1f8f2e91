"""Where the FFNs of each supported model family live. A new family is a new row of HOSTS."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from locas_ext.ops.activations import INDEX

from .ffn import Conv1DFFN, FusedGatedFFN, GatedFFN, HostFFN, TwoLayerFFN
from .seen import Place
from .text_config import max_positions
from .window_reading import WindowReading


@dataclass(frozen=True)
class HostFamily:
    """Names inside a decoder layer and its config; the defaults are Llama's, which most families follow."""

    layers: str = "layers"  # inside the decoder
    ffn: str | None = "mlp"  # inside a layer; None: the projections are the layer's own
    kind: Callable[[nn.Module, str], HostFFN] = GatedFFN
    activation_key: str = "hidden_act"  # in the config
    activation_name: str = "act_fn"  # in the FFN's module
    width_key: str = "intermediate_size"


_LLAMA = HostFamily()
_GEMMA = HostFamily(activation_key="hidden_activation")
_PHI3 = HostFamily(kind=FusedGatedFFN, activation_name="activation_fn")

HOSTS: dict[str, HostFamily] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": _PHI3,
    "gpt2": HostFamily(
        layers="h",
        kind=partial(Conv1DFFN, names=("c_fc", "c_proj")),
        activation_key="activation_function",
        activation_name="act",
        width_key="n_inner",
    ),
    "gpt_neox": HostFamily(kind=partial(TwoLayerFFN, names=("dense_h_to_4h", "dense_4h_to_h")), activation_name="act"),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA,
    "opt": HostFamily(
        ffn=None,
        kind=partial(TwoLayerFFN, names=("fc1", "fc2")),
        activation_key="activation_function",
        activation_name="activation_fn",
        width_key="ffn_dim",
    ),
    "phi": HostFamily(kind=partial(TwoLayerFFN, names=("fc1", "fc2")), activation_name="activation_fn"),
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}


@dataclass(frozen=True)
class Host:
    """A causal language model as the memory sees it."""

    model: PreTrainedModel
    family: HostFamily
    ffns: tuple[HostFFN, ...]  # one per decoder layer
    hidden_size: int
    intermediate_size: int
    max_positions: int
    reading: WindowReading = field(default_factory=WindowReading)  # how its windows are read, as far as probed

    @property
    def width_key(self) -> str:
        """The config's name of intermediate_size."""
        return self.family.width_key

    @property
    def vocab_size(self) -> int:
        """As it is now: the embedding may be resized."""
        return self.config.vocab_size

    def decoder(self) -> nn.Module:
        """The module that holds the layers."""
        return _decoder(self.model, self.family)

    def layers(self) -> list[nn.Module]:
        """The decoder's layers as they are now."""
        return _layers(self.decoder(), self.family)

    def ffn_modules(self, decoder: nn.Module) -> list[nn.Module]:
        """The FFN of each layer of the host's decoder as it is now: modules may be swapped."""
        return _ffn_modules(decoder, self.family)

    def ffn_places(self, decoder: nn.Module) -> list[Place]:
        """Where the host keeps what `ffn_modules` returns."""
        layers: Any = decoder._modules[self.family.layers]
        places: list[Place] = [(decoder._modules, self.family.layers), *((layers._modules, key) for key in layers._modules)]
        ffn = self.family.ffn
        return places if ffn is None else places + [(layer._modules, ffn) for layer in layers._modules.values()]

    @property
    def config(self):
        return self.model.config.get_text_config(decoder=True)

    @property
    def is_gated(self) -> bool:
        """Whether the FFNs have a gate projection, for a gated memory to stand beside."""
        return isinstance(self.ffns[0], GatedFFN)

    def read(self, **inputs: Any) -> None:
        """Runs the decoder over `input_ids` for its effects alone: nobody reads logits.

        Through the model where a library has wrapped its forward: what it does around it, such as autocast, belongs to it.
        """
        if "forward" in self.model.__dict__:
            self.model(logits_to_keep=1, **inputs)
        else:
            self.model.base_model(**inputs)

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

    Raises TypeError if it is not a transformers model, ValueError if it has no language-model head, is of a family that
    is not supported, or uses an activation without a kernel; the message says what would work.
    """
    model = _unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is {type(model).__name__}; expected a transformers causal language model, "
            "such as AutoModelForCausalLM.from_pretrained(...) returns"
        )
    _check_reads_text(model)
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
    modules = _ffn_modules(_decoder(model, family), family)
    _check_not_shared(modules)
    ffns = tuple(family.kind(module, activation) for module in modules)
    for ffn, layer in zip(ffns, _layers(_decoder(model, family), family), strict=True):
        ffn.activation_name, ffn.modeling = family.activation_name, type(layer).__module__
    return Host(
        model=model,
        family=family,
        ffns=ffns,
        hidden_size=config.hidden_size,
        # GPT-2's may be None, which means this
        intermediate_size=getattr(config, family.width_key) or 4 * config.hidden_size,
        max_positions=max_positions(model),
    )


def _unwrapped(model: nn.Module) -> nn.Module:
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


def _check_reads_text(model: PreTrainedModel) -> None:
    """ValueError for a model that is not a decoder of text alone."""
    name = f"{type(model).__name__} (model type {model.config.model_type!r})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder and a decoder; expected a decoder-only language model")
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{name} reads {model.main_input_name} and not text alone; expected a language model, such as the one inside it"
        )


def _decoder(model: PreTrainedModel, family: HostFamily) -> nn.Module:
    decoder = model.get_decoder()
    if not hasattr(decoder, family.layers) and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # a language model inside a larger one
    if not isinstance(getattr(decoder, family.layers, None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__}: its decoder, a {type(decoder).__name__}, has no list of {family.layers!r}")
    return decoder


def _layers(decoder: nn.Module, family: HostFamily) -> list[nn.Module]:
    return list(decoder._modules[family.layers]._modules.values())  # type: ignore[union-attr,arg-type]


def _ffn_modules(decoder: nn.Module, family: HostFamily) -> list[nn.Module]:
    layers = _layers(decoder, family)
    return layers if family.ffn is None else [layer._modules[family.ffn] for layer in layers]  # type: ignore[misc]


def _check_not_shared(modules: list[nn.Module]) -> None:
    first: dict[int, int] = {}
    for layer, module in enumerate(modules):
        if (other := first.setdefault(id(module), layer)) != layer:
            raise ValueError(f"layers {other} and {layer} share one FFN; expected an FFN per layer, for a memory of its own")


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
