"""Tensors in, tensors out: the operations of the memory, and the same in plain torch (`reference`)."""

from . import torch_library  # noqa: F401  (registers the operators)
from .functional import glu_ffn, neuron_importance, sideway_glu, sideway_mlp
from .loss import token_nll
from .slot_updates import adamw_slots_, sgd_slots_, update_slots_, write_slots_

__all__ = [
    "adamw_slots_",
    "glu_ffn",
    "neuron_importance",
    "sgd_slots_",
    "sideway_glu",
    "sideway_mlp",
    "token_nll",
    "update_slots_",
    "write_slots_",
]
