"""One memory learned from several texts at once, one per process: what an oracle in one process learns of all of them."""

import os
import random
import signal
from contextlib import nullcontext

import torch
import torch.distributed as dist
from support.cuda_graphs import graphs_on_the_cpu
from support.helpers import (
    SETTINGS,
    PlainMemory,
    attached,
    chunk_bounds,
    random_ids,
    relative_distance,
    tiny_model,
    window_begin,
)
from support.ranks import run_ranks
from support.sharded import assert_same_bits, error_of, everywhere, shard

import locas_ext as locas
from locas_ext.learning import captured
from locas_ext.learning.chunk import WindowReader

LEARN = {name: SETTINGS[name] for name in ("window", "stride", "progress")}


def backprop(**changes):
    return locas.Backprop(**{"process_group": dist.group.WORLD, "learning_rate": 1e-2, **changes})


def texts_of(*lengths):
    return [random_ids(length, random.randrange(1000)) for length in lengths]


def nll_of(plain, ids, start, end, window):
    """The summed loss of a chunk, whose context is read without a gradient."""
    begin, targets = window_begin(start, end, window), ids[max(start, 1) : end]
    context, inputs = ids[None, begin : end - 1].split([end - 1 - begin - len(targets), len(targets)], dim=1)
    cache = None
    if context.shape[1]:
        with torch.no_grad():
            cache = plain.model(input_ids=context, use_cache=True).past_key_values
    logits = plain.model(input_ids=inputs, past_key_values=cache).logits[0]
    return -logits.log_softmax(-1).gather(1, targets[:, None]).sum(), len(targets)


def memorize_together(plain, texts, window, stride, epochs):
    """In one process: each step's loss is the mean over the tokens of all texts. -> by text, the chunks' losses."""
    bounds, nlls = [chunk_bounds(len(ids), stride) for ids in texts], [[] for _ in texts]
    for step in range(max(map(len, bounds))):
        for epoch in range(epochs):
            losses = []
            for number, ids in enumerate(texts):
                if step < len(bounds[number]):
                    losses.append(nll_of(plain, ids, *bounds[number][step], window))
                    if epoch == 0:
                        nlls[number].append(losses[-1][0].item())
            plain.step(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
    return nlls


def learn_all(texts, beginning, sharded, window, stride, optimizer, rate, epochs):
    rank = dist.get_rank()
    model, memory = attached()
    memory.initialize(beginning)
    plain = PlainMemory(model, memory.slots, memory.scale, optimizer=optimizer, learning_rate=rate)
    if sharded:
        shard(model)
    update = backprop(optimizer=optimizer, learning_rate=rate, epochs=epochs, decay_after=None, cautious=False)
    report = memory.memorize(texts[rank], window=window, stride=stride, progress=False, update=update, title=f"text {rank}")
    nlls = memorize_together(plain, texts, window, stride, epochs)
    assert relative_distance(memory.slots, plain.stacked()) < 1e-4
    for chunks, expected in zip(report.ranks, nlls, strict=True):
        assert torch.allclose(torch.tensor([chunk.nll for chunk in chunks]), torch.tensor(expected), rtol=1e-4)
    assert report.chunks == report.ranks[rank] and report.tokens == len(texts[rank]) - 1
    assert memory.version == epochs * max(map(len, report.ranks))
    assert [(text.title, text.tokens) for text in memory.texts] == [(f"text {r}", len(ids)) for r, ids in enumerate(texts)]
    assert_same_bits(memory)


def oracles(texts, beginning):
    learn_all(texts, beginning, False, 24, 8, "sgd", 0.1, 1)
    learn_all(texts, beginning, False, 24, 8, "adamw", 1e-2, 2)
    learn_all(texts, beginning, True, 24, 8, "sgd", 0.1, 2)
    # A full window has no context here and the shorter last one has: the ranks still run as many forwards.
    learn_all(texts, beginning, True, 9, 9, "sgd", 0.1, 1)


def test_the_gradient_is_the_mean_over_all_tokens_of_all_texts():
    run_ranks(oracles, texts_of(random.randint(45, 63), random.randint(20, 43)), random_ids(30, 5))


def test_three_ranks_whose_texts_end_one_after_the_other():
    texts = texts_of(2, random.randint(20, 43), random.randint(45, 63))
    run_ranks(learn_all, texts, random_ids(30, 5), False, 24, 8, "sgd", 0.1, 1, world=3)


def beginnings(texts):
    rank = dist.get_rank()
    for init in ("topk", "random", "activation", "gaussian"):
        _, memory = attached(init=init)
        memory.memorize(texts[rank], **LEARN, update=backprop(learning_rate=0.0), on_divergence="ignore")
        assert_same_bits(memory)
        if init == "topk":
            gates = memory.slots[:, 0]
    # The neurons that fire most over the first chunks of both texts.
    model = tiny_model()
    for layer, block in enumerate(model.model.layers):
        fires = []
        handle = block.mlp.down_proj.register_forward_pre_hook(lambda module, args, fires=fires: fires.append(args[0]))
        model(torch.stack([ids[:8] for ids in texts]))
        handle.remove()
        chosen = block.mlp.gate_proj.weight[fires[0].abs().mean((0, 1)).topk(4).indices]
        assert torch.allclose(gates[layer], chosen / chosen.norm(dim=-1, keepdim=True), atol=1e-5)


def diverges(texts):
    """On rank 1 the host alone finds its text easy, and the sum of both says that the memory does harm."""
    rank, loss = dist.get_rank(), WindowReader.loss
    for sharded in (False, True):
        _, memory = attached()
        if sharded:
            shard(memory.model)
        easy = {"by": 0.0 if rank else 1.0}
        WindowReader.loss = lambda self, window, memory=memory, easy=easy: (
            loss(self, window) * (easy["by"] if memory.state.disabled else 1.0)
        )
        try:
            report = memory.memorize(texts[rank], **LEARN, update=backprop(), on_divergence="stop")
        finally:
            WindowReader.loss = loss
        assert report.diverged is not None
        facts = everywhere((report.diverged.memory, report.diverged.host, report.diverged.restored_version, memory.version))
        assert facts[0] == facts[1]
        assert_same_bits(memory)


def diverges_to_the_end(texts, sharded, does):
    """The state of chunk 4, which nothing was compared with, is judged when the run is over and has no step any more.

    does: what rank 1 does after the last chunk, which ends the run there once it is over
    """
    loss, rank = WindowReader.loss, dist.get_rank()
    model, memory = attached()
    if sharded:
        shard(model)
    WindowReader.loss = lambda self, window: loss(self, window) * (0.0 if memory.state.disabled and memory.version > 5 else 1.0)

    def callback(chunk):
        if does is not None and rank == 1 and memory.version == 20:
            does(model)

    settings = dict(**LEARN, update=backprop(), on_divergence="warn", callback=callback)
    try:
        if does is not None and rank == 1:
            assert error_of(memory.memorize, texts[rank], **settings) in ("Stop: ", "KeyboardInterrupt: ")
        else:
            report = memory.memorize(texts[rank], **settings)
            assert report.diverged is not None and report.diverged.restored_version == memory.version
    finally:
        WindowReader.loss = loss
    assert memory.version < 5
    assert_same_bits(memory)


def begin(texts, longer):
    beginnings(texts)
    diverges(texts)
    diverges_to_the_end(longer, True, None)
    diverges_to_the_end(longer, False, fails)
    diverges_to_the_end(longer, False, presses_ctrl_c)


def test_it_begins_from_what_all_texts_show_and_a_divergence_is_decided_by_all_together():
    run_ranks(begin, texts_of(61, 43), texts_of(160, 153))


class Stop(Exception):
    pass


def stopped(memory, text, folder, after, saves):
    """A run that ends after so many steps, saved there."""
    steps = []

    def callback(chunk):
        steps.append(chunk)
        if len(steps) == after:
            if saves:
                memory.save_pretrained(folder, optimizer=True)
            raise Stop

    text_of_error = error_of(memory.memorize, text, **LEARN, update=backprop(), callback=callback)
    assert text_of_error.startswith("Stop")
    dist.barrier()


def resumed(texts, folder, writer, sharded):
    rank = dist.get_rank()
    mine, made = texts[rank], (shard if sharded else lambda model: model)
    _, whole = attached()
    made(whole.model)
    whole.memorize(mine, **LEARN, update=backprop())
    _, part = attached()
    made(part.model)
    stopped(part, mine, folder, 3, sharded or rank == writer)
    again = locas.attach(made(tiny_model()), locas.LocasConfig(rank=4, scale="host"))
    report = again.memorize(mine, **LEARN, update=backprop(), resume=folder)
    assert torch.equal(again.slots, whole.slots) and [len(chunks) for chunks in report.ranks] == [
        len(chunk_bounds(len(ids), LEARN["stride"])) for ids in texts
    ]
    assert [text.digest for text in again.texts] == [text.digest for text in whole.texts]
    assert "over another text" in error_of(again.memorize, texts[1 - rank], **LEARN, update=backprop(), resume=folder)
    assert "texts was 2, is 1" in error_of(locas.load(tiny_model(), folder).memorize, mine, **LEARN, resume=folder)
    assert "process_group" in error_of(locas.load(tiny_model(), folder).feed, mine)


def fed(texts):
    mine = texts[dist.get_rank()]
    _, whole = attached()
    whole.memorize(mine, **LEARN, update=backprop())
    _, memory = attached()
    memory.memorize(mine[:16], **LEARN, update=backprop())
    memory.feed(mine[16:], progress=False)
    assert torch.equal(memory.slots, whole.slots)
    assert [text.digest for text in memory.texts] == [text.digest for text in whole.texts]


def resumed_and_fed(texts, folder):
    resumed(texts, folder / "first", 0, False)
    resumed(texts, folder / "second", 1, False)  # whichever rank saves
    resumed(texts, folder / "sharded", 0, True)
    fed(texts)


def test_a_run_is_resumed_and_fed_from_the_file_that_any_rank_wrote(tmp_path):
    run_ranks(resumed_and_fed, texts_of(random.randint(45, 63), random.randint(20, 23)), tmp_path)


def refusals(ids):
    rank, update = dist.get_rank(), backprop()
    said = {}
    _, memory = attached(rank=4 + 4 * rank)
    said["config.rank is 8 on rank 1 and 4 on rank 0"] = error_of(memory.memorize, ids, **LEARN, update=update)
    _, memory = attached()
    said["stride is 5 on rank 1 and 4"] = error_of(memory.memorize, ids, window=8, stride=4 + rank, update=update)
    said["input_ids holds 1 token;"] = error_of(memory.memorize, ids[: 1 + 9 * rank], **LEARN, update=update)
    said["context is 'keep'"] = error_of(memory.memorize, ids, **LEARN, update=update, context="keep")
    said["process_group is str"] = error_of(locas.Backprop, process_group="all")
    if rank:
        memory.initialize(ids)
    said["memory.slots (digest) is"] = error_of(memory.memorize, ids, **LEARN, update=update)
    model, memory = attached()
    if rank:
        model.model.layers[0].mlp.gate_proj.weight.data.mul_(1.5)
    said["the host (digest of samples of its weights) is"] = error_of(memory.memorize, ids, **LEARN, update=update)
    for part, error in said.items():
        assert part in error, (part, error)
    assert memory.version == 0 and not memory.texts


def ends_with(text, does, changes, version, mine, others):
    """What one rank does after its third chunk ends the run on all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, memory = attached()

    def callback(chunk):
        if rank == world - 1 and chunk.start == 16:
            does(model)

    error = error_of(memory.memorize, text, **LEARN, update=backprop(), callback=callback, **changes)
    assert (mine if rank == world - 1 else others) in error, error
    assert memory.version == version
    assert_same_bits(memory)


def fails(model):
    raise Stop


def presses_ctrl_c(model):
    os.kill(os.getpid(), signal.SIGINT)


def breaks(model):
    model.model.norm.weight.data.fill_(float("nan"))


def breaks_a_replay(model):
    replay = captured.Captured.replay

    def fail(self, window):
        captured.Captured.replay = replay
        raise Stop

    captured.Captured.replay = fail


def ends(text):
    refusals(text[:20])
    ends_with(text, fails, {}, 3, "Stop", "LocasError: rank 1 ended the run with an error")
    ends_with(text, presses_ctrl_c, {}, 4, "KeyboardInterrupt", "LocasError: rank 1 ended the run here (Ctrl-C)")
    ends_with(text, breaks, {}, 3, "the loss is nan at chunk 3", "the loss is nan at chunk 3 (tokens 24 to 31) on rank 1")


def test_ranks_are_told_what_differs_and_what_ends_a_run_on_one_ends_it_on_all():
    run_ranks(ends, random_ids(60, 1))


def replayed(texts):
    """With a stand-in for CUDA graphs, which does the captured work again at each replay (test_cuda_graph.py)."""
    rank, memories = dist.get_rank(), []
    for way in nullcontext, graphs_on_the_cpu:
        _, memory = attached(clip=1.05, row_length="host")
        with way():
            report = memory.memorize(texts[rank], **LEARN, update=backprop(epochs=2, gate_learning_rate=5e-3, decay_after=3))
        assert (report.graph.replayed > 0) == (way is graphs_on_the_cpu)
        memories.append(memory)
        assert_same_bits(memory)
    assert torch.equal(memories[0].slots, memories[1].slots)
    with graphs_on_the_cpu():
        ends_with(random_ids(60, 1), breaks, {"on_divergence": "ignore"}, 3, "the loss is nan", "on rank 1")
        for does in fails, breaks_a_replay:
            ends_with(random_ids(60, 1), does, {"on_divergence": "ignore"}, 3, "Stop", "rank 1 ended the run")


def own_rules(text):
    """On one text for all, ranks learn what one process does: with rates by kind of row that fade, and clipped at lengths."""
    rates = dict(gate_learning_rate=5e-3, value_learning_rate=2e-2, decay_after=3, epochs=2, optimizer="shampoo", cautious=True)
    slots = []
    for changes in (dict(process_group=None), {}):
        _, memory = attached(clip=1.05, row_length="host")
        report = memory.memorize(text, **LEARN, update=backprop(**rates, **changes))
        assert report.graph.replayed > 0
        slots.append(memory.slots.clone())
    assert relative_distance(*slots) < 1e-5
    assert_same_bits(memory)
    changes = dict(decay_after=3) if dist.get_rank() else {}
    error = error_of(memory.memorize, text, **LEARN, update=backprop(**changes))
    assert "decay_after is 3 on rank 1 and 10 on rank 0" in error, error


def replayed_by_all_rules(texts):
    replayed(texts)
    with graphs_on_the_cpu():
        own_rules(texts[0])


def test_between_the_gradient_and_the_update_of_a_graph_the_ranks_speak():
    run_ranks(replayed_by_all_rules, texts_of(61, 43))
