"""Random sequences of verbs; after each what must hold holds (support/world.py). `python -m bench.fuzz` runs many more."""

import pytest
from support.verbs import Step
from support.world import World, Wrong, run_sequence

PARTS = 8  # so that workers share them


@pytest.mark.parametrize("part", range(PARTS))
def test_random_sequences(part, tmp_path):
    for seed in range(3 * part, 3 * part + 3):
        (tmp_path / str(seed)).mkdir()
        try:
            run_sequence(seed, tmp_path / str(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}; the lines were\n" + "\n".join(error.world.log)) from error


ATTACHED = [
    Step("model = host('llama', torch.float32)"),
    Step("memory = locas.attach(model, locas.LocasConfig(rank=4, scale='host'))", must=True),
    Step("memory.memorize(ids(20), window=16, stride=8, learning_rate=0.05, progress=False)", must=True),
]
FAULTS = {
    "the host's weights": ("next(model.parameters()).data.mul_(1.5)", "changed"),
    "its mode": ("model.train()", "training"),
    "a gradient": ("next(model.parameters()).grad = torch.ones_like(next(model.parameters()))", "gradients"),
    "what is computed": ("memory._attachment.ffns[0].arena.scales[0] *= 1.5\nmemory.state.version += 1", "from the formula's"),
    "a verb that may not be refused": ("memory.feed(ids(3, vocab=61) + 90)", "input_ids"),
    "an error from inside": ("memory.no_such_verb()", "AttributeError"),
    "an error without a reason": ("torch.ones(2) @ torch.ones(3)", "size"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_seen(fault, tmp_path):
    world = World(tmp_path)
    for step in ATTACHED:
        world.run(step, thorough=True)
    line, message = FAULTS[fault]
    with pytest.raises((Wrong, AssertionError), match=message):
        world.run(Step(line, must=fault.startswith("a verb")), thorough=True)
