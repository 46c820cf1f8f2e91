"""FFNs that do not compute their family's formula, and models that cannot be a host: noticed on the object."""

import copy
import functools
import re
import types

import pytest
import torch
import transformers
from support.helpers import SETTINGS, TEXT, assert_same_host, learned, logits_of, snapshot, tiny_model
from support.hosts import HOST_SETTINGS, config_for, tiny

import locas_ext as locas
from locas_ext.hosts.registry import inspect_host


def other_activation(model, layer):
    layer.mlp.act_fn = torch.nn.ReLU()


def own_forward(model, layer):
    stock = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * stock(x)


def bound_to_the_instance(model, layer):
    layer.mlp.forward = types.MethodType(lambda self, x: self.down_proj(self.up_proj(x)), layer.mlp)


def a_subclass(model, layer):
    class Scaled(type(layer.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.mlp.__class__ = Scaled


def disguised_class_forward(model, layer):
    kind = type(layer.mlp)

    class Disguised(kind):
        forward = functools.wraps(kind.forward)(lambda self, x: self.down_proj(self.up_proj(x)))

    layer.mlp.__class__ = Disguised


def activation_forward(model, layer):
    layer.mlp.act_fn.forward = torch.tanh


def activation_hook(model, layer):
    layer.mlp.act_fn.register_forward_hook(lambda module, args, y: 2 * y)


CHANGES = {
    other_activation: "act_fn is a torch.nn.modules.activation.ReLU, not a plain silu",
    own_forward: "the FFN has a forward of its own",
    bound_to_the_instance: "the FFN has a forward of its own",
    a_subclass: "the FFN is a .*Scaled, which .* does not define",
    disguised_class_forward: "the FFN is a .*Disguised, which .* does not define",
    activation_forward: "act_fn has a forward of its own",
    activation_hook: "act_fn has hooks",
}


@pytest.mark.parametrize("after_attach", [False, True], ids=["before attach", "while attached"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_ffn_stays_what_it_is(change, after_attach):
    plain = tiny_model()
    change(plain, plain.model.layers[1])
    host = logits_of(plain, TEXT)
    model = tiny_model()
    if not after_attach:
        change(model, model.model.layers[1])
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    memory.memorize(TEXT, **{**SETTINGS, "learning_rate": 0.0})  # learns nothing: the values stay 0
    if after_attach:
        change(model, model.model.layers[1])
    torch.testing.assert_close(logits_of(model, TEXT), host, rtol=1e-4, atol=1e-4)
    if change is not own_forward or not after_attach:  # which then stands around the memory's, not in its place
        status = memory.status()
        assert status[0].reason == "plain projections" and status[1].backend.endswith("sideway")
        assert re.search(CHANGES[change], status[1].reason)
    with pytest.raises(ValueError, match="cannot merge: layer 1's"):
        memory.merge_and_unload()


def test_a_patched_class_is_noticed(monkeypatch):
    model, memory = learned()
    kind = type(model.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert "whose forward was replaced" in memory.status()[0].reason
    monkeypatch.undo()
    assert memory.status()[0].reason == "plain projections"


@pytest.mark.parametrize("family", sorted(HOST_SETTINGS))
def test_no_family_has_an_obstacle_of_its_own(family):
    host = inspect_host(tiny(family).requires_grad_(False))
    assert [ffn.obstacle() for ffn in host.ffns.values()] == [None, None]


def test_another_activation_module_of_the_same_function_is_none():
    model, memory = learned()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.SiLU()
    assert memory.status()[0].reason == "plain projections"


# ---- what cannot be a host ------------------------------------------------------------------------------------
def vision_encoder_decoder():
    vision = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14
    )
    text = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, bos_token_id=1, eos_token_id=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    return transformers.VisionEncoderDecoderModel(config)


def prompt_tuned():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def modules_to_save():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))


def one_ffn_in_two_layers():
    model = tiny_model(num_hidden_layers=4)
    model.model.layers[3].mlp = model.model.layers[1].mlp
    return model


def a_narrow_ffn():
    model = tiny_model()
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = 3
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(narrow)
    return model


REFUSED = {
    vision_encoder_decoder: "VisionEncoderDecoderModel .* is an encoder and a decoder",
    prompt_tuned: "PeftModelForCausalLM of type PROMPT_TUNING",
    modules_to_save: "peft.utils.other.ModulesToSaveWrapper without gate_proj",
    one_ffn_in_two_layers: "layers 1 and 3 share one FFN",
    a_narrow_ffn: "only 3 neurons to clone",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_cannot_be_a_host_is_refused_by_name(make):
    model = make()
    before = snapshot(model)
    variant = "mlp" if make is vision_encoder_decoder else "glu"
    with pytest.raises(ValueError, match=REFUSED[make]):
        locas.attach(model, locas.LocasConfig(rank=4, variant=variant))
    assert_same_host(model, before)


# ---- swapped modules ------------------------------------------------------------------------------------------
def swap_projections(model):
    for module in list(model.modules()):
        for child, projection in list(module.named_children()):
            if isinstance(projection, torch.nn.Linear) and child in ("fc1", "fc2", "gate_proj", "down_proj"):
                fresh = torch.nn.Linear(projection.in_features, projection.out_features, projection.bias is not None)
                fresh.load_state_dict(projection.state_dict())
                setattr(module, child, fresh)


def swap_ffns(model):
    for layer in model.model.layers:
        fresh = type(layer.mlp)(model.config)
        fresh.load_state_dict(layer.mlp.state_dict())
        layer.mlp = fresh


@pytest.mark.parametrize(
    ("family", "swap"),
    [("llama", swap_projections), ("llama", swap_ffns), ("opt", swap_projections), ("phi", swap_projections)],
)
def test_a_memory_stays_when_modules_are_swapped(family, swap):
    model = tiny(family)
    if family == "llama":
        model = tiny(family, mlp_bias=False)
    memory = locas.attach(model, config_for(family))
    memory.memorize(TEXT, **SETTINGS)
    with memory.disabled():
        host = logits_of(model, TEXT)
    taught = logits_of(model, TEXT)
    twin = copy.deepcopy(model)
    swap(twin)
    torch.testing.assert_close(logits_of(twin, TEXT), taught, rtol=1e-5, atol=1e-5)
    locas.memory_of(twin).detach()
    torch.testing.assert_close(logits_of(twin, TEXT), host, rtol=1e-5, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in twin.modules())
    assert torch.equal(logits_of(model, TEXT), taught)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_projections_may_be_called_by_name_and_alone(family):
    model = tiny(family)
    memory = locas.attach(model, config_for(family))
    memory.memorize(TEXT, **SETTINGS)
    taught, x = logits_of(model, TEXT), torch.randn(1, 32)
    ffn = inspect_host(model).ffns[0]
    first, last = ffn.projections()[0], ffn.projections()[-1]
    plain = copy.deepcopy(first)
    plain.__dict__.pop("forward", None)
    assert torch.equal(first(input=x), plain(x))
    last(input=torch.randn(1, 48))
    if family == "llama":
        assert torch.equal(ffn.module(x=x), ffn.module(x))
    assert torch.equal(logits_of(model, TEXT), taught)


def test_a_host_under_accelerates_autocast_learns():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny_model())
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    report = memory.memorize(TEXT.repeat(2), window=32, stride=16, learning_rate=2e-2, progress=False)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens
