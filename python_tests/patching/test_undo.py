"""detach() undoes what attach() did, under every mode and beside other owners, and lets go of the host."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from support.helpers import SETTINGS, TEXT, assert_same_host, attached, learned, logits_of, snapshot, tiny_model
from support.hosts import config_for, tiny

import locas_ext as locas

MODES = [torch.no_grad, torch.enable_grad, torch.inference_mode]


@pytest.mark.parametrize("rehome", [False, True], ids=["plain", "rehomed"])
@pytest.mark.parametrize("detach_in", MODES)
@pytest.mark.parametrize("attach_in", MODES)
def test_attach_and_detach_under_every_grad_mode(attach_in, detach_in, rehome):
    model = tiny_model()
    before, host = snapshot(model), logits_of(model, TEXT)
    with attach_in():
        memory = locas.attach(model, locas.LocasConfig(rank=4), rehome=rehome)
    memory.memorize(TEXT, **SETTINGS)
    with detach_in():
        memory.detach()
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, TEXT), host)
    model(input_ids=TEXT[None], labels=TEXT[None]).loss.backward()  # and it can be trained
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_host_made_under_inference_mode_is_given_back(family):
    with torch.inference_mode():
        model = tiny(family)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for _ in range(2):
        locas.attach(model, config_for(family)).detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before and any(before.values())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", ["bfloat16", "float64", "meta"])
def test_torchs_defaults_are_of_no_consequence(family, dtype, setting, tmp_path):
    model = tiny(family).to(dtype)
    twin, before = copy.deepcopy(model), snapshot(model)
    own = {"clip": 1.5, "row_length": "host"} if dtype == torch.bfloat16 else {}
    config = locas.LocasConfig(**{**config_for(family).to_dict(), **own})
    update = locas.Backprop(learning_rate=1e-2, decay_after=3, value_learning_rate=5e-3 if own else None)
    settings = {**SETTINGS, "learning_rate": None, "update": update}
    want = locas.attach(twin, config)
    want.memorize(TEXT, **settings)
    try:
        if setting == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, setting))
        memory = locas.attach(model, config)
        memory.memorize(TEXT, **settings)
        memory.save_pretrained(tmp_path, optimizer=True)
        memory.load(tmp_path)
        memory.restore(memory.snapshot())
        slots = memory.slots.clone()
        memory.detach()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert slots.dtype == torch.float32 and torch.equal(slots, want.slots)
    assert_same_host(model, before)


# ---- other owners ---------------------------------------------------------------------------------------------
def test_forks_and_their_origin_end_in_any_order():
    for fork_first in (True, False):
        model, memory = learned()
        before = [name for name, p in model.named_parameters() if p.requires_grad]
        fork = memory.fork()
        first, second = (fork, memory) if fork_first else (memory, fork)
        first.detach()
        assert not any(p.requires_grad for p in model.parameters()) and before == []
        assert second.status()[0].backend.endswith(", whole")
        second.memorize(TEXT, **SETTINGS)
        second.detach()
        assert all(p.requires_grad for p in model.parameters())


def test_a_fork_that_is_dropped_holds_nothing():
    model, memory = learned()
    fork = memory.fork()
    fork.detach()
    del fork
    memory.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_what_the_user_froze_or_unfroze_stays():
    model = tiny_model()
    frozen = model.lm_head.weight.requires_grad_(False)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    opened = model.model.norm.weight.requires_grad_(True)
    memory.detach()
    assert not frozen.requires_grad and opened.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1


def test_adapters_added_while_attached_stay_the_only_trainable_ones():
    peft = pytest.importorskip("peft")
    model, memory = attached()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    memory.memorize(TEXT, **SETTINGS)
    assert all(p.grad is None for p in wrapped.parameters())
    memory.detach()
    assert [name for name, p in wrapped.named_parameters() if p.requires_grad] == trainable


@pytest.mark.parametrize("how", ["assign", "overwrite", "swap"])
def test_parameters_that_torch_replaced_while_attached_are_given_back(how):
    model, memory = attached()
    setting = {"overwrite": "overwrite_module_params", "swap": "swap_module_params"}.get(how)
    if setting is None:
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    else:
        switch = getattr(torch.__future__, f"set_{setting}_on_conversion")
        switch(True)
        model.to(torch.bfloat16)
        switch(False)
    memory.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_a_decoder_of_two_models_has_one_memory():
    model, other = tiny_model(), tiny_model(seed=1)
    other.model = model.model
    before, memory = snapshot(other), locas.attach(model, locas.LocasConfig(rank=4, layers=[1]))
    held = snapshot(other)
    with pytest.raises(ValueError, match="the FFN of layer 1 is another model's too"):
        locas.attach(other, locas.LocasConfig(rank=4))
    assert_same_host(other, held)
    memory.detach()
    locas.attach(other, locas.LocasConfig(rank=4)).detach()
    assert_same_host(other, before)


def test_another_head_on_the_same_decoder():
    model, memory = learned()
    model.score = torch.nn.Linear(32, 2)
    memory.detach()
    assert all(p.requires_grad for p in model.parameters())


# ---- letting go -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "opt", "rehomed"])
def test_host_and_slots_are_freed_without_a_collection(kind):
    model = tiny("llama" if kind == "rehomed" else kind)
    memory = locas.attach(model, config_for(model.config.model_type), rehome=kind == "rehomed")
    memory.memorize(TEXT, **SETTINGS)
    with memory.disabled():
        logits_of(model, TEXT)
    memory.slots, memory.status()
    held = weakref.ref(model), weakref.ref(memory.state), weakref.ref(memory.state.arenas[0])
    gc.collect()
    gc.disable()
    try:
        memory.detach()
        del model, memory
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


# ---- files ----------------------------------------------------------------------------------------------------
def test_a_rehomed_host_has_no_shared_storage_for_those_who_save_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny_model()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = locas.attach(model, locas.LocasConfig(rank=4), rehome=True)
    memory.memorize(TEXT, **SETTINGS)
    state = model.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    safetensors.save_file(state, tmp_path / "file.safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    for name in ("file", "model"):
        saved = safetensors.load_file(tmp_path / f"{name}.safetensors")
        assert set(saved) == set(plain) and all(torch.equal(saved[key], plain[key]) for key in plain)
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    copy.deepcopy(model).load_state_dict(plain)


# ---- configs --------------------------------------------------------------------------------------------------
def test_learning_leaves_the_attention_of_a_vision_tower_alone():
    text = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    vision = dict(model_type="clip_vision_model", projection_dim=32, hidden_size=32, intermediate_size=48)
    vision |= dict(num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "eager"})
    before = snapshot(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.memorize(TEXT, **SETTINGS)
    memory.detach()
    assert model.config.vision_config._attn_implementation == "eager"
    assert_same_host(model, before)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "with a fork"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
def test_a_merge_gives_back_what_was_trainable(family, shared):
    model = tiny(family)
    frozen = [name for name, _ in model.named_parameters()][3::4]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    memory = locas.attach(model, config_for(family))
    fork = memory.fork() if shared else None
    memory.memorize(TEXT, **SETTINGS)
    memory.merge_and_unload(8)
    if fork is not None:
        assert not any(parameter.requires_grad for parameter in fork.model.parameters())
        fork.detach()
        assert {name: p.requires_grad for name, p in fork.model.named_parameters()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    locas.unmerge(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("size", [50, 61, 70])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_a_head_resized_while_attached_is_given_back(family, size):
    model = tiny(family)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    memory = locas.attach(model, config_for(family))
    model.resize_token_embeddings(size, mean_resizing=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    memory.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("forked", [False, True], ids=["copied", "forked"])
@pytest.mark.parametrize("rehome", [False, True], ids=["plain", "rehomed"])
def test_a_copy_is_given_back_too(rehome, forked):
    model = tiny("llama")
    before = snapshot(model)
    memory = locas.attach(model, config_for("llama"), rehome=rehome)
    memory.memorize(TEXT, **SETTINGS)
    other = memory.fork() if forked else locas.memory_of(copy.deepcopy(model))
    logits_of(other.model, TEXT)
    memory.detach()
    other.detach()
    for host in (model, other.model):
        assert_same_host(host, before)
