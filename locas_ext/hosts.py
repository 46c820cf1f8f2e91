"""Where the FFNs of each supported model family live. A new family is a new row of HOSTS."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .activations import INDEX
from .kernels import HostWeights


@dataclass(frozen=True)
class HostFamily:
    """Names inside a decoder layer and its config; the defaults are Llama's, which most families follow."""

    ffn: str = "mlp"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"
    activation_key: str = "hidden_act"
    width_key: str = "intermediate_size"


HOSTS: dict[str, HostFamily] = {
    "llama": HostFamily(),
    "mistral": HostFamily(),
    "qwen2": HostFamily(),
    "qwen3": HostFamily(),
}


def linear_obstacle(linear: nn.Module) -> str | None:
    """Why this projection's weight cannot be used directly, or None. Runs on every call, so it is kept short."""
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a plain Linear"
    if "forward" in linear.__dict__:
        return "has a forward of its own (a hook of another library)"
    if (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
    ):
        return "has hooks"
    for parameter in linear._parameters.values():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"holds a {type(parameter).__name__}, not a plain Parameter"
        if parameter.requires_grad:
            return "requires a gradient"
        if parameter.is_meta:
            return "is on the meta device"
    return None


class HostFFN:
    """One layer's FFN with separate gate, up and down projections.

    Weights are looked up at every call: `.to()`, a loaded state dict or a swapped projection take effect at once.
    """

    def __init__(self, module: nn.Module, family: HostFamily, activation: str):
        self.module = module
        self.names = (family.gate_proj, family.up_proj, family.down_proj)
        self.activation = activation

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        modules = self.module._modules
        gate, up, down = self.names
        return modules[gate], modules[up], modules[down]

    def obstacle(self) -> str | None:
        """Why the whole FFN cannot run as one op, or None."""
        for name, projection in zip(self.names, self.projections()):
            if problem := linear_obstacle(projection):
                return f"{name} {problem}"
        return None

    def weights(self) -> HostWeights:
        """The host's own tensors, not copies; meaningful where obstacle() is None."""
        gate, up, down = (projection._parameters for projection in self.projections())
        return HostWeights(
            gate["weight"], up["weight"], down["weight"], gate["bias"], up["bias"], down["bias"]
        )


@dataclass(frozen=True)
class Host:
    """A causal language model as the memory sees it."""

    model: PreTrainedModel
    family: HostFamily
    ffns: tuple[HostFFN, ...]  # one a decoder layer
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int

    @property
    def config(self):
        return self.model.config.get_text_config(decoder=True)


def inspect_host(model) -> Host:
    """Finds the FFNs of a model.

    Raises TypeError if it is no transformers model, ValueError if it has no language-model head, is of a family that
    is not supported, or uses an activation without a kernel; the message says what would work.
    """
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
    ffns = tuple(HostFFN(getattr(layer, family.ffn), family, activation) for layer in model.get_decoder().layers)
    return Host(
        model=model,
        family=family,
        ffns=ffns,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, family.width_key),
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


def _why_not(config) -> str:
    supported = f"supported model types are {', '.join(HOSTS)}"
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in experts):
        return f"a mixture of experts has an FFN per expert and no single one to widen; {supported}"
    return f"where its FFN lives is not known here; {supported}"


def value_norm_mean(down_weight: torch.Tensor) -> float:
    """Mean L2 norm of the host's value rows, that is of the columns of W_down [d, m], in float32."""
    return torch.linalg.vector_norm(down_weight, dim=0, dtype=torch.float32).mean().item()
