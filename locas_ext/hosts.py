"""Where the FFNs of each supported model family live. A new family is a new row of HOSTS."""

from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from .activations import INDEX
from .kernels import HostWeights


@dataclass(frozen=True)
class HostFamily:
    """Names inside a decoder layer and its config; the defaults are Llama's, which most families follow."""

    ffn: str = "mlp"
    fused: bool = False  # gate and up rows in one gate_up_proj, the gate rows first
    activation_key: str = "hidden_act"


_LLAMA = HostFamily()
_GEMMA = HostFamily(activation_key="hidden_activation")
_PHI3 = HostFamily(fused=True)

HOSTS: dict[str, HostFamily] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": _PHI3,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}


def _only_aligns_devices(linear: nn.Linear) -> bool:
    """Whether its forward is its own behind accelerate's hook of a device_map, which brings the input to the weight.

    The FFN's own hook has then brought the input already, so the weight may be used directly.
    """
    forward, hook = linear.__dict__["forward"], linear.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not (hook.offload or hook.io_same_device)
        and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
        and linear._old_forward == MethodType(nn.Linear.forward, linear)
    )


def linear_obstacle(linear: nn.Module) -> str | None:
    """Why this projection's weight cannot be used directly, or None. Runs on every call, so it is kept short."""
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__module__}.{type(linear).__qualname__}, not a plain Linear"
    if "forward" in linear.__dict__ and not _only_aligns_devices(linear):
        return "has a forward of its own (a hook of another library)"
    if (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
    ):
        return "has hooks"
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    if type(weight) is not nn.Parameter:
        return f"holds a {type(weight).__name__}, not a plain Parameter"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "requires a gradient"
    if weight.is_meta:
        return "is on the meta device"
    return None


def projection_device(projection: nn.Module) -> torch.device | None:
    """Where a projection is computed: where its weights lie, or where accelerate's hook brings them.

    None if it has no tensors, or if its hook is not one that says. ValueError for weights that are not loaded.
    """
    for module in projection.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if not tensor.is_meta:
                return tensor.device
            if not hasattr(module, "_hf_hook"):
                raise ValueError("the host is on the meta device and has no weights yet; load them first")
            device = getattr(module._hf_hook, "execution_device", None)
            return None if device is None else torch.device(device)
    return None


@torch.no_grad()
def dense_weight(linear: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] of any linear module, in `like`'s dtype where it has to be computed.

    A quantized, LoRA-wrapped or offloaded projection is asked what it does to the unit vectors, which is its weight.
    """
    weight = linear._parameters.get("weight")
    if type(linear) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta:
        return weight
    if not hasattr(linear, "in_features"):
        raise ValueError(f"{type(linear).__name__} has no in_features, so its weight cannot be read")
    training = [module for module in linear.modules() if module.training]
    linear.eval()  # LoRA's dropout off
    try:
        zero = linear(like.new_zeros(1, linear.in_features))
        block = 1024
        columns = [
            linear(torch.eye(min(block, linear.in_features - start), linear.in_features,
                             dtype=like.dtype, device=like.device).roll(start, dims=1)) - zero
            for start in range(0, linear.in_features, block)
        ]
    finally:
        for module in training:
            module.training = True
    return torch.cat(columns).T.contiguous()


# A projection's new parameters: (the Linear, "weight" or "bias", the parameter).
Packed = list[tuple[nn.Linear, str, nn.Parameter]]


class HostFFN:
    """One layer's FFN with separate gate, up and down projections.

    Weights are looked up at every call: `.to()`, a loaded state dict or a swapped projection take effect at once.
    """

    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, module: nn.Module, activation: str):
        self.module = module
        self.activation = activation

    def projections(self) -> list[nn.Module]:
        modules = self.module._modules
        return [modules[name] for name in self.names]

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

    def pre_activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gate and up [..., m] from the projections as they are, whatever they are."""
        gate, up, _ = self.projections()
        return gate(x), up(x)

    def dense_gate_up(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_gate and W_up [m, d]; computed where the projections are not plain."""
        gate, up, _ = self.projections()
        return dense_weight(gate, like), dense_weight(up, like)

    def dense_down(self, like: torch.Tensor) -> torch.Tensor:
        """W_down [d, m]."""
        return dense_weight(self.projections()[-1], like)

    def pack(self, weights: HostWeights) -> Packed:
        """Parameters for the projections that hold these weights, not yet put in."""
        gate, up, down = self.projections()
        named = [(gate, "weight", weights.gate), (up, "weight", weights.up), (down, "weight", weights.down),
                 (gate, "bias", weights.gate_bias), (up, "bias", weights.up_bias), (down, "bias", weights.down_bias)]
        return [(linear, name, _parameter(tensor, linear)) for linear, name, tensor in named if tensor is not None]


class FusedFFN(HostFFN):
    """One layer's FFN with gate and up rows in one projection, the gate rows first (Phi-3, GLM-4)."""

    names = ("gate_up_proj", "down_proj")

    def weights(self) -> HostWeights:
        gate_up, down = (projection._parameters for projection in self.projections())
        gate, up = gate_up["weight"].chunk(2)
        gate_bias, up_bias = (None, None) if gate_up["bias"] is None else gate_up["bias"].chunk(2)
        return HostWeights(gate, up, down["weight"], gate_bias, up_bias, down["bias"])

    def pre_activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.projections()[0](x).chunk(2, dim=-1)

    def dense_gate_up(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dense_weight(self.projections()[0], like).chunk(2)

    def pack(self, weights: HostWeights) -> Packed:
        gate_up, down = self.projections()
        packed = [(gate_up, "weight", _parameter(torch.cat([weights.gate, weights.up]), gate_up)),
                  (down, "weight", _parameter(weights.down, down))]
        if weights.gate_bias is not None:
            packed.append((gate_up, "bias", _parameter(torch.cat([weights.gate_bias, weights.up_bias]), gate_up)))
        if weights.down_bias is not None:
            packed.append((down, "bias", _parameter(weights.down_bias, down)))
        return packed


def _parameter(tensor: torch.Tensor, linear: nn.Linear) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=linear.weight.requires_grad)


@dataclass(frozen=True)
class Host:
    """A causal language model as the memory sees it."""

    model: PreTrainedModel
    ffns: tuple[HostFFN, ...]  # one a decoder layer
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int

    @property
    def config(self):
        return self.model.config.get_text_config(decoder=True)

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
    kind = FusedFFN if family.fused else HostFFN
    ffns = tuple(kind(getattr(layer, family.ffn), activation) for layer in model.get_decoder().layers)
    return Host(
        model=model,
        ffns=ffns,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


_SPARSE = "its FFN silences all but the strongest neurons of a token, so more neurons would change the host's own"
_NO_GATE = "its FFN has no gate projection for a gated memory to stand beside"
_REFUSED = {
    "gemma3n_text": _SPARSE,
    **dict.fromkeys(("bloom", "falcon", "gpt2", "gpt_neox", "mpt", "opt", "phi"), _NO_GATE),
}


def _why_not(config) -> str:
    supported = f"supported model types are {', '.join(HOSTS)}"
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in experts):
        return f"a mixture of experts has an FFN per expert and no single one to widen; {supported}"
    if config.model_type in _REFUSED:
        return f"{_REFUSED[config.model_type]}; {supported}"
    return f"where its FFN lives is not known here; {supported}"


def value_norm_mean(down_weight: torch.Tensor) -> float:
    """Mean L2 norm of the host's value rows, that is of the columns of W_down [d, m], in float32 or better."""
    dtype = torch.promote_types(down_weight.dtype, torch.float32)
    squares = down_weight.new_zeros(down_weight.shape[1], dtype=dtype)
    # Blocks of rows in one small buffer, which stay in the cache; vector_norm(dim=0) takes ten times as long.
    buffer = down_weight.new_empty(min(128, len(down_weight)), down_weight.shape[1], dtype=dtype)
    for rows in down_weight.detach().split(len(buffer)):
        squares += buffer[: len(rows)].copy_(rows).square_().sum(0)
    return squares.sqrt().mean().item()
