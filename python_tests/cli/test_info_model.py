"""`locas info --model`: what was found in a model, layer by layer."""

import re

import pytest
from support.command_line import run
from support.found_hosts import found_host
from support.helpers import save_host

from locas_ext.evaluation.assets import MODEL


@pytest.mark.parametrize(
    "family, found, standing, merging",
    [
        (
            "olmo",
            r"mlp: gated \(gate_proj, up_proj, down_proj\), %d neurons, silu",
            "glu, whole",
            "by intermediate_size",
        ),
        ("starcoder2", r"two-layer \(c_fc, c_proj\), %d neurons, gelu_pytorch_tanh", "mlp, between", "by intermediate_size"),
        ("mixtral", r"layers.0.mlp: experts, %d neurons, silu", "glu, beside it: .*experts", "not mergeable: .*experts"),
    ],
)
def test_each_layer_has_a_line(family, found, standing, merging, tmp_path, capsys):
    model = found_host(family)
    save_host(model, tmp_path)
    status, said, _ = run(capsys, "info", "--model", tmp_path)
    assert status == 0
    width = model.config.intermediate_size * (4 if family == "mixtral" else 1)
    lines = [line for line in said.splitlines() if line.startswith("layer ")]
    assert len(lines) == 2 and re.search("by one forward over a few tokens", said)
    for words in (found % width, standing, merging):
        assert re.search(words, lines[0]), lines[0]


def test_a_family_of_the_table(capsys):
    status, said, _ = run(capsys, "info", "--model", MODEL)
    assert status == 0 and "in the table of families" in said
    assert len(re.findall(r"glu, whole; mergeable by intermediate_size", said)) == 8


def test_a_model_or_a_memory(capsys, tmp_path):
    status, _, err = run(capsys, "info", tmp_path, "--model", MODEL)
    assert status == 2 and "--model is given beside a memory folder" in err
    status, _, err = run(capsys, "info", "--device", "cpu")
    assert status == 2 and "--device is cpu without --model" in err
