"""Hosts whose weights FSDP2 (fully_shard) shards over two processes: the memory learns what it learns in one."""

import os
import random
import signal

import pytest
import torch
import torch.distributed as dist
import transformers
from support.helpers import SETTINGS, attached, logits_of, random_ids, relative_distance, tiny_model, tiny_opt
from support.hosts import tiny
from support.ranks import RanksFailed, run_ranks
from support.sharded import assert_same_bits, error_of, shard
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

import locas_ext as locas

CONFIG = {"rank": 4, "scale": "host"}


def experts():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    pool = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads, **pool)).eval()


HOSTS = {
    "llama": tiny_model,
    "phi3": lambda: tiny("phi3"),
    "gpt2": lambda: tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": tiny_opt,
    "olmo3": lambda: tiny("olmo3"),  # found by its numbers
    "experts": experts,
}


def learn_in_step(name, ids, after, how, changes, **own):
    """The same run on a sharded host and on a whole one. own: settings of the memory"""
    alone, host = HOSTS[name](), HOSTS[name]()
    config = locas.LocasConfig("mlp" if name in ("gpt2", "opt") else "glu", **CONFIG, **own)
    expected = locas.attach(alone, config)
    memory = locas.attach(host, config) if after else None
    shard(host, **how)
    if memory is None:
        memory = locas.attach(host, config)
    assert memory.status()[0].path == expected.status()[0].path
    lengths = [m.state.arenas[0].longest for m in (memory, expected)]
    assert lengths == [None, None] or torch.allclose(*lengths)
    settings = {**SETTINGS, "optimizer": "sgd", "learning_rate": 0.1, **changes}
    report, expected_report = (m.memorize(ids, **settings) for m in (memory, expected))
    values, expected_values = memory.slots[:, -1], expected.slots[:, -1]  # which begin at 0
    # AdamW divides by the gradient's size: where that is about 0, its sign is a matter of rounding.
    assert relative_distance(values, expected_values) < (1e-4 if settings["optimizer"] == "sgd" else 1e-2)
    assert abs(report.nll - expected_report.nll) < 1e-4 * expected_report.nll
    assert "fully_shard" in report.host_kernels.own["host"]
    assert_same_bits(memory)
    assert torch.allclose(logits_of(host, ids[:20]), logits_of(alone, ids[:20]), atol=1e-4)
    memory.detach()
    expected.detach()
    assert all(parameter.requires_grad for parameter in host.parameters())
    assert torch.allclose(logits_of(host, ids[:20]), logits_of(alone, ids[:20]), atol=1e-4)


def mixed_precision(ids):
    host = shard(tiny_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    memory = locas.attach(host, locas.LocasConfig(**CONFIG))
    report = memory.memorize(ids, **SETTINGS)
    _, expected = attached(dtype=torch.bfloat16)
    assert abs(report.nll - expected.memorize(ids, **SETTINGS).nll) < 1e-2 * report.nll
    assert memory.status()[0].path == "whole" and memory.state.arenas[0].compute.dtype == torch.bfloat16


def all_hosts(ids):
    learn_in_step("llama", ids, True, {}, {})
    adamw = {"optimizer": None, "learning_rate": None, "update": locas.Backprop.paper(learning_rate=1e-2)}
    learn_in_step("llama", ids, False, {}, {"context_gradient": True, **adamw})
    learn_in_step("phi3", ids, True, {"layers": []}, {})  # the model alone
    learn_in_step(
        "gpt2", ids, False, {"layers": [1], "root": False}, {"update": "write", "learning_rate": None, "optimizer": None}
    )
    learn_in_step("opt", ids, True, {}, {})
    learn_in_step("olmo3", ids, False, {"inside": "mlp"}, {})
    learn_in_step("experts", ids, False, {}, {"context": "keep"}, clip=1.05, row_length="host")
    mixed_precision(ids)


def test_before_and_after_attach_a_sharded_host_learns_as_a_whole_one():
    run_ranks(all_hosts, random_ids(random.randint(40, 64), random.randrange(1000)))


def two_dimensions(ids):
    learn_in_step("llama", ids, False, {"shape": (2, 2)}, {})


def test_a_mesh_of_two_dimensions():
    run_ranks(two_dimensions, random_ids(40, 1), world=4)


def keep_and_refuse(folder, ids):
    rank = dist.get_rank()
    host, memory = attached()
    shard(host)
    memory.memorize(ids, **SETTINGS)
    memory.save_pretrained(f"{folder}/sharded", optimizer=True)
    one = locas.load(tiny_model(), f"{folder}/sharded")
    again = locas.load(shard(tiny_model()), f"{folder}/sharded")
    for other in (one, again):
        assert torch.equal(other.slots, memory.slots) and other.texts[0].digest == memory.texts[0].digest
        other.feed(ids[:9], progress=False)
    assert relative_distance(again.slots, one.slots) < 1e-5
    before = memory.snapshot()
    learned = memory.slots.clone()
    memory.reset()
    memory.restore(before)
    assert torch.equal(memory.slots, learned) and memory.version == before.memory_version
    assert host.generate(ids[None, :4], min_new_tokens=2, max_new_tokens=2, do_sample=False).shape == (1, 6)

    # failure on the rank that writes is an error of all
    if rank == 0:
        (folder / "taken").touch()
    assert error_of(memory.save_pretrained, folder / "taken").startswith("FileExistsError")
    for verb in ("merge_and_unload", "fork"):
        assert "fully_shard" in error_of(getattr(memory, verb))
    assert "fully_shard" in error_of(memory.study, "text", None)
    assert memory.state.version == before.memory_version
    text = error_of(memory.memorize, random_ids(30, rank), **SETTINGS)
    assert text.startswith("ValueError: FSDP2") and "input_ids" in text and "process_group" in text
    text = error_of(memory.memorize, ids, **{**SETTINGS, "stride": 4 + rank})
    assert "stride is 5 on rank 1 and 4 on rank 0" in text
    assert "different texts" in error_of(memory.initialize, random_ids(30, rank))
    text = error_of(locas.attach, shard(tiny_model()), locas.LocasConfig(**CONFIG), rehome=True)
    assert "rehome is True, but FSDP2" in text
    assert "expected FSDP2" in error_of(locas.attach, FullyShardedDataParallel(tiny_model(), device_id=torch.device("cpu")))


def interrupt_a_write(ids):
    """A written memory has no sums between processes: they ask each other after each chunk."""
    memory = locas.attach(shard(HOSTS["opt"]()), locas.LocasConfig("mlp", **CONFIG))

    def press(chunk):
        if dist.get_rank() and chunk.start:
            os.kill(os.getpid(), signal.SIGINT)

    write = {"window": 24, "stride": 8, "progress": False, "update": "write"}
    assert error_of(memory.memorize, ids, **write, callback=press).startswith("KeyboardInterrupt")
    assert memory.tokens_seen == 16
    assert_same_bits(memory)


def test_ctrl_c_in_one_process_ends_a_write_in_all():
    run_ranks(interrupt_a_write, random_ids(45, 1))


def test_saving_loading_and_what_cannot_be(tmp_path):
    run_ranks(keep_and_refuse, tmp_path, random_ids(45, random.randrange(1000)))


def fails_between_forwards(ids):
    """One of them fails while the other runs a forward, for which it waits for weights."""
    host = shard(tiny_model())
    memory = locas.attach(host, locas.LocasConfig(**CONFIG))

    def fail(module, arguments):
        raise MemoryError("no room")

    def callback(chunk):
        if dist.get_rank() and chunk.start:
            host.model.layers[0].register_forward_pre_hook(fail)

    memory.memorize(ids, **SETTINGS, callback=callback)


def test_a_process_that_fails_between_forwards_ends_the_others():
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fails_between_forwards, random_ids(40))
    first, second = str(failed.value).split("---- rank 1 ----")
    assert "LocasError: rank 1 failed in the middle of the run: MemoryError: no room" in first
    assert "MemoryError: no room" in second and "LocasError" not in second
