"""A memory's whole life under torch's global settings: the same numbers as under the plain ones."""

import copy

import pytest
import torch
from support.helpers import SETTINGS, TEXT, assert_same_host, logits_of, random_ids, snapshot
from support.hosts import config_for, tiny
from support.torch_settings import DEFAULTS, setting

import locas_ext as locas

PROMPT = random_ids(6, seed=9)
MORE = random_ids(16, seed=4)


SETTINGS_OF_TORCH = {
    **DEFAULTS,
    "within device meta": lambda: torch.device("meta"),
    "within device cpu": lambda: torch.device("cpu"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad disabled": lambda: setting(torch.set_grad_enabled, False, True),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomaly detection": torch.autograd.detect_anomaly,
}


def generated(model, prompt):
    mask = torch.ones_like(prompt)
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(prompt, **options)[0].tolist()


def life(model, other, config, folder, rehome):
    """The verbs from attach to unmerge on a host, and a copy of it to load into. -> what came out, by name."""
    results = {}
    memory = locas.attach(model, config, rehome=rehome)
    report = memory.memorize(TEXT, **SETTINGS, title="a text")
    results["chunks"] = report.chunks
    results["report"] = memory.feed(MORE.tolist(), progress=False).perplexity
    results["slots"] = memory.slots.clone()
    results["logits"] = logits_of(model, TEXT)
    results["tokens"] = generated(model, PROMPT[None])
    memory.save_pretrained(folder, optimizer=True)
    loaded = locas.load(other, folder, rehome=rehome)
    results["loaded"] = logits_of(other, TEXT)
    loaded.restore(memory.snapshot())
    fork = loaded.fork()
    if config.variant == "mlp":
        fork.write(MORE)
        fork.compress(3)
    results["fork"] = fork.slots.clone()
    fork.reset()
    fork.initialize(TEXT[:20])
    results["initialized"] = fork.slots.clone()
    results["status"] = loaded.status()
    fork.detach()
    loaded.detach()
    merged = memory.merge_and_unload(8)
    results["merged"] = logits_of(merged, TEXT)
    locas.unmerge(merged)
    results["host"] = logits_of(model, TEXT)
    return results


HOSTS = [
    (*host, dtype) for host in (("llama", False), ("llama", True), ("opt", False)) for dtype in (torch.float32, torch.bfloat16)
]


def two_hosts(family, dtype):
    return [tiny(family).to(dtype) for _ in range(2)]


@pytest.fixture(scope="module", params=HOSTS, ids=str)
def plain(request, tmp_path_factory):
    """-> a family, whether its weights move, a dtype, and what comes out under torch's own settings."""
    family, rehome, dtype = request.param
    folder = tmp_path_factory.mktemp("plain")
    return *request.param, life(*two_hosts(family, dtype), config_for(family), folder, rehome)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:compress. computed in float64")
@pytest.mark.parametrize("name", SETTINGS_OF_TORCH)
def test_a_life_under_a_setting_of_torch(plain, name, tmp_path):
    family, rehome, dtype, expected = plain
    hosts = two_hosts(family, dtype)
    before = snapshot(hosts[0])
    with SETTINGS_OF_TORCH[name]():
        results = life(*hosts, config_for(family), tmp_path, rehome)
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(results[key], value) if isinstance(value, torch.Tensor) else results[key] == value
        assert same, key
    for host in hosts:
        assert_same_host(host, before)


@pytest.mark.parametrize("name", ["inference_mode", "no_grad", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_was_attached_under_a_setting_learns_without_it(family, name, tmp_path):
    """Tensors made under inference_mode refuse to be learned: those of a memory are none."""
    model = tiny(family)
    twin = copy.deepcopy(model)
    with SETTINGS_OF_TORCH[name]():
        memory = locas.attach(model, config_for(family))
        memory.memorize(TEXT, **SETTINGS)
        memory.save_pretrained(tmp_path, optimizer=True)
        loaded = locas.load(twin, tmp_path)
    for each in (memory, loaded):
        each.memorize(MORE, **SETTINGS)
        optimizer = locas.SlotAdamW(each)
        each.model(input_ids=TEXT[None], labels=TEXT[None]).loss.backward()
        optimizer.step()
    assert torch.equal(memory.slots, loaded.slots) and memory.version == loaded.version
