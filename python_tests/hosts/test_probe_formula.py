"""The probe at attach: what an FFN computes is compared with its formula, not taken from its name."""

import pytest
import torch
from support.helpers import TEXT, assert_same_host, logits_of, snapshot
from support.hosts import HOST_SETTINGS, TWO_LAYER, config_for, tiny
from torch import nn

import locas_ext as locas

RUN = dict(window=24, stride=8, progress=False)
STILL = dict(RUN, learning_rate=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", sorted(HOST_SETTINGS))
def test_every_family_computes_its_formula_in_every_dtype(family, dtype):
    memory = locas.attach(tiny(family).to(dtype), config_for(family))
    attachment = memory._attachment
    assert attachment.probe.skipped is None and [ffn.differs for ffn in attachment.host.ffns.values()] == [None, None]
    assert {entry.windows for entry in memory.status()} == {"two forwards per window"}
    assert attachment.host.reading.writes == 2


class Clamped(nn.Module):
    """An activation that differs from SiLU only where no short text reaches."""

    def forward(self, x):
        return torch.nn.functional.silu(x).clamp(max=7.0)


def replaced_activation(ffn):
    name = next(name for name, child in ffn.named_children() if not list(child.parameters()))
    setattr(ffn, name, nn.Tanh())


def clamped_activation(ffn):
    ffn.act_fn = Clamped()


def scaled_output(ffn):
    own = ffn.forward
    ffn.forward = lambda x: 1.01 * own(x)


def changed_class(ffn):
    class Skip(type(ffn)):
        def forward(self, x):
            return super().forward(x) + x

    ffn.__class__ = Skip


def product_beside_the_modules(ffn):
    def forward(x):
        gate, up = (nn.functional.linear(x, layer.weight, layer.bias) for layer in (ffn.gate_proj, ffn.up_proj))
        return nn.functional.linear(torch.relu(gate) * up, ffn.down_proj.weight, ffn.down_proj.bias)

    ffn.forward = forward


def swapped_halves(ffn):
    def forward(x):
        return ffn.down_proj(ffn.act_fn(ffn.up_proj(x)) * ffn.gate_proj(x))

    ffn.forward = forward


CHANGES = [
    ("llama", replaced_activation),
    ("phi3", replaced_activation),
    ("gemma2", replaced_activation),
    ("qwen3", clamped_activation),
    ("llama", scaled_output),
    ("mistral", changed_class),
    ("llama", product_beside_the_modules),
    ("smollm3", swapped_halves),
]


@pytest.mark.parametrize("family, change", CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_an_ffn_that_computes_something_else_keeps_its_own_forward(family, change):
    model = tiny(family)
    change(model.get_decoder().layers[1].mlp)
    host = logits_of(model, TEXT)
    memory = locas.attach(model, config_for(family))
    memory.memorize(TEXT, **STILL)
    assert memory.version > 0
    # rows of one batch are computed in blocks of their own, so a learned-nothing memory may cost a rounding
    torch.testing.assert_close(logits_of(model, TEXT), host, rtol=1e-5, atol=1e-5 * host.abs().max().item())
    first, second = memory.status()
    assert (first.path, second.path) == ("whole", "sideway")
    differs = memory._attachment.host.ffns[1].differs
    assert differs.startswith("FFN computes something else than down_proj(")
    assert second.reason not in ("", "plain projections")
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot merge: layer 1"):
        memory.merge_and_unload()
    assert_same_host(model, before)
    assert memory.memorize(TEXT, **RUN).perplexity > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TWO_LAYER)
def test_a_two_layer_ffn_with_another_activation_is_not_merged(family, dtype):
    model = tiny(family)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if "activation" in type(child).__name__.lower() or isinstance(child, nn.ReLU | nn.GELU):
                setattr(module, name, nn.Hardtanh())
    memory = locas.attach(model.to(dtype), config_for(family))
    with pytest.raises(ValueError, match="cannot merge: layer 0"):
        memory.merge_and_unload()


def test_an_ffn_that_takes_no_part_in_the_forward_is_refused():
    model = tiny("qwen2")
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    before = snapshot(model)
    with pytest.raises(ValueError, match="the FFN of layer 1 of Qwen2ForCausalLM did not run"):
        locas.attach(model, config_for("qwen2"))
    assert_same_host(model, before)
