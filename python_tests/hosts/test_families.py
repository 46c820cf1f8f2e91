"""Every supported host family through its real transformers class: the whole life of a memory."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from support.helpers import TEXT, assert_same_host, logits_of, random_ids, snapshot
from support.hosts import HOST_SETTINGS, LEARN, TWO_LAYER, config_for, tiny

import locas_ext as locas
from locas_ext.hosts.registry import HOSTS


def width_of(model):
    return getattr(model.config, HOSTS[model.config.model_type].width_key)


def test_every_family_of_the_table_is_tested():
    assert set(HOST_SETTINGS) == set(HOSTS)


@pytest.mark.parametrize("family", sorted(HOST_SETTINGS))
def test_the_life_of_a_memory(family, tmp_path):
    model = tiny(family)
    before, ids = snapshot(model), TEXT
    host = logits_of(model, ids)

    memory = locas.attach(model, config_for(family))
    assert torch.equal(logits_of(model, ids), host)
    assert list(model.state_dict()) == list(before["state"])
    memory.initialize(ids[:16])
    assert torch.equal(logits_of(model, ids), host)

    report = memory.memorize(ids.repeat(3), **LEARN)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens
    assert all(entry.backend.endswith(", sideway" if family in TWO_LAYER else ", whole") for entry in memory.status())
    learned = logits_of(model, ids)
    assert not torch.allclose(learned, host)
    with memory.disabled():
        assert torch.equal(logits_of(model, ids), host)

    memory.save_pretrained(tmp_path / "memory")
    memory.detach()
    assert torch.equal(logits_of(model, ids), host)
    assert_same_host(model, before)

    memory = locas.load(model, tmp_path / "memory")
    assert torch.equal(logits_of(model, ids), learned)

    merged = memory.merge_and_unload(pad_to_multiple_of=16)
    assert merged is model and width_of(merged) == 64
    torch.testing.assert_close(logits_of(merged, ids), learned, rtol=1e-5, atol=1e-5 * learned.abs().max().item())
    merged.save_pretrained(tmp_path / "merged")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert locas.unmerge(reloaded) is reloaded
    assert torch.equal(logits_of(reloaded, ids), host)
    locas.unmerge(model)
    assert_same_host(model, before, ("state", "requires_grad", "training", "attributes"))
    assert width_of(model) == 48


FRESH_PROCESS = """
import sys
sys.modules["locas_ext"] = None  # cannot be imported
import pathlib, torch, transformers
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), folder.name
    print(folder.name)
"""


def test_merged_checkpoints_of_all_families_need_no_locas_ext(tmp_path):
    for family in HOST_SETTINGS:
        model = tiny(family)
        memory = locas.attach(model, config_for(family))
        memory.memorize(TEXT, **LEARN)
        attached = logits_of(model, TEXT)
        memory.merge_and_unload(pad_to_multiple_of=16).save_pretrained(tmp_path / family)
        torch.save((TEXT, attached), tmp_path / family / "expected.pt")
    run = subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == sorted(HOST_SETTINGS)


@pytest.mark.parametrize("family", sorted(set(HOST_SETTINGS) - set(TWO_LAYER)))
def test_the_fused_ffn_is_the_host_plus_the_memory(family):
    model = tiny(family)
    memory = locas.attach(model, config_for(family))
    memory.memorize(TEXT, **LEARN)
    ffn = memory._attachment.ffns[0]
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        from locas_ext import reference

        expected = ffn.original(x) + reference.sideway_glu(x, memory.slots[0], memory.scale[0].item(), ffn.activation)
        torch.testing.assert_close(ffn.ffn.module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_deep_copy_learns_on_its_own(family):
    model = tiny(family)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT, **LEARN)
    twin = copy.deepcopy(model)
    slots = memory.slots.clone()
    locas.memory_of(twin).memorize(TEXT, **LEARN)
    assert torch.equal(memory.slots, slots)
    memory.memorize(TEXT, **LEARN)
    assert torch.equal(memory.slots, locas.memory_of(twin).slots)


def test_generate_with_beams_and_left_padding_sees_the_memory():
    model = tiny("qwen3")
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT.repeat(3), **LEARN)
    prompt = random_ids(9)
    padded = torch.cat([torch.zeros(4, dtype=torch.long), prompt])[None]
    mask = (torch.arange(13) >= 4).long()[None]
    alone = model.generate(prompt[None], max_new_tokens=6, do_sample=False, num_beams=2)[0, 9:]
    beside = model.generate(
        padded.repeat(2, 1), attention_mask=mask.repeat(2, 1), max_new_tokens=6, do_sample=False, num_beams=2
    )[:, 13:]
    assert torch.equal(beside[0], alone) and torch.equal(beside[1], alone)


QUANTO = dict(backend="quanto", nbits=4, q_group_size=16, residual_length=64, axis_key=0, axis_value=0)


@pytest.mark.parametrize(
    "family, cache, settings",
    [
        ("llama", "dynamic", None),
        ("llama", "static", None),
        ("llama", "quantized", QUANTO),
        ("gemma2", "dynamic", None),
        ("gemma2", "static", None),  # these have sliding layers
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_generate_with_every_cache_class_gives_the_same_text(family, cache, settings):
    """The offloaded ones need a GPU and are in test_cuda_model.py."""
    if cache == "quantized":
        pytest.importorskip("optimum.quanto")
    model = tiny(family)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5))
    memory.memorize(TEXT, **LEARN)
    prompt = random_ids(20)[None]
    arguments = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(prompt, use_cache=False, **arguments)
    got = model.generate(prompt, cache_implementation=cache, cache_config=settings, return_dict_in_generate=True, **arguments)
    assert torch.equal(got.sequences, expected)
    memory.memorize(TEXT, **LEARN)
    with pytest.raises(ValueError, match="allow_stale_cache"):
        model.generate(got.sequences, past_key_values=got.past_key_values, **arguments)
