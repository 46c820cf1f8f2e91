"""Tiny random hosts, float64 oracles and comparisons for the tests. The oracles use torch and nothing of the package."""

import copy
import math

import torch
import torch.nn.functional as F
import transformers

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


# ---- hosts and texts ------------------------------------------------------------------------------------------
def tiny_model(family="llama", seed=0, dtype=torch.float32, **settings):
    """A random causal language model small enough for a test, in eval mode."""
    config_class, model_class = FAMILIES[family]
    fields = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    if family == "mistral":
        fields["sliding_window"] = None
    fields.update(settings)
    torch.manual_seed(seed)
    return model_class(config_class(**fields)).to(dtype).eval()


def tiny_opt(vocab_size=61, positions=64):
    """A random OPT: a host whose FFNs have two layers."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=positions,
        init_std=0.25,
        dropout=0.0,
    )
    return transformers.OPTForCausalLM(config).eval()


def save_host(model, folder):
    """-> the folder, with the model and the shipped tokenizer, as --model takes it."""
    from locas_ext.evaluation.assets import MODEL

    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def random_ids(n, seed=0, vocab=61):
    return torch.randint(3, vocab, (n,), generator=torch.Generator().manual_seed(seed))


def repeated_text(length, repeats, seed=0):
    return random_ids(length, seed).repeat(repeats)


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def _attentions(config):
    """The attention of a config and of those inside it."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: _attentions(sub) for name, sub in inner.items() if sub is not None}
    return {"": config._attn_implementation, **found}


def snapshot(model):
    """Everything of a host that a memory must leave alone."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "forwards": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "hooks": {name: [list(module.__dict__[kind]) for kind in HOOKS] for name, module in modules.items()},
        "config": (model.config.to_dict(), _attentions(model.config)),
    }


def assert_same_host(
    model,
    before,
    what=("state", "gradients", "requires_grad", "training", "attributes", "forwards", "hooks", "config"),
):
    now = snapshot(model)
    for key in {"state", "gradients"} & set(what):
        assert list(now[key]) == list(before[key])
        for name, tensor in before[key].items():
            same = now[key][name] is None if tensor is None else torch.equal(now[key][name], tensor)
            assert same, f"{name} changed ({key})"
    for key in set(what) - {"state", "gradients"}:
        assert now[key] == before[key], f"{key} changed"


# ---- the mathematics, once more -------------------------------------------------------------------------------
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "gelu_new", "relu", "relu2", "quick_gelu", "xielu(0.75,1.25)")


def act_formula(x, name):
    """From the definitions; for float64."""
    if name in ("relu", "relu2"):
        return torch.where(x > 0, x**2 if name == "relu2" else x, 0 * x)
    if name.startswith("xielu"):
        return torch.where(x > 0, 0.75 * x**2, 1.25 * (torch.expm1(x.clamp(max=0)) - x)) + x / 2
    if name in ("silu", "quick_gelu"):
        return x / (1 + torch.exp(-(1.702 if name == "quick_gelu" else 1) * x))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def act_torch(x, name):
    """What a plain torch model would call, at any dtype."""
    if name in ("silu", "gelu", "relu"):
        return getattr(F, name)(x)
    if name == "relu2":
        return F.relu(x).square()
    if name.startswith("xielu"):
        return torch.where(x > 0, 0.75 * x * x, 1.25 * (torch.expm1(x.clamp(max=0)) - x)) + 0.5 * x
    return x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else F.gelu(x, approximate="tanh")


def plain_sideway(x, slots, scale, activation, act):
    gate, key, value = slots.unbind(0)
    return scale * ((act(x @ gate.T, activation) * (x @ key.T)) @ value)


def plain_sideway_mlp(x, slots, scale, activation, act):
    key, value = slots.unbind(0)
    return scale * (act(x @ key.T, activation) @ value)


def plain_ffn(x, host, slots, scale, activation, act):
    gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = host
    gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    return F.linear(act(gate, activation) * up, down_weight, down_bias) + plain_sideway(x, slots, scale, activation, act)


# ---- comparisons ----------------------------------------------------------------------------------------------
def assert_as_exact_as_torch(name, ours, peer, exact, rounding=None):
    """Our largest error is at most twice that of the same computation in plain torch at the same dtype, plus a floor.

    The floor, relative to the exact result's largest magnitude: one rounding to the dtype, as a peer may be exact by
    luck; and 4 roundings of the float32 arithmetic inside a kernel, where exp is a polynomial of relative error
    2e-7 (1.7 roundings) and the sigmoid and its products add the others.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps if rounding is None else rounding
    error, peer_error = (ours.double() - exact).abs(), (peer.double() - exact).abs()
    floor = (rounding + 4 * torch.finfo(torch.float32).eps) * exact.abs().max().item()
    bound = 2 * peer_error.max().item() + floor
    if not (error.max().item() <= bound):  # NaN must fail too
        worst = torch.unravel_index(torch.nan_to_num(error, nan=math.inf).argmax(), error.shape)
        worst = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{name}: worst at {worst} of {list(exact.shape)}: ours {ours[worst].item():.9g}, torch at this dtype "
            f"{peer[worst].item():.9g}, exact {exact[worst].item():.9g}; error {error[worst].item():.3g}, "
            f"allowed {bound:.3g} = 2 * {peer_error.max().item():.3g} + {floor:.3g}"
        )


def relative_distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- a memory in plain torch ----------------------------------------------------------------------------------
class PlainMemory:
    """Memorizing written down a second time: a host copy in float64, forward hooks, torch.autograd, torch.optim.

    slots, scale: taken over from a memory under test, so that both start from the same.
    """

    def __init__(self, model, slots, scale, layers=None, optimizer="adamw", learning_rate=4e-3, clip=True):
        self.model = copy.deepcopy(model).double().requires_grad_(False).eval()
        self.activation = model.config.hidden_act
        decoder = self.model.model.layers
        self.ffns = [decoder[i].mlp for i in (range(len(decoder)) if layers is None else layers)]
        self.slots = [layer.detach().double().clone().requires_grad_(True) for layer in slots]
        self.scale, self.clip = [float(s) for s in scale], clip
        if optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.slots, lr=learning_rate, weight_decay=0.0, foreach=False)
        else:
            self.optimizer = torch.optim.SGD(self.slots, lr=learning_rate, foreach=False)
        for ffn, layer, tau in zip(self.ffns, self.slots, self.scale, strict=False):
            ffn.register_forward_hook(
                lambda module, args, y, layer=layer, tau=tau: (
                    y + plain_sideway(args[0], layer, tau, self.activation, act_formula)
                )
            )

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.clip:
            with torch.no_grad():
                for layer in self.slots:
                    layer.div_(layer.norm(dim=-1, keepdim=True).clamp_min(1.0))

    def stacked(self):
        return torch.stack([layer.detach() for layer in self.slots])


def chunk_bounds(n, stride):
    return [(start, min(start + stride, n)) for start in range(0, n, stride)]


def window_begin(start, end, window):
    """Where the window of chunk [start, end) begins: at most `window` tokens, but one before the chunk's first target."""
    return min(max(0, end - window), max(start, 1) - 1)


def truncated_nll(model, ids, start, end, window):
    """Summed NLL of a chunk's tokens given what a window of `window` tokens holds before them, by one plain forward."""
    begin, first = window_begin(start, end, window), max(start, 1)
    logits = logits_of(model, ids[begin : end - 1]).double()
    log_p = logits[first - 1 - begin :].log_softmax(-1)
    return -log_p.gather(1, ids[first:end, None]).sum()


def double_host(model):
    return copy.deepcopy(model).double()


# ---- memories -------------------------------------------------------------------------------------------------
def attached(family="llama", rank=4, scale="host", seed=0, dtype=torch.float32, model_settings=None, **config):
    """-> a fresh tiny model and its memory, with a scale large enough to see learning in a few steps."""
    import locas_ext as locas

    model = tiny_model(family, seed, dtype, **(model_settings or {}))
    return model, locas.attach(model, locas.LocasConfig(rank=rank, scale=scale, **config))


TEXT = repeated_text(16, 4)  # 64 tokens that say one thing four times
SETTINGS = dict(window=24, stride=8, learning_rate=1e-2, progress=False)


def learned(family="llama", **arguments):
    """As `attached`, after memorizing TEXT."""
    model, memory = attached(family, **arguments)
    memory.memorize(TEXT, **SETTINGS)
    return model, memory


def plain_memorize(plain, ids, window, stride, epochs=1, context_gradient=False, bos=None):
    """The online protocol with a PlainMemory, one plain forward at a time. -> the chunks' NLLs."""
    nlls = []
    for start, end in chunk_bounds(len(ids), stride):
        if end == 1:
            continue
        first = max(start, 1)
        begin = window_begin(start, end, window if bos is None else window - 1)
        tokens = ids[begin : end - 1] if bos is None else torch.cat([torch.tensor([bos]), ids[begin : end - 1]])
        targets = ids[first:end]
        for epoch in range(epochs):
            context, inputs = tokens[None, : len(tokens) - len(targets)], tokens[None, len(tokens) - len(targets) :]
            if context_gradient or context.shape[1] == 0:
                logits = plain.model(input_ids=tokens[None], use_cache=False).logits[0, -len(targets) :]
            else:
                with torch.no_grad():
                    cache = plain.model(input_ids=context, use_cache=True).past_key_values
                logits = plain.model(input_ids=inputs, past_key_values=cache).logits[0]
            nll = -logits.log_softmax(-1).gather(1, targets[:, None]).sum()
            if epoch == 0:
                nlls.append(nll.item())
            plain.step(nll / len(targets))
    return nlls
