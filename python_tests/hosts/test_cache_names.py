"""A host's KV cache by the name that the host has for it: transformers has renamed the argument."""

from types import SimpleNamespace

import pytest
import torch
from support.helpers import TEXT
from transformers import DynamicCache, Qwen2ForCausalLM

import locas_ext as locas
from locas_ext.hosts.cache_names import cache_argument, given_cache, returned_cache
from locas_ext.hosts.tiny import tiny_host


class Renamed(Qwen2ForCausalLM):
    """Takes the cache as `cache`, whatever the installed transformers calls it."""

    def forward(self, input_ids=None, cache=None, **named):
        behind = cache_argument(tiny_host(), cache)
        return super().forward(input_ids=input_ids, **behind, **named)


class Old(Qwen2ForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, **named):
        return super().forward(input_ids=input_ids, **cache_argument(tiny_host(), past_key_values), **named)


@pytest.mark.parametrize("kind, name", [(Renamed, "cache"), (Old, "past_key_values")])
@pytest.mark.parametrize("context", ["recompute", "keep"])
def test_a_memory_learns_the_same_whatever_a_cache_is_called(kind, name, context):
    slots = []
    for host in (tiny_host(), tiny_host()):
        if slots:
            host.__class__ = kind
            cache = DynamicCache(config=host.config)
            assert cache_argument(host, cache) == {name: cache} and cache_argument(host, None) == {}
        memory = locas.attach(host, locas.LocasConfig(rank=4))
        memory.memorize(TEXT[:64] % 64, window=32, stride=8, context=context, progress=False)
        slots.append(memory.slots.clone())
    assert torch.equal(*slots) and slots[0].any()


def test_a_cache_is_found_among_arguments_and_in_an_output():
    cache = DynamicCache()
    for name in ("cache", "past_key_values", "layer_past"):
        assert given_cache({"input_ids": 1, name: cache}) is cache
    assert given_cache({"cache": None, "past_key_values": None}) is given_cache({}) is None
    for output in (SimpleNamespace(cache=cache), SimpleNamespace(past_key_values=cache)):
        assert returned_cache(output) is cache
    assert returned_cache(SimpleNamespace(cache=None)) is returned_cache((1, 2)) is None
