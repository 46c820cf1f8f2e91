"""A merged Llama goes to llama.cpp: written with its tensor names, as its converter writes them, and read back."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import locas_ext as locas
from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.inputs import load_host

gguf = pytest.importorskip("gguf")


def merged_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
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
    config, bpe = model.config, json.loads((MODEL / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in sorted(bpe["vocab"].items(), key=lambda item: item[1])])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        values = parameter.float().numpy()
        if (projection := name.split(".")[-2]) in heads:
            values = pairs_side_by_side(values, heads[projection])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
