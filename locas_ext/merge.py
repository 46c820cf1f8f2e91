"""Making a memory permanent: the host's FFNs become r neurons wider (docs/method.md, "Merging"), and back."""

import torch
from torch import Tensor, nn

from .hosts import Host, inspect_host
from .kernels import HostWeights
from .patch import Attachment
from .slots import GATE, KEY, VALUE

ORIGINAL_WIDTH_KEY = "locas_unmerged_intermediate_size"


def _grown(weight: Tensor | None, rows: Tensor | None, width: int, dim: int) -> Tensor | None:
    """weight with zeros appended along `dim` up to `width`, the first of them taken by `rows`."""
    if weight is None:
        return None
    shape = list(weight.shape)
    old, shape[dim] = shape[dim], width
    grown = weight.new_zeros(shape)
    grown.narrow(dim, 0, old).copy_(weight)
    if rows is not None:
        grown.narrow(dim, old, rows.shape[dim]).copy_(rows)
    return grown


def _resize(host: Host, weights: list[HostWeights], width: int) -> None:
    """Puts new weights in and lets every attribute that states the width follow.

    All parameters are made before the first is put in: what can fail, fails while the model is still whole.
    """
    packed = [ffn.pack(new) for ffn, new in zip(host.ffns, weights)]
    for ffn, parameters in zip(host.ffns, packed):
        for linear, name, parameter in parameters:
            setattr(linear, name, parameter)
        for linear in ffn.projections():
            linear.out_features, linear.in_features = linear.weight.shape
        if hasattr(ffn.module, "intermediate_size"):
            ffn.module.intermediate_size = width
    host.config.intermediate_size = width


@torch.no_grad()
def merge(attachment: Attachment, pad_to_multiple_of: int):
    """See `Memory.merge_and_unload`."""
    if isinstance(pad_to_multiple_of, bool) or not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of!r}; expected an integer >= 1")
    host, state = attachment.host, attachment.state
    state.sync()
    for layer, ffn in enumerate(host.ffns):
        if (obstacle := ffn.obstacle()) is not None:
            raise ValueError(f"cannot merge: layer {layer}'s {obstacle}; use the memory attached instead")
    width = -(-(host.intermediate_size + state.rank) // pad_to_multiple_of) * pad_to_multiple_of
    layer_slots = state.in_layer_order(lambda arena: arena.slots)
    memory_of = dict(zip(state.layers, zip(layer_slots, state.scales)))

    widened = []
    with torch.inference_mode(False):
        for layer, ffn in enumerate(host.ffns):
            old = ffn.weights()
            slots, scale = memory_of.get(layer, ((None, None, None), 0.0))
            columns = None if slots[VALUE] is None else scale * slots[VALUE].T
            widened.append(HostWeights(
                gate=_grown(old.gate, slots[GATE], width, 0),
                up=_grown(old.up, slots[KEY], width, 0),
                down=_grown(old.down, columns, width, 1),
                gate_bias=_grown(old.gate_bias, None, width, 0),
                up_bias=_grown(old.up_bias, None, width, 0),
                down_bias=old.down_bias,
            ))
        old_width = host.intermediate_size
        _resize(host, widened, width)
    if not hasattr(host.config, ORIGINAL_WIDTH_KEY):
        setattr(host.config, ORIGINAL_WIDTH_KEY, old_width)
    return host.model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Slices a merged model back to the host it was, bit for bit; in place, returns the model.

    It works on a merged model in memory or one read back from its checkpoint. Raises ValueError if the model's config
    does not record a merge.
    """
    if (m := getattr(_text_config(model), ORIGINAL_WIDTH_KEY, None)) is None:
        raise ValueError("model is not a merged one: its config does not record the width before a merge")
    if getattr(model, "_locas_memory", None) is not None:
        raise ValueError("model has a memory attached, made for the merged width: detach() it before unmerge")
    host = inspect_host(model)
    with torch.inference_mode(False):
        _resize(host, [_sliced(ffn.weights(), m) for ffn in host.ffns], m)
    delattr(host.config, ORIGINAL_WIDTH_KEY)
    return model


def _sliced(old: HostWeights, m: int) -> HostWeights:
    def rows(tensor):
        return None if tensor is None else tensor[:m].clone()

    return HostWeights(
        rows(old.gate), rows(old.up), old.down[:, :m].clone(memory_format=torch.contiguous_format),
        rows(old.gate_bias), rows(old.up_bias), old.down_bias,
    )


def _text_config(model):
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
