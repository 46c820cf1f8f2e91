"""A memory read, switched off and taught in several threads and tasks at once."""

import asyncio
import sys
import threading

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, learned, logits_of, random_ids
from support.hosts import tiny

import locas_ext as locas
from bench.soak import soak
from locas_ext.patching.freeze import HostFreeze
from locas_ext.storage import tensor_file

OTHER = random_ids(20, seed=8)


def in_thread(work):
    """Runs work() in another thread. -> what it raised, or None."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def taught_opt():
    model = tiny("opt", dropout=0.0)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5, variant="mlp"))
    memory.memorize(TEXT, **SETTINGS)
    return model, memory


@pytest.mark.parametrize("make", [learned, taught_opt])
def test_a_read_in_the_middle_of_another_ones_ffn(make):
    """The other one passes the first projection after, and the last one before."""
    model, _ = make()
    texts = [TEXT[:20], random_ids(13, seed=2)]
    want, got = [logits_of(model, ids) for ids in texts], {}
    act = next(module for name, module in model.named_modules() if name.endswith(("act_fn", "activation_fn")))
    main = threading.main_thread()

    def hook(*_):
        if threading.current_thread() is main and 1 not in got:
            got[1] = None
            in_thread(lambda: got.update({1: logits_of(model, texts[1])}))

    act.register_forward_hook(hook)
    if make is learned:  # its whole op runs no activation module: enter from the FFN's own hook
        model.model.layers[0].mlp.register_forward_hook(hook)
    got[0] = logits_of(model, texts[0])
    for mine, expected in zip((got[0], got[1]), want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_disabled_is_its_threads_own():
    model, memory = learned()
    with_memory, seen = logits_of(model, TEXT), {}
    with memory.disabled():
        alone = logits_of(model, TEXT)
        in_thread(lambda: seen.update(thread=logits_of(model, TEXT)))
        assert torch.equal(logits_of(model, TEXT), alone)
    assert torch.equal(seen["thread"], with_memory) and not torch.equal(alone, with_memory)
    assert torch.equal(logits_of(model, TEXT), with_memory)


def test_disabled_is_its_tasks_own():
    model, memory = learned()
    with_memory = logits_of(model, TEXT)
    with memory.disabled():
        alone = logits_of(model, TEXT)

    async def task(off, barrier):
        if not off:
            await barrier.wait()
            return logits_of(model, TEXT)
        with memory.disabled():
            await barrier.wait()
            return logits_of(model, TEXT)

    async def both():
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(task(True, barrier), task(False, barrier))

    off, on = asyncio.run(both())
    assert torch.equal(off, alone) and torch.equal(on, with_memory)


def test_disabled_blocks_of_two_memories_may_end_in_any_order():
    first, second = learned()[1], learned(seed=3)[1]
    blocks = first.disabled(), second.disabled()
    for block in blocks:
        block.__enter__()
    blocks[0].__exit__(None, None, None)
    assert not first.state.disabled and second.state.disabled
    blocks[1].__exit__(None, None, None)
    assert not second.state.disabled and second.state.exclusion.off_somewhere == 0


def test_disabled_in_a_compiled_host_is_its_threads_own():
    torch._dynamo.reset()
    model, memory = learned()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def logits():
        with torch.no_grad():
            return compiled(input_ids=TEXT[None], use_cache=False).logits[0]

    seen = {}
    with_memory = logits_of(model, TEXT)
    with memory.disabled():
        alone = logits_of(model, TEXT)
        in_thread(lambda: seen.update(thread=logits()))
        torch.testing.assert_close(logits(), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["thread"], with_memory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(), with_memory, rtol=1e-4, atol=1e-4)
    with memory.disabled():  # with a gradient too
        torch.testing.assert_close(compiled(input_ids=TEXT[None], use_cache=False).logits[0], alone, rtol=1e-5, atol=1e-5)


def memorized_beside(work):
    """Memorizes, and in the middle of a learning forward runs work(model) in another thread. -> slots, what work raised"""
    model, memory = attached()
    memory.initialize(TEXT[:30])
    pending = memory.parameters()[0].sum() * 3.0  # a graph from before
    fired = []

    def hook(*_):
        if not fired and torch.is_grad_enabled() and threading.current_thread() is threading.main_thread():
            fired.append(None)
            fired[0] = in_thread(lambda: work(model, memory, pending))

    model.model.layers[0].register_forward_hook(hook)
    memory.memorize(TEXT, **SETTINGS)
    return memory, fired[0]


@pytest.mark.parametrize(
    "work",
    [
        lambda model, memory, pending: model(input_ids=OTHER[None], labels=OTHER[None]).loss.backward(),
        lambda model, memory, pending: logits_of(model, OTHER),
        lambda model, memory, pending: memory.memorize(OTHER, **SETTINGS),
        lambda model, memory, pending: memory.initialize(OTHER),
        lambda model, memory, pending: memory.reset(),
        lambda model, memory, pending: memory.restore(memory.snapshot()),
        lambda model, memory, pending: memory.snapshot(),
        lambda model, memory, pending: memory.fork(),
        lambda model, memory, pending: memory.save_pretrained("never-made"),
        lambda model, memory, pending: memory.detach(),
        lambda model, memory, pending: memory.merge_and_unload(pad_to_multiple_of=8),
        lambda model, memory, pending: locas.SlotAdamW(memory).step(),
        lambda model, memory, pending: (other := locas.SlotSGD(memory, lr=0.1)).load_state_dict(other.state_dict()),
    ],
    ids=[
        *["train", "read", "memorize", "initialize", "reset", "restore", "snapshot", "fork", "save", "detach", "merge"],
        *["step", "load state"],
    ],
)
def test_what_would_spoil_memorize_is_refused(work):
    want, _ = memorized_beside(lambda *_: None)
    memory, raised = memorized_beside(work)
    assert isinstance(raised, RuntimeError) and "memorize() is changing this memory in another thread" in str(raised)
    assert torch.equal(memory.slots, want.slots) and memory.version == want.version
    assert memory.state.exclusion.holder is None


def test_a_backward_of_another_thread_does_not_reach_the_gradient_of_memorize():
    want, _ = memorized_beside(lambda *_: None)
    memory, raised = memorized_beside(lambda model, memory, pending: pending.backward())
    assert raised is None and torch.equal(memory.slots, want.slots)
    assert torch.equal(memory.parameters()[0].grad, torch.full_like(memory.parameters()[0], 3.0))  # and is not lost


def test_who_looks_while_another_thread_updates_counts_no_update(monkeypatch):
    _, memory = attached()
    memory.parameters()  # from now on changes from outside are looked for
    increment, seen = torch.autograd.graph.increment_version, []

    def looked_at(tensors):
        increment(tensors)
        in_thread(lambda: seen.append((memory.version, memory.status(), repr(memory))))

    monkeypatch.setattr(torch.autograd.graph, "increment_version", looked_at)
    report = memory.memorize(TEXT, **SETTINGS)
    assert seen and memory.version == len(report.chunks)


def test_one_thread_at_a_time_gives_a_model_a_memory():
    model, raised = tiny("llama"), []
    hook = model.model.register_forward_hook(lambda *_: raised.append(in_thread(lambda: locas.attach(model))))
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    hook.remove()
    assert raised and all("being given a memory in another thread" in str(error) for error in raised)
    memory.detach()
    locas.attach(model, locas.LocasConfig(rank=4))


def test_the_host_alone_can_be_read_while_memorize_runs():
    host = logits_of(attached()[0], OTHER)
    seen = []

    def work(model, memory, pending):
        with memory.disabled():
            seen.append(logits_of(model, OTHER))

    memory, raised = memorized_beside(work)
    want, _ = memorized_beside(lambda *_: None)
    assert raised is None and torch.equal(memory.slots, want.slots)
    torch.testing.assert_close(seen[0], host, rtol=1e-5, atol=1e-5)  # the norms run as one kernel meanwhile


def test_a_forward_that_a_change_overtakes_is_refused():
    model, memory = learned()
    handle = model.model.layers[0].register_forward_hook(lambda *_: in_thread(memory.reset))
    with pytest.raises(RuntimeError, match="changed by another thread while this forward read it"):
        logits_of(model, TEXT)
    handle.remove()
    assert torch.equal(logits_of(model, TEXT), logits_of(attached()[0], TEXT))


def test_a_save_that_a_change_overtakes_writes_nothing(tmp_path, monkeypatch):
    _, memory = learned()
    serialize = tensor_file.serialize

    def overtaken(*arguments):
        in_thread(memory.reset)
        return serialize(*arguments)

    monkeypatch.setattr(tensor_file, "serialize", overtaken)
    with pytest.raises(RuntimeError, match="save_pretrained: another thread changed this memory meanwhile"):
        memory.save_pretrained(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_callback_may_keep_the_memory(tmp_path):
    _, memory = attached()
    kept = []
    memory.memorize(TEXT, **SETTINGS, callback=lambda _: kept.append((memory.snapshot(), memory.save_pretrained(tmp_path))))
    assert kept[-1][0].memory_version == memory.version


def test_memorize_gives_no_gradient_to_anything_but_the_slots():
    model, memory = learned()
    weight = model.lm_head.weight.requires_grad_(True)
    memory.memorize(TEXT, **SETTINGS)
    assert weight.grad is None and all(parameter.grad is None for parameter in model.parameters())


def test_a_second_of_soak():
    tally = soak(1.0, threads=8)
    assert tally.rows > 0 and tally.wrong == 0 and tally.errors == []


def test_models_get_and_lose_their_memories_in_several_threads(monkeypatch):
    """What is known of frozen tensors is one table of the process."""
    monkeypatch.setattr(torch.nn.Sequential, "get_output_embeddings", lambda model: None, raising=False)
    raised, interval = [], sys.getswitchinterval()

    def work():
        try:
            for number in range(60):
                freeze = HostFreeze(torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(20)]))
                freeze.hold()
                if number % 2:
                    freeze.release()  # the others are dropped with their memory
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not raised
