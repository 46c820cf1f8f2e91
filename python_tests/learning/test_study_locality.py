"""What keeps a studying memory silent on general text, against eigenvectors and hooks by hand."""

import random

import pytest
import torch
from support.study import PAIRS, TEXT, study_host, study_tokenizer

import locas_ext as locas
from locas_ext.evaluation.recall.general import general_questions
from locas_ext.learning.optimizers import adamw_step
from locas_ext.learning.study.guard import PROMPTS
from locas_ext.learning.study.learner import Learner
from locas_ext.learning.study.locality import Locality, energies, ways
from locas_ext.learning.study.rows import Row

SEED = random.randrange(10_000)
CPU = torch.device("cpu")


def inputs(count, d, generator, basis, spread):
    """Vectors whose energy lies mostly in some directions."""
    return (torch.randn(count, d, generator=generator, dtype=torch.float64) * spread) @ basis.T


def spread_inputs(d):
    generator = torch.Generator().manual_seed(SEED)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    spread = torch.logspace(0, -2, d, dtype=torch.float64)[torch.randperm(d, generator=generator)]
    return [inputs(20_000, d, generator, basis, spread) for _ in range(2)]


@pytest.mark.parametrize("quiet", [0.5, 0.9, 0.99])
def test_a_projected_row_answers_general_inputs_with_no_more_than_the_energy_left(quiet):
    """On inputs that were not measured; and no direction is given up that need not be."""
    d = random.Random(SEED).randint(6, 24)
    measured, held_out = spread_inputs(d)
    way = ways(measured.T @ measured / len(measured), "projected", quiet)
    torch.testing.assert_close(way @ way, way)
    left = (held_out @ way).square().sum() / held_out.square().sum()
    assert left <= (1 - quiet) * 1.1, SEED
    values, vectors = torch.linalg.eigh(measured.T @ measured)
    dropped = d - round(way.trace().item())
    kept_one_more = vectors[:, : d - dropped + 1]
    assert (measured @ kept_one_more).square().sum() / measured.square().sum() > 1 - quiet


def test_nothing_is_given_up_for_a_share_of_nothing():
    energy = torch.diag(torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(ways(energy, "projected", 0.0), torch.eye(3, dtype=torch.float64))
    assert ways(energy, "projected", 0.999999).trace().round() == 1, "one way is always left"


def test_whitened_inputs_have_energy_alike_in_all_directions():
    measured, held_out = spread_inputs(8)
    way = ways(measured.T @ measured / len(measured), "whitened", 0.999999)
    seen = held_out @ way
    energy = seen.T @ seen / len(seen)
    torch.testing.assert_close(energy / energy.trace() * 8, torch.eye(8, dtype=torch.float64), rtol=0, atol=0.1)
    assert way.square().sum().item() == pytest.approx(8)


def random_rows(count):
    rng = random.Random(SEED)
    return [Row(tuple(rng.randrange(3, 4000) for _ in range(rng.randint(3, 20))), 1) for _ in range(count)]


def fresh(clip=True):
    return locas.attach(study_host(SEED, num_hidden_layers=2), locas.LocasConfig(rank=6, scale=2.0, clip=clip))


def test_energies_are_those_of_each_row_alone():
    memory, rows = fresh(), random_rows(5)
    seen = {0: [], 1: []}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, arguments, n=n: seen[n].append(arguments[0][0, 1:]))
        for n, layer in enumerate(memory.model.model.layers)
    ]
    with memory.disabled(), torch.no_grad():
        for row in rows:
            memory.model(input_ids=torch.tensor([row.ids[:-1]]))
    for hook in hooks:
        hook.remove()
    with memory.disabled():
        found = energies(memory._attachment, rows, CPU)
    for layer, each in enumerate(found):
        x = torch.cat(seen[layer]).double()
        torch.testing.assert_close(each, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True], ids=["fresh", "learned"])
def test_what_is_learned_stays_off_the_ways_of_general_inputs(learned, monkeypatch):
    """All of a fresh memory's rows, the changes of one that knows something; values go anywhere, no row is longer than 1."""
    memory, tokenizer, made = fresh(clip=not learned), study_tokenizer(), []  # a clip shortens what was there before too
    of = Locality.of

    def kept(*arguments):
        made.append(of(*arguments))
        return made[0]

    monkeypatch.setattr(Locality, "of", kept)
    if learned:
        memory.memorize(tokenizer(TEXT, add_special_tokens=False)["input_ids"], window=64, stride=32, progress=False)
    before = memory.gather_slots() if learned else torch.zeros(2, 3, 6, 32)
    settings = locas.StudySettings(
        epochs=1, updates=8, batch=4, learning_rate=0.05, guard=0.0, locality="projected", quiet=0.6, new_tokens=4
    )
    memory.study(TEXT, tokenizer, "ce", PAIRS, progress=False, settings=settings)
    change = memory.gather_slots() - before
    (way,) = made[0].ways
    dropped = torch.eye(32) - way  # [2, 32, 32]
    assert dropped.norm() > 1, "there is something to stay off"
    off = torch.einsum("lprd,lde->lpre", change, dropped)
    assert off[:, :2].norm() < 1e-5 * change[:, :2].norm(), SEED
    assert off[:, 2].norm() > 0.05 * change[:, 2].norm() > 0
    assert learned or memory.gather_slots().norm(dim=-1).max() <= 1 + 1e-5


def test_an_update_is_adamw_in_whitened_coordinates():
    """Against torch's AdamW over A, where the key rows are A times the ways."""
    memory = fresh()
    memory.initialize(list(range(3, 40)))
    state = memory._attachment.state
    (arena,) = state.arenas
    generator = torch.Generator().manual_seed(SEED)
    root = torch.randn(2, 32, 32, generator=generator)
    way = root @ root.mT / 32 + torch.eye(32)
    slots = torch.randn(arena.slots.shape, generator=generator) * 0.01
    with torch.no_grad():
        arena.slots.copy_(slots)
    rows = torch.nn.Parameter(torch.linalg.solve(way[:, None], slots[:, :-1].mT).mT.clone())
    values = torch.nn.Parameter(slots[:, -1].clone())
    optimizer = torch.optim.AdamW([rows, values], lr=1e-3, weight_decay=0.0)
    locality = Locality([way])
    for _ in range(3):
        gradient = torch.randn(slots.shape, generator=generator)
        rows.grad, values.grad = gradient[:, :-1] @ way[:, None], gradient[:, -1].clone()
        optimizer.step()
        arena.grad.copy_(gradient)
        with locality.update(state, clip=True):
            adamw_step(state, 1e-3, clip=False)
        state.zero_grad()
    expected = torch.cat([rows @ way[:, None], values[:, None]], 1).detach()
    torch.testing.assert_close(arena.slots, expected, rtol=1e-3, atol=1e-5)


# ---- the schedule and what is judged by ------------------------------------------------------------------------
def test_rows_end_no_longer_than_the_clip_at_the_hosts_lengths():
    clip, tau = 1 + random.random(), 2.0
    memory = fresh(clip)
    memory.initialize(list(range(3, 40)))
    state = memory._attachment.state
    (arena,) = state.arenas
    with torch.no_grad():
        arena.slots.copy_(100 * torch.randn(arena.slots.shape))
    way = torch.eye(32).expand(2, 32, 32)
    with Locality([way]).update(state, clip=True):
        adamw_step(state, 1e-3, clip=False)
    ffns = [layer.mlp for layer in memory.model.model.layers]
    rows = [(ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T / tau) for ffn in ffns]
    longest = clip * torch.tensor([[kind.norm(dim=-1).mean().item() for kind in layer] for layer in rows])
    torch.testing.assert_close(arena.slots.norm(dim=-1), longest[..., None].expand(-1, -1, 6), rtol=1e-4, atol=1e-5)


def test_the_text_itself_comes_first(monkeypatch):
    memory, learners = fresh(), []
    monkeypatch.setattr(Learner, "run", lambda self, after_step: learners.append(self) or self.outcome)
    settings = locas.StudySettings(
        epochs=1, updates=20, batch=4, guard=0.0, raw=0.5, raw_first=0.25, locality="none", new_tokens=4
    )
    memory.study(TEXT, study_tokenizer(), "ce", PAIRS, progress=False, settings=settings)
    (learner,) = learners
    assert [len(learner._lessons(step)) for step in (0, 4, 5, 19)] == [1, 1, 4, 4]
    assert [learner._raw(step)[1] for step in (0, 4, 5, 19)] == [2.0, 2.0, 0.5, 0.5]


def test_what_the_guard_learns_with_is_not_what_is_asked_to_judge():
    """No general question of the evaluation is a prompt of the guard, nor one with another thing put in."""
    words = lambda text: "".join(c for c in text.lower() if c.isalnum() or c == " ").split()
    asked = [words(question.text) for question in general_questions()]
    for prompt in PROMPTS:
        mine = words(prompt)
        for other in asked:
            assert mine != other
            same = sum(a == b for a, b in zip(mine, other, strict=False))
            assert same < 5 or same < max(len(mine), len(other)) - 1, (prompt, " ".join(other))
