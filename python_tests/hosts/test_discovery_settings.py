"""FFNs are found, taught and merged under torch's own settings as without them."""

import contextlib
import copy

import pytest
import torch
from support.found_hosts import FOUND, NOT_MERGED, found_host
from support.helpers import TEXT, logits_of
from support.hosts import LEARN
from support.torch_settings import DEFAULTS

import locas_ext as locas

TORCH = {
    **DEFAULTS,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("family", ["olmo", "apertus", "qwen3_moe"])
def test_torchs_own_settings_change_nothing(family, name):
    model = found_host(family)
    twin = copy.deepcopy(model)
    results = []
    for host, context in ((model, contextlib.nullcontext()), (twin, TORCH[name]())):
        with context:
            memory = locas.attach(host, locas.LocasConfig(rank=4, scale=0.5, variant=FOUND[family][0]))
            memory.memorize(TEXT, **LEARN)
            slots = memory.slots.clone()
            if family not in NOT_MERGED:
                memory.merge_and_unload(pad_to_multiple_of=8)
        results.append((slots, logits_of(host, TEXT)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True)), model.drawn
