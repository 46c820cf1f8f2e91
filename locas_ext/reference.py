"""The operations of `locas_ext.ops` in plain torch: what locas_ext/ops/reference.py defines, under its public name."""

from locas_ext.ops.reference import (
    adamw_slots_,
    glu_ffn,
    neuron_importance,
    sgd_slots_,
    sideway_glu,
    sideway_mlp,
    update_slots_,
    write_slots_,
)

__all__ = [
    "adamw_slots_",
    "glu_ffn",
    "neuron_importance",
    "sgd_slots_",
    "sideway_glu",
    "sideway_mlp",
    "update_slots_",
    "write_slots_",
]
