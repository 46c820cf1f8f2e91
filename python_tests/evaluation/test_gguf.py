"""Hosts from GGUF files: the shipped model written into one, and files that are none."""

import re
import struct

import pytest
import torch
from support.command_line import WINDOW, run
from support.gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from locas_ext.errors import LocasError
from locas_ext.evaluation.assets import ASSETS, MODEL, load_model
from locas_ext.evaluation.inputs import load_host

pytest.importorskip("gguf")


def write(path, **settings):
    return write_gguf(path, load_model(), **settings)


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
    assert "of the architecture 'rwkv7', which transformers does not read" in refusal(
        write(tmp_path / "other.gguf", architecture="rwkv7")
    )
    assert "qwen3.block_count is 4000000; expected at most 1000" in refusal(write(tmp_path / "deep.gguf", blocks=4_000_000))
    assert "tensors are missing" in refusal(write(tmp_path / "more.gguf", blocks=9))
    content, width = file.read_bytes(), load_model().config.intermediate_size
    stated = b"qwen3.feed_forward_length" + struct.pack("<II", 4, width)  # 4: an unsigned integer of 32 bits
    assert stated in content
    (tmp_path / "wide.gguf").write_bytes(content.replace(stated, stated[:-4] + struct.pack("<I", width + 8)))
    name = "model.layers.0.mlp.down_proj.weight"
    shapes = rf"24 tensors of .* have other shapes, such as {name}, \[\d+, {width}\] where .*{width + 8}\]"
    assert re.search(shapes, refusal(tmp_path / "wide.gguf"))


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
