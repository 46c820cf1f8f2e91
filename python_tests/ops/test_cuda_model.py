"""The whole memory on a GPU: a model that memorizes, an offloaded cache, a host on two GPUs."""

import pytest
import torch
import transformers
from support.fused import on_gpu
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import locas_ext as locas

pytestmark = on_gpu


def qwen3(layers):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_memorizes_on_the_gpu(dtype):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = Qwen3ForCausalLM(config).to("cuda", dtype).eval()
    ids = torch.randint(0, 128, (40,)).repeat(20)
    before = model(ids[None, :64].cuda()).logits
    memory = locas.attach(model, locas.LocasConfig(rank=16, scale=0.5))
    assert torch.equal(model(ids[None, :64].cuda()).logits, before)
    report = memory.memorize(ids, window=64, stride=32, learning_rate=2e-2, progress=False)
    assert report.tokens == len(ids) - 1
    assert report.chunks[-1].nll / report.chunks[-1].tokens < report.chunks[0].nll / report.chunks[0].tokens
    with torch.no_grad():
        attached = model(ids[None, :64].cuda()).logits
        model.to("cpu")
        moved = model(ids[None, :64]).logits
    torch.testing.assert_close(
        moved.float(),
        attached.cpu().float(),
        rtol=0.1 if dtype == torch.bfloat16 else 1e-3,
        atol=0.1 if dtype == torch.bfloat16 else 1e-3,
    )
    memory.detach()
    assert torch.equal(model.to("cuda")(ids[None, :64].cuda()).logits, before)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="earlier ones may fetch a layer's keys before they have been put away",
)
def test_a_cache_that_is_kept_on_the_cpu():
    model = qwen3(layers=3).cuda()
    memory = locas.attach(model, locas.LocasConfig(rank=16, scale=0.5))
    ids = torch.randint(0, 128, (40,)).repeat(5)
    memory.memorize(ids, window=64, stride=32, learning_rate=2e-2, progress=False)
    tokens, cache = ids[None, :40].cuda(), DynamicCache(config=model.config, offloading=True)
    with torch.no_grad():
        expected = model(tokens).logits
        read = [model(part, past_key_values=cache).logits for part in (tokens[:, :32], *tokens[:, 32:].split(1, 1))]
    torch.testing.assert_close(torch.cat(read, 1), expected, rtol=1e-3, atol=1e-3)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, cache_implementation="offloaded")
    assert generated.shape == (1, 44)


# The host of test_a_host_on_two_gpus: half of its layers on each.
PLACES = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 0,
    "model.layers.2": 1,
    "model.layers.3": 1,
    "model.norm": 1,
    "lm_head": 1,
}
RUN = dict(window=64, stride=32, learning_rate=2e-2, progress=False)


def logits_on_gpu_0(model, prompt):
    with torch.no_grad():
        return model(prompt, use_cache=False).logits.to("cuda:0")


def assert_it_learns_on_both(memory, ids):
    assert [entry.device for entry in memory.status()] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert all(entry.backend.endswith(", whole") for entry in memory.status())
    assert [parameter.device.index for parameter in memory.parameters()] == [0, 0, 1, 1]
    report = memory.memorize(ids, **RUN)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens
    assert [arena.step.item() for arena in memory.state.arenas] == [10, 10] and memory.version == 10


def assert_the_file_moves_to_one_device_and_back(memory, single, folder, prompt, learned, tolerance):
    """Bit for bit; leaves folder/spread and folder/single."""
    memory.save_pretrained(folder / "spread", optimizer=True)
    other = locas.load(single, folder / "spread")
    assert len(other.state.arenas) == 1 and torch.equal(other.slots, memory.gather_slots())
    torch.testing.assert_close(logits_on_gpu_0(single, prompt), learned, **tolerance)
    other.save_pretrained(folder / "single", optimizer=True)
    name = "locas_memory.safetensors"
    assert (folder / "spread" / name).read_bytes() == (folder / "single" / name).read_bytes()


def assert_a_run_goes_on_where_it_stopped(memory, ids, folder, logits, learned):
    """Bit for bit, and so does a snapshot."""
    kept = memory.snapshot()
    memory.memorize(ids, **RUN, resume=folder / "spread")
    whole = memory.gather_slots()
    memory.restore(kept)
    assert torch.equal(logits(), learned)
    memory.memorize(ids, **RUN, resume=folder / "single")
    assert torch.equal(memory.gather_slots(), whole)


def assert_a_cache_from_before_an_update_is_refused(model, memory, prompt):
    generated = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert generated.sequences.shape == (1, 40)
    optimizer = locas.SlotAdamW(memory, lr=1e-2)
    model(prompt, labels=prompt).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="before the memory changed"):
        model.generate(input_ids=generated.sequences, past_key_values=generated.past_key_values, max_new_tokens=1)


def assert_it_is_merged_where_it_lies(model, folder, logits, alone, learned, tolerance):
    """device_map's hooks only move inputs, so the projections are widened on their own devices."""
    memory = locas.load(model, folder / "spread")
    locas.unmerge(memory.merge_and_unload())
    assert torch.equal(logits(), alone)
    merged = locas.load(model, folder / "spread").merge_and_unload()
    torch.testing.assert_close(logits(merged), learned, **tolerance)
    assert {layer.mlp.down_proj.weight.device.index for layer in merged.model.layers} == {0, 1}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_host_on_two_gpus(dtype, tmp_path):
    """Half of the layers on each: one arena a device, the file as from one device, everything else as ever."""
    accelerate = pytest.importorskip("accelerate")
    spread, single = accelerate.dispatch_model(qwen3(layers=4).to(dtype), PLACES), qwen3(layers=4).to("cuda:0", dtype)
    ids = torch.randint(0, 128, (40,)).repeat(12)
    prompt = ids[None, :32].to("cuda:0")
    logits = lambda model=spread: logits_on_gpu_0(model, prompt)
    tolerance = dict(rtol=1e-3, atol=1e-3) if dtype == torch.float32 else dict(rtol=0.1, atol=0.1)
    alone = logits()
    memory = locas.attach(spread, locas.LocasConfig(rank=16, scale=0.5))
    assert torch.equal(logits(), alone)
    assert_it_learns_on_both(memory, ids[:320])
    learned = logits()
    with memory.disabled():
        assert torch.equal(logits(), alone)
    assert_the_file_moves_to_one_device_and_back(memory, single, tmp_path, prompt, learned, tolerance)
    assert_a_run_goes_on_where_it_stopped(memory, ids, tmp_path, logits, learned)
    memory.detach()
    assert torch.equal(logits(), alone)
    memory = locas.load(spread, tmp_path / "single")
    assert torch.equal(logits(), learned)
    assert_a_cache_from_before_an_update_is_refused(spread, memory, prompt)
    memory.detach()
    assert torch.equal(logits(), alone)
    assert_it_is_merged_where_it_lies(spread, tmp_path, logits, alone, learned, tolerance)
