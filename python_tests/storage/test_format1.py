"""Files of format version 1, as commit edae908 wrote them, load, score and go on learning as they did there.

python_tests/data/format1/README.md says what the files are. What is read from a file must come back bit for bit; what is
computed from it may differ by the rounding of another processor's instructions.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import locas_ext as locas

DATA = Path(__file__).parents[1] / "data" / "format1"
ABOUT = json.loads((DATA / "cases.json").read_text())
EXPECTED = load_file(DATA / "expected.safetensors")
IDS, WINDOW, STRIDE = EXPECTED["ids"], ABOUT["window"], ABOUT["stride"]
CASES = ABOUT["cases"]
STOPPED = [name for name, case in CASES.items() if case["optimizer"]]

# With every product and norm of the host off by up to 2 roundings at random, rows ended up to 4.7e-6 of their length away
# (12 draws per memory): AdamW's first steps divide small gradients by their own size. 128 roundings are three times that.
TOLERANCE = 128 * torch.finfo(torch.float32).eps


def host(name):
    folder = DATA / "hosts" / CASES[name]["host"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def attached(name):
    return locas.attach(host(name), locas.LocasConfig.paper(variant=CASES[name]["variant"], rank=4))


def used_slots(memory):
    """Without the rows that a memory which grows holds in reserve."""
    return memory.slots[:, :, : memory.status()[0].slots_used].detach()


def memorize(name, memory, **settings):
    """With the settings of the run that was saved, in the words of this version."""
    case = CASES[name]
    if "backprop" in case:
        update = {"update": locas.Backprop.paper(**case["backprop"])}
    elif hasattr(locas, "Write"):
        update = {"update": locas.Write(**case["write"])}
    else:
        update = {"update": "write", **case["write"]}
    return memory.memorize(IDS, window=WINDOW, stride=STRIDE, progress=False, **update, **settings)


def assert_close_rows(name, slots):
    """Each row's distance from the expected one, against the expected row's length."""
    expected = EXPECTED[f"{name}.slots"]
    assert slots.shape == expected.shape
    distances = (slots - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert distances.max() <= TOLERANCE, f"{distances.max():.2g} of a row's length, allowed {TOLERANCE:.2g}:\n{distances}"


def assert_close_nll(name, report):
    expected = EXPECTED[f"{name}.nll"]
    nll = torch.tensor([chunk.nll for chunk in report.chunks], dtype=torch.float64)
    torch.testing.assert_close(nll, expected, rtol=TOLERANCE, atol=0)


def assert_as_saved(name, memory):
    assert torch.equal(used_slots(memory), EXPECTED[f"{name}.saved_slots"])
    assert memory.version == CASES[name]["version"]
    if name in STOPPED:
        assert memory.tokens_seen == ABOUT["stop"]
    with torch.no_grad():
        logits = memory.model(input_ids=IDS[None, :WINDOW], use_cache=False).logits[0]
    torch.testing.assert_close(logits, EXPECTED[f"{name}.logits"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_memory_loads_into_a_plain_model(name):
    memory = locas.load(host(name), DATA / name)
    assert_as_saved(name, memory)
    assert (memory.config.variant, memory.config.rank, memory.layers) == (CASES[name]["variant"], 4, (0, 1))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_memory_loads_in_place_of_another(name):
    memory = attached(name)
    memory.memorize(IDS.flip(0), window=WINDOW, stride=STRIDE, progress=False)
    memory.load(DATA / name)
    assert_as_saved(name, memory)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on(name):
    memory = attached(name)
    starts = []
    report = memorize(name, memory, resume=DATA / name, callback=lambda chunk: starts.append(chunk.start))
    assert starts == list(range(ABOUT["stop"], len(IDS), STRIDE))
    assert_close_nll(name, report)
    assert_close_rows(name, used_slots(memory))


def test_a_memory_without_a_place_in_its_text_learns_on():
    memory = locas.load(host("glu"), DATA / "glu")
    assert_close_nll("glu", memorize("glu", memory))
    assert_close_rows("glu", used_slots(memory))
    with pytest.raises(locas.LocasError, match="no place to resume from"):
        memorize("glu", attached("glu"), resume=DATA / "glu")
