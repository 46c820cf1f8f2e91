"""Hosts: the FFNs of families in a table, and of all others as one forward shows them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from locas_ext.ops.activations import INDEX
from locas_ext.ops.ranks import Ranks

from .discovery.discover import discover
from .ffn import HostFFN, ProjectedFFN, entries
from .gated_ffn import FusedGatedFFN, GatedFFN
from .projections import NO_WEIGHTS
from .seen import Entry
from .sharding import check_not_flattened, own_class
from .split import ranks_of
from .text_config import max_positions
from .two_layer_ffn import Conv1DFFN, TwoLayerFFN
from .window_reading import WindowReading
from .wrappers import unwrapped


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
    """A causal language model as the memory sees it.

    ffns: by decoder layer; one without an FFN of its own is missing
    depth: the number of decoder layers
    decoder_path, layers_path: the names inside the model of the decoder and of its list of layers
    paths: by layer, the names that lead from decoder() to the FFN's module, layer by layer
    width_key: what the config calls the FFNs' width, where the family says so
    intermediate_size: the width of the first FFN, by which memory files know the host
    ranks: the processes that its weights are split among; None: it is whole here
    """

    model: PreTrainedModel
    ffns: dict[int, HostFFN]
    depth: int
    decoder_path: str
    layers_path: str
    paths: dict[int, tuple[str, ...]]
    hidden_size: int
    intermediate_size: int
    max_positions: int
    width_key: str | None = None
    reading: WindowReading = field(default_factory=WindowReading)  # how its windows are read, as far as probed
    ranks: Ranks | None = None

    @property
    def vocab_size(self) -> int:
        """As it is now: the embedding may be resized."""
        return self.config.vocab_size

    @property
    def dtype_name(self) -> str:
        """The dtype that it computes in, such as "bfloat16", as it is now."""
        return str(self.model.dtype).removeprefix("torch.")

    def decoder(self) -> nn.Module:
        """The module that holds the layers."""
        return self.model.get_submodule(self.decoder_path)

    def layers(self) -> list[nn.Module]:
        """The decoder's layers as they are now."""
        return list(self.model.get_submodule(self.layers_path).children())

    def ffn_modules(self, decoder: nn.Module) -> dict[int, nn.Module]:
        """The FFN of each layer of the host's decoder as it is now: modules may be swapped, and layers taken away."""
        found = dict[int, nn.Module]()
        for layer, path in self.paths.items():
            module: Any = decoder
            for name in path:
                module = None if module is None else module._modules.get(name)
            if module is not None:
                found[layer] = module
        return found

    def ffn_places(self, decoder: nn.Module) -> list[Entry]:
        """Where the host keeps what `ffn_modules` returns."""
        places = (place for path in self.paths.values() for place in entries(decoder, ".".join(path)))
        return list({(id(holder), name): (holder, name) for holder, name in places}.values())

    @property
    def config(self):
        return self.model.config.get_text_config(decoder=True)

    def read(self, **inputs: Any) -> None:
        """Runs the decoder over `input_ids` for its effects alone: nobody reads logits.

        Through the model where a library has wrapped its forward or listens to it: what it does around it, such as autocast
        or the gathering of its weights, belongs to it.
        """
        if "forward" in self.model.__dict__ or self.model._forward_pre_hooks:
            self.model(logits_to_keep=1, **inputs)
        else:
            self.model.base_model(**inputs)

    def input_device(self) -> torch.device:
        """Where token ids go: the embedding's device, or the CPU where a hook brings its weight only when needed."""
        weight = self.model.get_input_embeddings().weight
        if weight.is_meta and not any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            raise ValueError(NO_WEIGHTS)
        return torch.device("cpu") if weight.is_meta else weight.device

    def hidden_state_like(self) -> torch.Tensor:
        """An empty tensor with the dtype and device of the hidden states, as the embedding makes them."""
        dtype = self.model.get_input_embeddings().weight.dtype
        if not dtype.is_floating_point:  # packed numbers of an embedding that is quantized
            dtype = self.model.dtype
        return torch.empty(0, dtype=dtype, device=self.input_device())


def inspect_host(model) -> Host:
    """Finds the FFNs of a model: where its family is known to have them, else by one forward.

    Raises TypeError if it is not a transformers model, ValueError if it has no language-model head, no FFN that can be found,
    or an activation without a kernel in a family that is known; the message says what would work.
    """
    model = unwrapped(model)
    check_not_flattened(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is {type(model).__name__}; expected a transformers causal language model, "
            "such as AutoModelForCausalLM.from_pretrained(...) returns"
        )
    _check_reads_text(model)
    family = HOSTS.get(model.config.get_text_config(decoder=True).model_type)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head, so it cannot be trained on text; "
            "load it with AutoModelForCausalLM"
        )
    ranks = ranks_of(model)
    host = _discovered(model) if family is None else _known(model, family)
    return host if ranks is None else _split(host, ranks)


def _split(host: Host, ranks: Ranks) -> Host:
    """The host as split among processes. ValueError for FFNs in which no memory can be split."""
    for ffn in host.ffns.values():
        if not isinstance(ffn, ProjectedFFN):
            raise ValueError(
                f"{type(host.model).__name__} has FFNs of the layout {ffn.layout!r} and is split among {ranks.size} processes "
                "(tp_plan), where a memory can only stand in FFNs of projections; load the model without tp_plan, such as with "
                "device_map"
            )
        ffn.ranks = ranks
    if not ranks.same([(layer, type(ffn).__name__, ffn.names, ffn.place.name) for layer, ffn in host.ffns.items()]):
        raise ValueError(
            f"{type(host.model).__name__} is split among {ranks.size} processes (tp_plan), which have found different FFNs in "
            "it; load the model without tp_plan"
        )
    host.reading.ranks = ranks
    return replace(host, ranks=ranks)


def _known(model: PreTrainedModel, family: HostFamily) -> Host:
    """A host of a family in the table."""
    config = model.config.get_text_config(decoder=True)
    activation = getattr(config, family.activation_key)
    if activation not in INDEX:
        raise ValueError(f"the host's activation {activation!r} has no kernel; supported: {', '.join(INDEX)}")
    decoder = _decoder(model, family)
    layers: dict[str, Any] = dict(decoder._modules[family.layers]._modules)  # type: ignore[union-attr]
    modules = list(layers.values()) if family.ffn is None else [layer._modules[family.ffn] for layer in layers.values()]
    _check_not_shared(modules)
    ffns = tuple(family.kind(module, activation) for module in modules)
    for ffn, layer in zip(ffns, layers.values(), strict=True):
        ffn.activation_name, ffn.modeling = family.activation_name, own_class(layer).__module__
    inner = () if family.ffn is None else (family.ffn,)
    decoder_path = _name_of(model, decoder)
    return Host(
        model=model,
        ffns=dict(enumerate(ffns)),
        depth=len(ffns),
        decoder_path=decoder_path,
        layers_path=f"{decoder_path}.{family.layers}".removeprefix("."),
        paths={layer: (family.layers, name, *inner) for layer, name in enumerate(layers)},
        hidden_size=config.hidden_size,
        # GPT-2's may be None, which means this
        intermediate_size=getattr(config, family.width_key) or 4 * config.hidden_size,
        max_positions=max_positions(model),
        width_key=family.width_key,
    )


def _discovered(model: PreTrainedModel) -> Host:
    """A host whose FFNs one forward shows."""
    found = discover(model)
    decoder = _caller_of(model, found.layers)
    inside = f"{decoder}." if decoder else ""
    names = list(model.get_submodule(found.layers)._modules)
    paths = {}
    for layer, name in found.names.items():
        path = f"{found.layers}.{names[layer]}" + (f".{name}" if name else "")
        paths[layer] = tuple(path.removeprefix(inside).split("."))
    return Host(
        model=model,
        ffns=found.ffns,
        depth=found.depth,
        decoder_path=decoder,
        layers_path=found.layers,
        paths=paths,
        hidden_size=found.hidden_size,
        intermediate_size=next(iter(found.ffns.values())).width or found.hidden_size,
        max_positions=max_positions(model),
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _caller_of(model: Any, layers: str) -> str:
    """The name of the decoder that every forward goes through, whose list of layers has this name inside the model."""
    for decoder in (model.get_decoder(), model.base_model):
        if isinstance(decoder, nn.Module) and decoder is not model:
            name = _name_of(model, decoder)
            if layers.startswith(f"{name}."):
                return name
    return layers.rpartition(".")[0]


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


def _check_not_shared(modules: list[nn.Module]) -> None:
    first: dict[int, int] = {}
    for layer, module in enumerate(modules):
        if (other := first.setdefault(id(module), layer)) != layer:
            raise ValueError(f"layers {other} and {layer} share one FFN; expected an FFN per layer, for a memory of its own")
