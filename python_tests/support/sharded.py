"""What the tests of hosts and memories on several ranks share. Called on ranks (support/ranks.py)."""

import hashlib
import warnings

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard(model, layers=None, root=True, inside=None, shape=None, **settings):
    """fully_shard as users apply it: each layer, then the model.

    layers: which; None: all; inside: a module of each layer that is sharded by itself; shape: of the mesh
    """
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.h if hasattr(decoder, "h") else decoder.layers):
        if layers is None or index in layers:
            for module in [layer] if inside is None else [layer.get_submodule(inside), layer]:
                fully_shard(module, mesh=mesh, **settings)
    if root:
        fully_shard(model, mesh=mesh, **settings)
    return model


def everywhere(value):
    """By rank, what each gave."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def assert_same_bits(memory):
    tensors = memory.state.tensors()
    digests = everywhere({name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()})
    assert all(digest == digests[0] for digest in digests), digests


def error_of(function, *arguments, **named):
    """The error that a call raises, as text with its type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*arguments, **named)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{function} raised nothing")
