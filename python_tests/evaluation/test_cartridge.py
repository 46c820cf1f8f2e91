"""Cartridges: against the host with the same tokens in view, what learns and what stays, and `locas recall` with them."""

import random
import sys

import peft
import pytest
import torch
from support.helpers import assert_same_host, random_ids, save_host, snapshot, tiny_model
from support.interrupting import ctrl_c_at
from transformers import AutoConfig, AutoModelForCausalLM

from locas_ext import LocasError
from locas_ext.cli import main
from locas_ext.evaluation import results
from locas_ext.evaluation.methods.cartridge import cartridge
from locas_ext.evaluation.recall import command
from locas_ext.evaluation.recall.nonce import nonce_document
from locas_ext.learning.study.generation import write
from locas_ext.learning.study.prompts import Prompter
from locas_ext.memory import StudySettings

TEXT = nonce_document(5, 0).text
QUICK = StudySettings(kinds=("blank", "continued"), epochs=1, updates=1, batch=8, guard=0, check=False)
OPTIONS = ["--window", "64", "--stride", "32", "--device", "cpu", "--general", "0", "--facts", "5", "--max-new-tokens", "3"]
OPTIONS += ["--retrieval-chunks", "2", "--retrieval-tokens", "32", "--kinds", "blank,continued", "--study-epochs", "1"]
OPTIONS += ["--loss", "ce", "--updates", "6", "--guard", "0", "--cartridge-tokens", "12"]


SHAPES = {
    "gemma3_text": {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 512},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    # keys wider than values
    "minicpm3": {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
}


def other_host(tokenizer, kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**sizes, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, **SHAPES[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def host(tokenizer, kind="qwen3", **changes):
    if kind in SHAPES:
        return other_host(tokenizer, kind)
    return tiny_model(kind, **{"vocab_size": len(tokenizer), "max_position_embeddings": 512, "eos_token_id": 0, **changes})


def learn(prefix, tokenizer, loss="ce", settings=QUICK):
    return prefix.study(TEXT, Prompter(tokenizer), loss, settings, 0, None)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text", "gpt2", "opt"])
def test_before_it_learns_it_is_the_first_tokens_in_view(kind, tokenizer):
    model, count = host(tokenizer, kind), random.randint(3, 20)  # gemma's sliding window is shorter than many of these
    view = Prompter(tokenizer).passage(TEXT)[:count]
    ids = [random_ids(random.randint(4, 15), vocab=len(tokenizer)).tolist() for _ in range(3)]
    expected, written = [], []
    with torch.no_grad():
        for each in ids:
            expected.append(model(input_ids=torch.tensor([view + each])).logits[0, count:])
            after = list(each)
            for _ in range(4):
                after.append(model(input_ids=torch.tensor([view + after])).logits[0, -1].argmax().item())
            written.append(tokenizer.decode(after[len(each) :], skip_special_tokens=True))
    with cartridge(model, count, 0.0) as prefix:
        learn(prefix, tokenizer)
        with torch.no_grad():
            for each, logits in zip(ids, expected, strict=True):
                whole = model(input_ids=torch.tensor([each]), use_cache=False).logits[0]
                begun = model(input_ids=torch.tensor([each[:2]])).past_key_values  # read in two parts
                rest = model(input_ids=torch.tensor([each[2:]]), past_key_values=begun).logits[0]
                torch.testing.assert_close(whole, logits, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(rest, logits[2:], atol=1e-4, rtol=1e-4)
        # together they are padded on the left, which a sliding window counts as tokens behind the cartridge
        parts = [[each] for each in ids] if kind == "gemma3_text" else [ids]
        assert [text for part in parts for text in write(model, tokenizer, part, 4, 0)] == written


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_it_learns_and_leaves_the_host_and_its_first_token_alone(loss, tokenizer):
    model = host(tokenizer)
    before, drawn = snapshot(model), torch.get_rng_state()
    with cartridge(model, 9, 0.1) as prefix:
        settings = StudySettings(kinds=("blank",), epochs=12, updates=1, batch=32, guard=0, raw=0, check=False, keys="learned")
        report = learn(prefix, tokenizer, loss, settings)
        assert report.steps == report.planned > 30 and set(report.seconds) == {"writing", "reading", "learning"}
        layers = model.config.num_hidden_layers
        width = model.config.num_key_value_heads * model.config.head_dim
        assert sum(p.numel() for p in prefix.parameters) == 8 * 2 * layers * width
        cache = model(input_ids=torch.tensor([[5]])).past_key_values
        if loss == "ce":
            assert report.loss < report.loss_before - 0.05
    assert_same_host(model, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    plain = model(input_ids=torch.tensor([Prompter(tokenizer).passage(TEXT)[:9]])).past_key_values
    for learned, begun in zip(cache.layers, plain.layers, strict=True):
        assert learned.keys.shape[2] == 10
        torch.testing.assert_close(learned.keys[:, :, 0], begun.keys[:, :, 0])
        assert not torch.allclose(learned.values[:, :, 1:9], begun.values[:, :, 1:], atol=1e-3)


def test_a_guard_puts_back_what_went_too_far(tokenizer):
    model = host(tokenizer, num_hidden_layers=1)
    before, settings = (
        snapshot(model),
        StudySettings(kinds=("blank",), epochs=1, batch=99, check=False, most_kl=1e-9, updates=8),
    )
    far = []
    for learning_rate in (0.0, 1.0):
        with cartridge(model, 6, learning_rate) as prefix:
            far.append(learn(prefix, tokenizer, settings=settings).guard)
    assert 0 < far[1] <= far[0] + 1e-6
    assert_same_host(model, before)


def test_without_peft_or_with_an_old_one_it_is_refused(tokenizer, monkeypatch):
    model = host(tokenizer)
    with monkeypatch.context() as patched:
        patched.delattr(peft, "CartridgeConfig")
        with pytest.raises(LocasError, match=r"cartridge needs peft >= 0\.19, but .* is installed"), cartridge(model, 4, 0.1):
            pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LocasError, match=r"cartridge needs peft >= 0\.19, which is not installed"), cartridge(model, 4, 0.1):
        pass


def test_keys_and_values_of_several_sizes_are_refused(tokenizer):
    model = host(tokenizer, "minicpm3")
    before = snapshot(model)
    message = "peft's does not fit the keys and values of MiniCPM3"
    with cartridge(model, 4, 0.1) as prefix, pytest.raises(LocasError, match=message):
        learn(prefix, tokenizer)
    assert_same_host(model, before)


# ---- the command -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def host_folder(tokenizer, tmp_path_factory):
    return save_host(host(tokenizer, num_hidden_layers=1), tmp_path_factory.mktemp("host"))


def run(host_folder, out, *more, methods="none,cartridge,cartridge+retrieval"):
    arguments = ["recall", "nonce", "--model", host_folder, "--out", out, "--methods", methods, *OPTIONS, *more]
    return main([str(argument) for argument in arguments])


def test_an_ended_run_keeps_finished_pairs_and_goes_on(host_folder, tmp_path, capsys, monkeypatch):
    measured = ctrl_c_at(monkeypatch, command, "ask_all", 3)
    assert run(host_folder, tmp_path) == 130 and "2 of 3 pairs of method and text are finished" in capsys.readouterr().err
    kept = results.read(tmp_path)["records"]
    assert run(host_folder, tmp_path) == 0 and len(measured) == 4
    records = results.read(tmp_path)["records"]
    assert records[:2] == kept and [record["method"] for record in records] == ["none", "cartridge", "cartridge+retrieval"]
    for record in records[1:]:
        assert record["error"] is None and record["seconds"] > 0 and record["other_kl"] > 1e-6
        assert record["extra_parameters"] == 11 * 2 * 16 and "questions about" in record["notes"][0]
    assert records[1]["other_kl"] == pytest.approx(records[2]["other_kl"])  # the same cartridge
    assert "| cartridge+retrieval |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cartridge-tokens", 1], "--cartridge-tokens is 1; expected an integer >= 2"),
        (["--cartridge-lr", -1], "--cartridge-lr is -1"),
        (["--cartridge-tokens", 449], "--cartridge-tokens is 449 and --window 64; expected at most 512 together"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_written(options, message, host_folder, tmp_path, capsys):
    assert run(host_folder, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
