"""`locas memorize` with its options, `generate` and `merge` on a host with two-layer FFNs."""

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import WINDOW, run
from support.helpers import save_host, tiny_opt
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.assets import MODEL


@pytest.fixture(scope="module")
def two_layer_host(tmp_path_factory):
    """A folder with a random OPT and the shipped tokenizer."""
    vocab_size = len(AutoTokenizer.from_pretrained(MODEL))
    return save_host(tiny_opt(vocab_size, positions=128), tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize(
    "options, config, arguments",
    [
        ([], {}, {}),
        (
            ["--layers", "-1", "--backend", "matmul", "--optimizer", "sgd", "--epochs", 2, "--learning-rate", 0.5],
            dict(layers=[-1], backend="matmul"),
            dict(update=locas.Backprop(optimizer="sgd", epochs=2, learning_rate=0.5)),
        ),
        (
            ["--decay-after", 3, "--value-learning-rate", 2e-3, "--row-length", "host", "--clip-at", 1.5],
            dict(row_length="host", clip=1.5),
            dict(update=locas.Backprop(decay_after=3, value_learning_rate=2e-3)),
        ),
        (["--paper"], dict(scale="paper"), dict(update=locas.Backprop.paper())),
        (["--context-gradient", "--bos", "--seed", 3], dict(seed=3), dict(context_gradient=True, bos=True)),
        (
            ["--update", "write", "--epsilon", 0.5, "--capacity", 80, "--compress-to", 20],
            {},
            dict(update=locas.Write(epsilon=0.5, capacity=80, compress_to=20)),
        ),
        (
            ["--update", "write", "--tokens", "top-loss:3", "--when-full", "drop_oldest", "--capacity", 12],
            {},
            dict(update=locas.Write(tokens=locas.TopLoss(3), when_full="drop_oldest", capacity=12)),
        ),
        (
            ["--update", "write", "--tokens", "loss-above:7.5", "--when-full", "error"],
            {},
            dict(update=locas.Write(tokens=locas.LossAbove(7.5), when_full="error")),
        ),
    ],
)
def test_memorize_on_a_two_layer_host_equals_the_python_call(
    page, two_layer_host, tmp_path, capsys, options, config, arguments
):
    out = tmp_path / "memory"
    command = ["memorize", page, "--model", two_layer_host, "--out", out, "--variant", "mlp", *WINDOW, *options]
    status, _, _ = run(capsys, *command, "--max-tokens", 300, "--title", "A [page]")
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(two_layer_host, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(MODEL)(page.read_text())["input_ids"][:300]
    memory = locas.attach(model, locas.LocasConfig(rank=4, variant="mlp", **config))
    memory.memorize(ids, window=64, stride=32, progress=False, **arguments)
    used = memory.status()[0].slots_used
    saved = load_file(out / "locas_memory.safetensors")["slots"]
    assert saved.shape == (len(memory.layers), 2, used, 32) and torch.equal(saved, memory.slots[:, :, :used])
    (text,) = locas.load(model_without(memory), out).texts
    assert (text.title, text.tokens, text.digest) == ("A [page]", 300, memory.texts[0].digest)


def model_without(memory):
    memory.detach()
    return memory.model


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--update", "write", "--learning-rate", "1"], "--learning-rate is given, but --update is write"),
        (["--update", "write", "--optimizer", "sgd"], "--optimizer is given, but --update is write"),
        (["--tokens", "all"], "--tokens is given, but --update is backprop; expected --update write"),
        (["--when-full", "error"], "--when-full is given, but --update is backprop"),
        (["--layers", "99"], "layers holds 99"),
        (["--tokens", "2"], "--tokens is '2'; expected all, top-loss:N"),
        (["--seed", "9" * 30], "--seed is 999"),
        (["--window", "9" * 6000], "--window is inf"),
        (["--rank", "9" * 15], "rank is 999"),
        (["--learning-rate", "1e999"], "--learning-rate is inf"),
        (["--decay-after", "0"], "--decay-after is 0"),
        (["--clip-at", "2", "--no-clip"], "--clip-at is 2 beside --no-clip"),
        (["--row-length", "long"], "--row-length is 'long'"),
        (["--max-tokens", "1"], "--max-tokens is 1"),
    ],
)
def test_settings_that_do_not_fit(options, complaint, page, tmp_path, capsys):
    status, out, err = run(capsys, "memorize", page, "--model", MODEL, "--out", tmp_path / "m", *options)
    (line,) = [text for text in err.splitlines() if text.startswith("locas: ")]
    assert status == 2 and complaint in line and not out and len(line) < 400
    assert not (tmp_path / "m").exists()


def test_a_two_layer_hosts_memory_is_used_and_merged(page, two_layer_host, tmp_path, capsys):
    status, _, _ = run(
        capsys,
        "memorize",
        page,
        "--model",
        two_layer_host,
        "--out",
        tmp_path / "m",
        "--variant",
        "mlp",
        *WINDOW,
        "--update",
        "write",
        "--epsilon",
        0.5,
    )
    assert status == 0
    status, out, _ = run(
        capsys, "generate", "--model", two_layer_host, "--memory", tmp_path / "m", "--prompt", "The", "--max-new-tokens", 3
    )
    assert status == 0 and out.startswith("The")
    status, out, _ = run(capsys, "merge", "--model", two_layer_host, "--memory", tmp_path / "m", "--out", tmp_path / "merged")
    assert status == 0 and "FFN width 40 -> 256" in out
    model = AutoModelForCausalLM.from_pretrained(two_layer_host, dtype=torch.float32)
    memory = locas.load(model, tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, memory.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_two_layer_host_says_which_variant_it_takes(page, two_layer_host, tmp_path, capsys):
    status, _, err = run(capsys, "memorize", page, "--model", two_layer_host, "--out", tmp_path / "m", *WINDOW)
    assert status == 2 and "use LocasConfig(variant='mlp')" in err and not (tmp_path / "m").exists()
