"""Hosts from GGUF files: the shipped model written into one, and files that are none."""

import json

import pytest
import torch
from support.command_line import WINDOW, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from locas_ext.errors import LocasError
from locas_ext.evaluation.assets import ASSETS, MODEL, load_model
from locas_ext.evaluation.inputs import load_host

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    """What llama.cpp calls a tensor of a Qwen3 model."""
    name = name.removeprefix("model.").removesuffix(".weight")
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return {"embed_tokens": "token_embd", "norm": "output_norm"}[name] + ".weight"


def write(path, architecture="qwen3", blocks=None):
    model, tokenizer = load_model(), json.loads((MODEL / "tokenizer.json").read_text())
    config, bpe = model.config, tokenizer["model"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers if blocks is None else blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in sorted(bpe["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    for name, parameter in model.named_parameters():
        writer.add_tensor(gguf_name(name), parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_a_file_is_the_model_that_was_written_into_it(file, tmp_path):
    host, tokenizer = load_host(str(file), "float32", "cpu")
    plain, text = load_model(), (ASSETS / "nostromo.txt").read_text()[:600]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits
        torch.testing.assert_close(host(torch.tensor([ids])).logits, expected, rtol=1e-5, atol=1e-5)
        host.save_pretrained(tmp_path)  # a plain model: nothing says that it was quantized
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(again(torch.tensor([ids])).logits, expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(host.config, "quantization_config")


def test_commands_take_a_file(file, tmp_path, capsys):
    page, memory, merged = tmp_path / "page.txt", tmp_path / "memory", tmp_path / "merged"
    page.write_text((ASSETS / "nostromo.txt").read_text()[:900])
    status, said, err = run(capsys, "memorize", page, "--model", file, "--out", memory, *WINDOW)
    assert status == 0, err
    status, said, err = run(
        capsys, "generate", "--model", file, "--memory", memory, "--prompt", "In the time", "--max-new-tokens", 4
    )
    assert status == 0 and said.startswith("In the time"), err
    status, said, err = run(capsys, "merge", "--model", file, "--memory", memory, "--out", merged)
    assert status == 0, err
    AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)


def refusal(path):
    with pytest.raises(LocasError) as caught:
        load_host(str(path), "float32", "cpu")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", [0.0002, 0.01, 0.5, 0.9999])
def test_a_file_that_is_cut_short(file, part, tmp_path):
    cut = tmp_path / "cut.gguf"
    content = file.read_bytes()
    cut.write_bytes(content[: int(part * len(content))])
    assert "cut short" in refusal(cut)


def test_files_that_are_no_model(file, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("Call me Ishmael.")
    assert "it begins with b'Call', not b'GGUF'" in refusal(text)
    assert "of the architecture 'rwkv7', which transformers does not read" in refusal(write(tmp_path / "other.gguf", "rwkv7"))
    assert "qwen3.block_count is 4000000; expected at most 1000" in refusal(write(tmp_path / "deep.gguf", blocks=4_000_000))
    assert "tensors are missing" in refusal(write(tmp_path / "more.gguf", blocks=9))


@pytest.mark.parametrize("place", [8, 16, 24, 40, 300])
def test_counts_that_no_file_has(file, place, tmp_path):
    """Numbers of tensors, of settings and of characters, each made as large as it can be."""
    content = bytearray(file.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(content)
    refusal(wrong)


def test_without_the_package_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install 'locas_ext[gguf]'" in refusal(file)
