"""A merged Llama goes to llama.cpp: written with its tensor names, as its converter writes them, and read back."""

import pytest
import torch
from support.gguf_files import write_gguf
from support.helpers import tiny_model

import locas_ext as locas
from locas_ext.evaluation.inputs import load_host

gguf = pytest.importorskip("gguf")


def merged_llama():
    sizes = dict(vocab_size=4096, hidden_size=64, head_dim=16, intermediate_size=224, max_position_embeddings=128)
    model = tiny_model("llama", **sizes)
    memory = locas.attach(model, locas.LocasConfig(rank=8, scale="host"))
    memory.memorize(torch.randint(0, 4096, (200,)), window=64, stride=32, learning_rate=0.02, progress=False)
    before = logits(model)
    merged = memory.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    return merged


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


def pairs_side_by_side(weight, heads):
    """llama.cpp turns neighbours, transformers halves: its converter reorders the rows of query and key projections."""
    out, d = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, d).swapaxes(1, 2).reshape(out, d)


def write(model, path):
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}

    def tensor(name, values):
        projection = name.split(".")[-2]
        return pairs_side_by_side(values, heads[projection]) if projection in heads else values

    write_gguf(path, model, "llama", tensor)


def test_a_merged_llama_is_written_and_read_back(tmp_path):
    merged, file = merged_llama(), tmp_path / "merged.gguf"
    width = merged.config.intermediate_size
    assert width == 256 and width % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_K][0] == 0, "k-quants take whole blocks"
    write(merged, file)
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"token_embd.weight", "output.weight", "blk.0.ffn_gate.weight", "blk.1.attn_q.weight"} <= names
    host, _ = load_host(str(file), "float32", "cpu")
    assert host.config.intermediate_size == width
    torch.testing.assert_close(logits(host), logits(merged), rtol=1e-4, atol=1e-4)


def test_the_order_of_the_rows_matters(tmp_path, monkeypatch):
    merged, file = merged_llama(), tmp_path / "merged.gguf"
    monkeypatch.setitem(globals(), "pairs_side_by_side", lambda weight, heads: weight)
    write(merged, file)
    assert (logits(load_host(str(file), "float32", "cpu")[0]) - logits(merged)).abs().max() > 0.1
