"""Hosts inside other libraries' wrappers: the memory runs beside the host's own forward, and says so."""

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, learned, logits_of, relative_distance, tiny_model

import locas_ext as locas

LEARN = dict(window=32, stride=16, learning_rate=2e-2, progress=False)


def logits(model, ids=TEXT):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def check_life(model, tmp_path, obstacle, layer=0):
    """No-op, learning, disabled, save and load, merge refused because of `obstacle` in `layer`, the first, detach."""
    host = logits(model)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    assert torch.equal(logits(model), host)
    report = memory.memorize(TEXT.repeat(3), **LEARN)
    first, last = report.chunks[0], report.chunks[-1]
    assert last.nll / last.tokens < first.nll / first.tokens
    after = logits(model)
    assert not torch.allclose(after, host)
    status = memory.status()
    assert ["sideway" in entry.backend for entry in status].index(True) == layer and obstacle in status[layer].reason
    with memory.disabled():
        assert torch.equal(logits(model), host)
    memory.save_pretrained(tmp_path / "memory")
    memory.load(tmp_path / "memory")
    assert torch.equal(logits(model), after)
    with pytest.raises(ValueError, match=f"cannot merge: layer {layer}'s .*{obstacle}"):
        memory.merge_and_unload()
    assert torch.equal(logits(model), after)
    memory.detach()
    assert torch.equal(logits(model), host)
    return memory


def test_a_lora_wrapped_host(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], lora_dropout=0.2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), lora).eval()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    check_life(model, tmp_path, "up_proj is a peft")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_a_lora_hosts_memory_starts_from_the_weights_it_really_has():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny_model(), lora).eval()
    memory = locas.attach(wrapped, locas.LocasConfig(rank=4))
    memory.initialize(TEXT)
    slots, scale = memory.slots.clone(), memory.scale.clone()
    memory.detach()
    plain = locas.attach(wrapped.merge_and_unload(), locas.LocasConfig(rank=4))
    plain.initialize(TEXT)
    torch.testing.assert_close(slots, plain.slots, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale, plain.scale, rtol=1e-4, atol=1e-6)


class Int8Linear(torch.nn.Module):
    """A projection as quantization libraries make them: integers and row scales, and no float weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("quantized", (weight / scale).round().to(torch.int8))
        self.register_buffer("row_scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.quantized * self.row_scale)


def test_a_quantized_host(tmp_path):
    model = tiny_model()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)))
    check_life(model, tmp_path, "gate_proj is a")
    dequantized = torch.nn.functional.normalize(
        model.model.layers[0].mlp.gate_proj.quantized * model.model.layers[0].mlp.gate_proj.row_scale
    )
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    memory.initialize(TEXT)
    nearest = (memory.slots[0, 0] @ dequantized.T).amax(1)
    torch.testing.assert_close(nearest, torch.ones(4), rtol=1e-5, atol=1e-5)


def test_an_int8_host_of_torchao(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model(hidden_size=64, intermediate_size=96)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    check_life(model, tmp_path, "gate_proj holds a")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_host_quantized_by_bitsandbytes(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes.nn")
    model = tiny_model(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(layer.mlp, name).weight.data
            if bits == 8:
                linear = bnb.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
                linear.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                linear = bnb.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32)
                linear.weight = bnb.Params4bit(weight, requires_grad=False)
                linear.support_avx512bf16_for_cpu = False  # a layout of its own, which has no backward
            setattr(layer.mlp, name, linear.to("cpu"))
    check_life(model.eval(), tmp_path, "gate_proj is a bitsandbytes")


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_an_offloaded_host(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    expected = logits(model)
    if where == "disk":
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    check_life(model, tmp_path, "has a forward of its own")
    assert next(model.parameters()).is_meta


def test_a_host_with_a_device_map(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True)
    check_life(model, tmp_path, "has a forward of its own", layer=1)


def test_a_device_maps_hooks_are_no_obstacle_where_they_only_move_the_input(tmp_path):
    """What device_map="auto" leaves on every module of a host on several devices, here all of it on the CPU."""
    accelerate = pytest.importorskip("accelerate")
    _, memory = learned()
    model = tiny_model()
    places = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name, _ in model.model.named_children()}}
    spread = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    hooked = locas.attach(spread, locas.LocasConfig(rank=4, scale="host"))
    hooked.memorize(TEXT, **SETTINGS)
    assert relative_distance(hooked.slots, memory.slots) < 1e-5  # the host's norms run as they are behind hooks
    memory.restore(hooked.snapshot())
    assert all(entry.backend.endswith(", whole") for entry in hooked.status())
    before = logits(spread)
    merged, expected = hooked.merge_and_unload(), memory.merge_and_unload()
    assert merged.model.layers[0].mlp.up_proj._hf_hook is not None
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


def test_a_hook_of_accelerates_that_does_more_is_an_obstacle():
    accelerate = pytest.importorskip("accelerate")
    model, memory = learned()
    projection = model.model.layers[0].mlp.up_proj
    accelerate.hooks.add_hook_to_module(projection, accelerate.hooks.ModelHook())
    assert memory.status()[0].backend == "matmul, sideway"
    accelerate.hooks.add_hook_to_module(projection, accelerate.hooks.AlignDevicesHook("cpu"))
    assert memory.status()[0].backend.endswith(", whole")
    projection._old_forward = lambda x: 2 * torch.nn.Linear.forward(projection, x)
    assert memory.status()[0].backend == "matmul, sideway"


def test_hooks_on_a_projection_still_run():
    model, memory = learned()
    before, calls = logits_of(model, TEXT), []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits_of(model, TEXT), before, rtol=1e-4, atol=1e-5)
    assert calls and memory.status()[0].reason == "up_proj has hooks"
    handle.remove()
    assert memory.status()[0].backend.endswith(", whole")


def test_a_host_that_is_trained_too_gets_its_gradient():
    model, memory = learned()
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.backward()
    assert weight.grad.abs().max() > 0 and memory.parameters()[0].grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, memory = learned()
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # a reentrant checkpoint runs backward only if its input does
        memory.state.zero_grad()
        model(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.backward()
        gradients.append(memory.state.whole("grad").clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    twin = learned()[1]
    for run in (memory, twin):
        run.memorize(TEXT, **LEARN)
    torch.testing.assert_close(memory.slots, twin.slots, rtol=1e-4, atol=1e-6)  # what needs no gradient is added otherwise


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_host_learns_and_is_not_recompiled_by_updates_and_swaps(compiled_first, tmp_path):
    torch._dynamo.reset()
    model = tiny_model()
    if compiled_first:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        host = logits(compiled)
        memory = locas.attach(compiled, locas.LocasConfig(rank=4, scale="host"))
        assert memory.model is model and locas.memory_of(compiled) is memory
    else:
        memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        host = logits(compiled)
    torch.testing.assert_close(logits(compiled), host)
    memory.memorize(TEXT, **LEARN)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(compiled), host)
    first = logits(compiled)
    memory.save_pretrained(tmp_path / "first")
    torch._dynamo.config.error_on_recompile = True
    try:
        memory.memorize(TEXT, **LEARN)
        torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)
        assert not torch.equal(logits(compiled), first)
        memory.load(tmp_path / "first")
        assert torch.equal(logits(compiled), first)
    finally:
        torch._dynamo.config.error_on_recompile = False
    with memory.disabled():
        torch.testing.assert_close(logits(compiled), host)


def test_gradients_of_a_compiled_host():
    torch._dynamo.reset()
    model, memory = learned()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        memory.state.zero_grad()
        run(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.backward()
        gradients.append(memory.state.whole("grad").clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_a_float16_hosts_small_gradients_are_not_lost():
    """A loss so flat that its float16 gradients would be subnormal without the loss scale."""
    text = TEXT.repeat(2)
    settings = dict(LEARN, optimizer="sgd", learning_rate=1.0)
    model16, half = attached(scale=1e-4, dtype=torch.float16)
    half.memorize(text, **settings)
    model32, full = attached(scale=1e-4)
    full.memorize(text, **settings)
    values16, values32 = half.slots[:, 2], full.slots[:, 2]
    assert (values16 - values32).norm() < 0.05 * values32.norm()


def test_moving_the_host_moves_the_memory():
    model, memory = learned()
    expected = logits_of(model, TEXT)
    model.to(torch.bfloat16)
    rough = logits_of(model, TEXT)
    assert rough.dtype == torch.bfloat16 and memory.state.arenas[0].compute.dtype == torch.bfloat16
    assert memory.slots.dtype == torch.float32
    assert (rough.float() - expected).abs().max() < 0.1 * expected.abs().max()
    memory.memorize(TEXT, **LEARN)
    model.to(torch.float32)
    logits_of(model, TEXT)
    assert memory.state.arenas[0].compute is memory.slots
