"""Re-homed memories for tests."""

import torch

import locas_ext as locas
from support.helpers import (
    SETTINGS,
    TEXT,
    random_ids,
    tiny_model,
)

IDS = random_ids(20, seed=5)
HOME = "rehomed: host and memory in one matrix"


def reasons(memory):
    return {status.reason for status in memory.status()}


def rehomed(family="llama", rank=5, dtype=torch.float32, model_settings=None):
    model = tiny_model(family, dtype=dtype, **(model_settings or {}))
    return model, locas.attach(model, locas.LocasConfig(rank=rank, scale="host"), rehome=True)


def learned(**arguments):
    model, memory = rehomed(**arguments)
    memory.memorize(TEXT, **SETTINGS)
    return model, memory
