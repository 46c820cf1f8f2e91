"""A host that transformers has split between two processes: the memory, its files and its refusals are those of one process."""

import copy
import os
import random
import signal
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from support.cuda_graphs import graphs_on_the_cpu
from support.helpers import logits_of, random_ids, tiny_model
from support.interrupting import Stop, stop_after
from support.ranks import RanksFailed, run_ranks
from torch.distributed.tensor import DTensor

import locas_ext as locas
from locas_ext.learning import backprop, captured, graph_step
from locas_ext.learning.host_kernels import split
from locas_ext.ops import ranks as ranks_module
from locas_ext.ops.ranks import Ranks
from locas_ext.state.arena import SlotArena

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None,
    reason="transformers splits hosts over accelerators",
)
LEARN = dict(window=24, stride=8, update=locas.Backprop.paper(learning_rate=2e-2), progress=False)
KEEP = dict(LEARN, context=locas.Keep(sinks=2, refresh_every=None))
RANK = 6
OWN_CONFIG = dict(rank=RANK, clip=1.05, row_length="host")
APART = 5e-3  # AdamW makes a whole step of a gradient near zero, whose sign the order of a split sum may decide


def own_rules():
    """What LEARN says, with rates by kind of row that fade, and steps that depend on the slots of other processes."""
    rates = dict(learning_rate=2e-2, gate_learning_rate=1e-2, value_learning_rate=4e-2, decay_after=3)
    return dict(update=locas.Backprop(optimizer="shampoo", cautious=True, **rates))


def split_host(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument's new name differs between versions
        return transformers.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")


def own_gradients(memory, ids):
    """The slots' gradients in somebody else's loop, layer by layer."""
    loss = memory.model(input_ids=ids[None], labels=ids[None]).loss
    return torch.autograd.grad(loss, memory.parameters())


def one_process(folder, model, ids):
    """What a process alone makes of it: also the files that the split hosts load."""
    memory = locas.attach(model, locas.LocasConfig(rank=RANK))
    memory.initialize(ids[:24])
    result = {"initial": memory.gather_slots(), "scale": memory.scale.clone()}
    memory.reset()
    with pytest.raises(Stop):
        memory.memorize(ids, **LEARN, callback=stop_after(3))
    memory.save_pretrained(folder / "half", optimizer=True)
    report = memory.memorize(ids, **LEARN, resume=folder / "half")
    result |= {"slots": memory.gather_slots(), "nll": [chunk.nll for chunk in report.chunks]}
    result |= {"gradients": own_gradients(memory, ids[:20]), "logits": logits_of(model, ids[:20])}
    memory.save_pretrained(folder / "whole")
    memory.detach()
    memory = locas.attach(model, locas.LocasConfig(**OWN_CONFIG))
    memory.initialize(ids[:24])
    result["own initial"] = memory.gather_slots()
    memory.reset()
    result["own"] = learned(memory, ids, **own_rules())
    result["own states"] = memory.state.tensors()
    memory.detach()
    memory = locas.attach(model, locas.LocasConfig(rank=RANK))
    with pytest.raises(Stop):
        memory.memorize(ids, **KEEP, callback=stop_after(4))
    memory.save_pretrained(folder / "kept half", optimizer=True)
    result["kept"] = learned(memory, ids, resume=folder / "kept half", **KEEP)
    return result


# ---- on each rank -------------------------------------------------------------------------------------------------
def refused(error, words, call):
    """The error says all of these words, and every rank has it."""
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)


def check_refusals_at_attach(model):
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    refused(ValueError, ["rank is 5", "2 processes"], lambda: locas.attach(model, locas.LocasConfig(rank=5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlp = locas.LocasConfig(rank=RANK, variant="mlp")
        refused(ValueError, ["'mlp'", "tp_plan"], lambda: locas.attach(model, mlp))
    refused(ValueError, ["rehome", "tp_plan"], lambda: locas.attach(model, locas.LocasConfig(rank=RANK), rehome=True))
    assert not hasattr(model, "_locas_memory")
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def check_refusals(memory, ids, folder):
    slots = memory.slots.clone()
    refused(ValueError, ["merge_and_unload", "tp_plan"], memory.merge_and_unload)
    refused(ValueError, ["study", "tp_plan"], lambda: memory.study("a text", None))
    mine = ids.roll(dist.get_rank())
    refused(ValueError, ["different texts"], lambda: memory.memorize(mine, **LEARN))
    bad = ids.clone()
    bad[0] = -1 if dist.get_rank() else ids[0]  # only one of them is given a token that there is not
    refused(ValueError, ["input_ids holds token -1"], lambda: memory.memorize(bad, **LEARN))
    refused(FileExistsError, ["something else"], lambda: memory.save_pretrained(folder / "foreign"))
    here = folder / ("half" if dist.get_rank() else "nowhere")  # only one of them finds it
    refused(FileNotFoundError, ["nowhere"], lambda: memory.load(here))
    refused(FileNotFoundError, ["nowhere"], lambda: memory.memorize(ids, **LEARN, resume=here))
    resume = {"resume": folder / "half"} if dist.get_rank() else {}
    refused(ValueError, ["saved runs"], lambda: memory.memorize(ids, **LEARN, **resume))
    assert torch.equal(memory.slots, slots) and sorted(os.listdir(folder / "foreign")) == ["a file"]


def check_that_ranks_agree(memory, ids):
    """What happens on one of them happens on both."""
    memory.memorize(ids, **LEARN)
    before = memory.version
    norm = SlotArena.gradient_norm

    def infinite_on_one(arena):
        return norm(arena) + (torch.inf if dist.get_rank() else 0.0)

    for way in nullcontext, graphs_on_the_cpu:
        with way(), mock.patch.object(SlotArena, "gradient_norm", infinite_on_one):
            refused(locas.LocasError, ["gradient is not finite", "version"], lambda: memory.memorize(ids, **LEARN))
    optimizer = locas.SlotSGD(memory, lr=1e-2)  # somebody else's loop
    memory.model(input_ids=ids[None], labels=ids[None]).loss.backward()
    with mock.patch.object(SlotArena, "gradient_norm", infinite_on_one):
        refused(locas.LocasError, ["gradient is not finite"], optimizer.step)
    optimizer.zero_grad()
    assert memory.version == before

    def press(chunk):
        if dist.get_rank() and chunk.start:
            os.kill(os.getpid(), signal.SIGINT)

    for way in nullcontext, graphs_on_the_cpu:
        with way(), pytest.raises(KeyboardInterrupt):
            memory.memorize(ids, **LEARN, callback=press)
        assert memory.tokens_seen == 3 * LEARN["stride"]  # the step in which it is said is learned too

    for last in False, True:  # behind the last chunk no step says it

        def fail(chunk, last=last):
            if dist.get_rank() and chunk.start and (chunk.end == len(ids) or not last):
                raise Stop

        with pytest.raises(Stop if dist.get_rank() else locas.LocasError, match=None if dist.get_rank() else "rank 1 ended"):
            memory.memorize(ids, **LEARN, callback=fail)
        assert memory.tokens_seen == (len(ids) if last else 3 * LEARN["stride"])
    memory.reset()


@contextmanager
def no_dtensors_in_steps():
    """A step of a memory that has learned something is plain tensors and collectives, as a CUDA graph needs it."""
    real = backprop.gradient

    def gradient(attachment, *arguments):
        if not attachment.state.learned:
            return real(attachment, *arguments)
        with mock.patch.object(DTensor, "from_local", side_effect=AssertionError("a DTensor was made")):
            return real(attachment, *arguments)

    with mock.patch.object(backprop, "gradient", gradient), mock.patch.object(graph_step, "gradient", gradient):
        yield


class WrongMemory:
    """Memory whose sums come out wrong on one of them."""

    made = 0

    def __init__(self, *about):
        WrongMemory.made += 1

    def watch(self, group):
        pass

    def adds_up(self):
        return dist.get_rank() == 0


class FullMemory(WrongMemory):
    """Memory without room for sums on one of them."""

    def adds_up(self):
        if dist.get_rank():
            raise torch.OutOfMemoryError("no room")
        return True


def check_memory_that_cannot_be_shared():
    """Both find the same, and say why their group makes the sums."""
    alone = Ranks(dist.group.WORLD, dist.get_rank(), 2, torch.device("cpu"))
    find = ranks_module.through_memory.__wrapped__
    assert find(alone) == replace(alone, why_not="the processes are on cpu")
    with mock.patch.object(ranks_module, "obstacle", lambda size, device: None):
        assert "cannot be had" in find(alone).why_not  # on the CPU torch has none
        with mock.patch.object(ranks_module, "PeerMemory", WrongMemory):
            assert "came out wrong" in find(alone).why_not
        with mock.patch.object(ranks_module, "PeerMemory", FullMemory):
            assert ("OutOfMemoryError: no room" if alone.rank else "came out wrong") in find(alone).why_not
    made = WrongMemory.made
    with mock.patch.object(ranks_module, "obstacle", lambda size, device: "it is off" if alone.rank else None):
        with mock.patch.object(ranks_module, "PeerMemory", WrongMemory):
            assert find(alone).why_not == ("it is off" if alone.rank else "another process has no memory to show")
    assert WrongMemory.made == made, "who makes some waits for all others to make theirs"


def check_number_of_sums(memory, ids, a_layer, others, **settings):
    """How many a replayed step of L layers makes: two a layer in each of context forward, chunk forward and backward, without
    the last layer of the context and the first of the backward; embeddings, loss and its gradient; what all decide by."""
    sums, after = [], []
    add_up = Ranks.add_up
    with mock.patch.object(Ranks, "add_up", lambda ranks, y: sums.append(y) or add_up(ranks, y)):
        memory.memorize(ids, **settings, on_divergence="ignore", callback=lambda chunk: after.append(len(sums)))
    assert after[4] - after[3] == a_layer * memory.model.config.num_hidden_layers + others


def learned(memory, ids, **others):
    report = memory.memorize(ids, **{**LEARN, **others})
    return {"slots": memory.gather_slots(), "nll": [chunk.nll for chunk in report.chunks], "report": report}


def on_a_rank(path, folder, ids):
    check_memory_that_cannot_be_shared()
    model = split_host(path)
    alone = logits_of(model, ids[:20])
    check_refusals_at_attach(model)
    memory = locas.attach(model, locas.LocasConfig(rank=RANK))
    results = {"path": [status.path for status in memory.status()], "said": repr(memory)}
    memory.initialize(ids[:24])
    results |= {"initial": memory.gather_slots(), "scale": memory.scale.clone(), "part": memory.slots.clone()}
    memory.reset()
    with no_dtensors_in_steps():
        results["learned"] = learned(memory, ids)
    results["capacity"] = [(status.slots_used, status.capacity) for status in memory.status()]
    results |= {"gradients": own_gradients(memory, ids[:20]), "logits": logits_of(model, ids[:20])}
    check_refusals(memory, ids, folder)
    memory.save_pretrained(folder / "split")
    results["resumed"] = learned(memory, ids, resume=folder / "half")
    memory.reset()
    check_that_ranks_agree(memory, ids)
    with graphs_on_the_cpu(), no_dtensors_in_steps():
        results["replayed"] = learned(memory, ids)
        check_number_of_sums(memory, ids, 6, 1, **LEARN)
    memory.reset()
    with memory.disabled():
        assert torch.equal(logits_of(model, ids[:20]), alone)
    memory.detach()
    assert torch.equal(logits_of(model, ids[:20]), alone)
    memory = locas.load(model, folder / "whole")
    results["loaded"] = memory.gather_slots()
    memory.reset()
    with pytest.raises(Stop):
        memory.memorize(ids, **LEARN, callback=stop_after(3))
    memory.save_pretrained(folder / "split half", optimizer=True)
    memory.reset()
    memory.detach()
    for way in nullcontext, graphs_on_the_cpu:
        memory = locas.attach(model, locas.LocasConfig(**OWN_CONFIG))
        with way():
            results.setdefault("own", []).append(learned(memory, ids, **own_rules()))
        memory.save_pretrained(folder / "split own", optimizer=True)
        before = memory.state.whole("value_gram").clone()
        memory.load(folder / "split own")
        assert torch.equal(memory.state.whole("value_gram"), before)
        memory.detach()
    memory = locas.attach(model, locas.LocasConfig(rank=RANK))
    with graphs_on_the_cpu():
        results["kept"] = learned(memory, ids, **KEEP)
        memory.reset()
        check_number_of_sums(memory, ids, 4, 2, **KEEP)
    memory.reset()
    with pytest.raises(Stop):
        memory.memorize(ids, **KEEP, callback=stop_after(4))
    memory.save_pretrained(folder / "split kept half", optimizer=True)
    results["kept, resumed"] = learned(memory, ids, resume=folder / "kept half", **KEEP)
    memory.detach()
    os.environ["LOCAS_PROBE"] = "0"  # then transformers' own code reads all windows
    results["by the host"] = learned(locas.attach(model, locas.LocasConfig(rank=RANK)), ids)
    return results


# ---- in the test's process ------------------------------------------------------------------------------------------
def apart(slots, expected, initial):
    """How far slots are from the expected ones, as a part of how far those have moved."""
    return ((slots - expected).norm() / (expected - initial).norm()).item()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_split_host_learns_saves_and_resumes_as_one_process_does(tmp_path, family):
    draw = random.Random()
    settings = dict(intermediate_size=draw.randint(17, 80), num_hidden_layers=draw.randint(1, 3), vocab_size=60)
    settings |= {"attention_bias": draw.random() < 0.5, **({"mlp_bias": True} if family == "llama" else {})}
    model = tiny_model(family, seed=draw.randrange(1000), **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    ids = random_ids(draw.randint(50, 70), seed=draw.randrange(1000), vocab=60)
    model.save_pretrained(tmp_path / "host")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a file").touch()
    twin = copy.deepcopy(model)
    alone = one_process(tmp_path, model, ids)
    first, second = run_ranks(on_a_rank, tmp_path / "host", tmp_path, ids)

    assert first["path"] == ["whole"] * len(first["path"])
    assert "x 6 slots x 32 in 2 parts" in first["said"] and first["capacity"][0] == (RANK, RANK)
    assert torch.equal(torch.cat([first["part"], second["part"]], 2), alone["initial"])
    for rank in (first, second):
        assert torch.equal(rank["initial"], alone["initial"]) and torch.equal(rank["scale"], alone["scale"])
        assert torch.equal(rank["loaded"], alone["slots"])
        torch.testing.assert_close(rank["logits"], alone["logits"], rtol=1e-4, atol=1e-4)
        for run in ("learned", "resumed", "replayed", "by the host"):
            assert apart(rank[run]["slots"], alone["slots"], alone["initial"]) < APART, run
            assert rank[run]["nll"] == pytest.approx(alone["nll"], rel=1e-5) and rank[run]["nll"] == first[run]["nll"]
        assert rank["replayed"]["report"].graph.replayed > 1 and rank["own"][1]["report"].graph.replayed > 1
        for own in rank["own"]:
            assert apart(own["slots"], alone["own"]["slots"], alone["own initial"]) < APART
        for run in ("kept", "kept, resumed"):
            assert apart(rank[run]["slots"], alone["kept"]["slots"], alone["initial"]) < APART, run
        ours = [rank[run]["report"].host_kernels.ours for run in ("learned", "by the host")]
        assert "attention" in ours[0] and "loss" in ours[0] and not ours[1]
        assert rank["learned"]["report"].host_kernels.own == {"sums": "the processes are on cpu"}
    for mine, other, expected in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close(torch.cat([mine, other], 1), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    whole = locas.load(twin, tmp_path / "split")
    assert torch.equal(whole.gather_slots(), first["learned"]["slots"])
    report = whole.memorize(ids, **LEARN, resume=tmp_path / "split half")
    assert apart(whole.gather_slots(), alone["slots"], alone["initial"]) < APART
    assert [chunk.nll for chunk in report.chunks] == pytest.approx(alone["nll"], rel=1e-5)
    whole.memorize(ids, **KEEP, resume=tmp_path / "split kept half")
    assert apart(whole.gather_slots(), alone["kept"]["slots"], alone["initial"]) < APART
    whole.detach()
    tensors = locas.load(twin, tmp_path / "split own").state.tensors()
    assert tensors.keys() == alone["own states"].keys()
    assert apart(tensors["value_gram"], alone["own states"]["value_gram"], 0) < APART


def beside_on_a_rank(path, ids):
    memory = locas.attach(split_host(path), locas.LocasConfig(rank=RANK))
    memory.initialize(ids[:24])
    initial = memory.gather_slots()
    return [status.path for status in memory.status()], initial, learned(memory, ids)["slots"]


def test_where_a_layout_cannot_be_split_by_its_neurons_the_memory_stands_beside(tmp_path):
    settings = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.Phi3Config(**settings, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64)
    model = transformers.Phi3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "host")
    ids = random_ids(50, vocab=60)
    memory = locas.attach(model, locas.LocasConfig(rank=RANK))
    memory.initialize(ids[:24])
    initial = memory.gather_slots()
    expected = learned(memory, ids)["slots"]
    for path, begun, slots in run_ranks(beside_on_a_rank, tmp_path / "host", ids):
        assert path == ["sideway"] * 2 and torch.equal(begun, initial)
        assert apart(slots, expected, initial) < APART


@contextmanager
def one_fails_in_a_product():
    linear = torch.nn.functional.linear

    def fail(*arguments):
        if dist.get_rank():
            raise Stop("no room")
        return linear(*arguments)

    with mock.patch.object(split.F, "linear", fail):
        yield


@contextmanager
def one_is_full_in_a_rehearsal():
    def rehearse(work, device):
        if dist.get_rank():
            raise torch.OutOfMemoryError("no room")
        work()

    with graphs_on_the_cpu(), mock.patch.object(captured, "rehearse", rehearse):
        yield


def fails_on_one(path, ids, way):
    """One of them fails in its part of a step, while the other waits for it in a sum."""
    memory = locas.attach(split_host(path), locas.LocasConfig(rank=RANK))
    memory.memorize(ids, **LEARN)
    slots = memory.slots.clone()
    try:
        with way():
            memory.memorize(ids, **LEARN)
    finally:
        assert way is one_is_full_in_a_rehearsal or torch.equal(memory.slots, slots)


@pytest.mark.parametrize("way", [one_fails_in_a_product, one_is_full_in_a_rehearsal])
def test_a_process_that_fails_in_a_step_ends_the_others(tmp_path, way):
    tiny_model("llama", vocab_size=60).save_pretrained(tmp_path / "host")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fails_on_one, tmp_path / "host", random_ids(40, vocab=60), way)
    first, second = str(failed.value).split("---- rank 1 ----")
    error = "Stop: no room" if way is one_fails_in_a_product else "OutOfMemoryError: no room"
    assert f"LocasError: rank 1 failed in the middle of the run: {error}" in first
    assert error in second and "LocasError" not in second
