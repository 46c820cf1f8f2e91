"""One forward of a host over a few tokens, as discovery reads it: its decoder layers, and what each module computed."""

import math
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from locas_ext.hosts.probe.recording import Call, Recording, record
from locas_ext.hosts.projections import NO_WEIGHTS
from locas_ext.hosts.split import is_split, local

TOKENS = 12  # enough for a router to spread them


def is_linear(module: nn.Module) -> bool:
    """Whether a module acts as a linear layer, whoever wrote it: quantized and LoRA-wrapped ones too."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return isinstance(module, Conv1D) or all(isinstance(size, int) for size in sizes)


def sizes(linear: Any) -> tuple[int, int]:
    """How many numbers go into a linear module and come out."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def sizes_here(linear: Any) -> set[tuple[int, int]]:
    """The same, and of one that is split among processes also the sizes of this process's part."""
    weight = linear._parameters.get("weight")
    return {sizes(linear), tuple(local(weight).shape[::-1])} if is_split(weight) else {sizes(linear)}


def input_of(call: Call) -> Tensor | None:
    """The first floating point tensor among the arguments."""
    values = (*call.args, *call.kwargs.values())
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def output_of(call: Call) -> Tensor | None:
    """The output, or the first tensor of several."""
    if isinstance(call.output, Tensor):
        return call.output
    values = call.output if isinstance(call.output, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def example_text(model: Any) -> Tensor:
    """[1, TOKENS] ids that stand for nothing special."""
    special = {value for name, value in vars(model.config).items() if name.endswith(("token_id", "token_index"))}
    weight = model.get_input_embeddings().weight
    plain = [token for token in range(min(len(weight), 256)) if token not in special] or [0]
    ids = [plain[(7 * i + 3) % len(plain)] for i in range(TOKENS)]
    return torch.tensor([ids], dtype=torch.int64, device="cpu" if weight.is_meta else weight.device)


class Layers:
    """The decoder layers of a model: those that ran, of the outermost list of modules that holds most parameters.

    name: of the list, inside the model; at: by its number there, each layer that ran
    """

    def __init__(self, name: str, at: dict[int, nn.Module], depth: int):
        self.name, self.at, self.depth = name, at, depth


def decoder_layers(model: nn.Module, recording: Recording) -> Layers | None:
    """The decoder's layers in a recorded forward; None if no list of modules ran."""
    best, most, inside = None, 0, set[nn.Module]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or module in inside:
            continue
        inside.update(module.modules())
        children = list(module._modules.values())
        ran = {index: child for index, child in enumerate(children) if child is not None and recording.of(child)}
        size = sum(parameter.numel() for child in ran.values() for parameter in child.parameters())
        if size > most:
            best, most = Layers(name, ran, len(children)), size
    return best


def hidden_size(model: Any, layers: Layers, recording: Recording) -> int | None:
    """The width of the residual stream: the config's where the layers carry several streams side by side."""
    for layer in layers.at.values():
        if (x := input_of(recording.of(layer)[0])) is not None:
            stated = vars(model.config.get_text_config(decoder=True)).get("hidden_size")
            several = isinstance(stated, int) and stated > 0 and x.shape[-1] % stated == 0
            return stated if several else x.shape[-1]
    return None


def outline(layer: nn.Module, recording: Recording) -> tuple:
    """The modules of a layer that ran, in their order, each with its class and the sizes of what it took in and gave."""
    calls = []
    for name, module in layer.named_modules():
        for call in recording.of(module):
            x, y = input_of(call), output_of(call)
            shapes = None if x is None else x.shape, None if y is None else y.shape
            calls.append((recording.order(call), name, type(module), *shapes))
    return tuple(tuple(what) for _, *what in sorted(calls, key=itemgetter(0)))


def _where(model: nn.Module, error: BaseException) -> str:
    """The name of the innermost module whose forward an exception left."""
    names = {module: name for name, module in model.named_modules()}
    traceback, where = error.__traceback__, ""
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        where = names.get(owner, where) if isinstance(owner, nn.Module) else where
        traceback = traceback.tb_next
    return where


def recorded(model: Any) -> Recording:
    """One forward over the example text with every module recorded. ValueError, with the module's name, where it fails."""
    if all(parameter.is_meta for parameter in model.parameters()) and not any(hasattr(m, "_hf_hook") for m in model.modules()):
        raise ValueError(NO_WEIGHTS)
    try:
        return record(model, example_text(model))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = _where(model, error)
        raise ValueError(
            f"the FFNs of a {type(model).__name__} are found by one forward over {TOKENS} tokens, which raised "
            f"{type(error).__name__}{f' in {where}' if where else ''}: {error}"
        ) from error


def here(value: Tensor, rows: int) -> Tensor:
    """What was recorded as [rows, n] on the CPU: discovery compares many small tensors, and a device waits at each."""
    return value.detach().reshape(rows, -1).cpu()


def nearness(value: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest expected number; infinite where they cannot be compared."""
    if value.shape != expected.shape:
        return math.inf
    scale, apart = torch.stack([expected.abs().max(), (value - expected).abs().max()]).tolist()
    return apart / scale if scale > 0 else math.inf


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute one product's input may be apart, as `nearness` says."""
    return 2e-4 if dtype in (torch.float32, torch.float64) else 3e-2
