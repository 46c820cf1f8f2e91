"""Models from strangers: none runs its own code, none asks for memory that its weights cannot fill, errors are one line."""

import json
import shutil
import socket

import pytest
import torch
from transformers.utils import logging

from locas_ext import LocasError
from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.hub import must_use_cache
from locas_ext.evaluation.inputs import load_host, weights_digest


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def change(folder, file="config.json", **fields):
    content = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(content))
    return str(folder)


def complaint(model, kind=LocasError):
    with pytest.raises(kind) as error:
        load_host(model, None, "cpu")
    assert str(model) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ---- code of its own -----------------------------------------------------------------------------------------
MARKER = "from pathlib import Path\nPath({!r}).write_text('ran')\nfrom transformers import Qwen3ForCausalLM as Own\n"


@pytest.mark.parametrize(
    "file, names",
    [
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
    ],
)
def test_code_of_a_model_is_never_run(folder, tmp_path, file, names):
    marker = tmp_path / "marker"
    (folder / "own.py").write_text(MARKER.format(str(marker)))
    change(folder, file, auto_map=names)
    assert type(load_host(str(folder), None, "cpu")[0]).__module__.startswith("transformers.")  # as transformers knows it
    assert not marker.exists()
    change(folder, model_type="own")
    change(folder, "tokenizer_config.json", tokenizer_class="Own")
    line = complaint(folder)
    assert "own.Own" in line and file in line and not marker.exists()


# ---- sizes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", 10**30),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "8"),
        ("hidden_size", 1 << 21),
        ("intermediate_size", 1e6),
        ("vocab_size", True),
        ("num_attention_heads", [[]]),
    ],
)
def test_a_size_that_no_model_has_is_named(folder, field, value):
    assert f"config.json: {field} is" in complaint(change(folder, **{field: value}))


@pytest.mark.parametrize("fields", [{"intermediate_size": 10**6}, {"num_hidden_layers": 800, "layer_types": None}])
def test_a_model_larger_than_its_weights_is_refused_before_it_is_made(folder, fields):
    line = complaint(change(folder, **fields))
    assert "parameters, but the weights beside it are 14,7" in line


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 5000},
        {"num_attention_heads": 0},
        {"model_type": 3},
        {"model_type": "poem"},
        {"hidden_act": "nope"},
        {"rope_parameters": 3},
        {"rms_norm_eps": None},
        {"num_hidden_layers": 12, "layer_types": None},
    ],
)
def test_what_transformers_cannot_load_is_one_line(folder, fields, capfd):
    complaint(change(folder, **fields))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "content, words",
    [
        ("[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"vocab_size": 1, "vocab_size": 2}', "comes twice"),
    ],
)
def test_a_damaged_config_is_named(folder, content, words):
    (folder / "config.json").write_text(content)
    assert words in complaint(str(folder))


def test_weights_that_are_cut_or_missing_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    complaint(str(folder))
    weights.unlink()
    assert "holds no weights" in complaint(str(folder))


# ---- names ---------------------------------------------------------------------------------------------------
def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path):
    assert "holds no config.json; expected a model's folder" in complaint(str(tmp_path), FileNotFoundError)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in complaint(str(tmp_path), FileNotFoundError)
    (tmp_path / "locas_config.json").write_text("{}")
    assert "--memory" in complaint(str(tmp_path), FileNotFoundError)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Every connection fails at once, and nothing is in the cache. Returns the list of attempts."""
    attempts = []

    def refuse(*address, **options):
        attempts.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return attempts


def test_an_unreachable_hub_is_one_line_soon(no_hub, capfd):
    line = complaint("someone/some-model", ConnectionError)
    assert "hf download someone/some-model" in line and "the hub does not answer" in line
    assert len(no_hub) <= 2  # one attempt per question, and no more wait than that
    assert capfd.readouterr().err == ""


def test_an_impossible_name_is_neither_folder_nor_model(no_hub):
    complaint("some model!", FileNotFoundError)
    complaint("a/b/c", FileNotFoundError)
    assert not no_hub


def test_what_is_in_the_cache_is_used_without_the_hub(no_hub, tmp_path):
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / "abc"
    shutil.copytree(MODEL, snapshot)
    refs = tmp_path / "cache" / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert must_use_cache("someone/tiny")


# ---- what is loaded ------------------------------------------------------------------------------------------
def test_loading_leaves_nothing_changed(folder):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    host, tokenizer = load_host(str(folder), None, "cpu")
    assert not host.training and host.dtype == torch.float32 and len(tokenizer) == 4096
    with pytest.raises(LocasError):
        load_host(change(folder, rms_norm_eps=None), None, "cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_other_weights_of_the_same_name_have_another_digest(folder):
    host, _ = load_host(str(folder), None, "cpu")
    half, _ = load_host(str(folder), "bfloat16", "cpu")
    digest = weights_digest(host)
    assert weights_digest(half) == digest
    with torch.no_grad():
        host.model.layers[3].mlp.up_proj.weight.mul_(1.1)
    assert weights_digest(host) != digest


class Codes(torch.Tensor):
    """A weight as torchao makes them: numbers of its own are in the tensors inside it alone."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0] if function is torch.ops.aten.detach.default else NotImplemented


def test_quantized_weights_have_a_digest():
    codes, scale = torch.randint(-128, 127, (6, 5), dtype=torch.int8), torch.rand(6, 1)
    host, digests = torch.nn.Linear(5, 6, bias=False), set()
    for other in (codes, scale), (-codes, scale), (codes, 2 * scale):
        host.weight = torch.nn.Parameter(Codes(*other), requires_grad=False)
        digests.add(weights_digest(host))
    assert len(digests) == 3
