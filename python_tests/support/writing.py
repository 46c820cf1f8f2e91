"""Locas-MLP memories to write into, and the oracle: a float64 host with hooks, of torch and transformers alone."""

import copy
import warnings

import torch

import locas_ext as locas

from .helpers import act_formula, random_ids, tiny_model
from .hosts import activation_of, projections, tiny

IDS = random_ids(13, seed=5)
SCALE = 0.5


def writable(family="opt", dtype=torch.float32, rank=4, host=None, **config):
    """-> a fresh host and its Locas-MLP memory."""
    model = (tiny_model(dtype=dtype) if family == "llama" else tiny(family).to(dtype)) if host is None else host
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model, locas.attach(model, locas.LocasConfig(rank=rank, scale=SCALE, variant="mlp", **config))


class PlainWriter:
    """A float64 copy of a host; hooks keep what goes in and out of each FFN and add slots [2, r, d] to it."""

    def __init__(self, model, slots=None):
        twin = copy.deepcopy(model)
        if hasattr(twin, "_locas_memory"):
            twin._locas_memory.detach()
        self.model = twin.double().eval().requires_grad_(True)
        self.activation = activation_of(model)
        gated = model.config.model_type == "llama"
        pairs = [(layer.mlp, layer.mlp) for layer in self.model.model.layers] if gated else projections(self.model)
        self.slots = [None] * len(pairs) if slots is None else list(slots.detach().double().cpu())
        self.inputs, self.outputs = [None] * len(pairs), [None] * len(pairs)
        for index, (first, last) in enumerate(pairs):
            first.register_forward_pre_hook(lambda module, args, i=index: self.inputs.__setitem__(i, args[0]))
            last.register_forward_hook(lambda module, args, y, i=index: self.add(i, y))

    def add(self, index, y):
        x = self.inputs[index]
        if self.slots[index] is not None:
            key, value = self.slots[index]
            y = y + SCALE * act_formula(x @ key.T, self.activation) @ value
        self.outputs[index] = y
        return y

    def nll(self, ids):
        """[n - 1], with a graph."""
        logits = self.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    def rows(self, tensors):
        return torch.stack([t.reshape(-1, t.shape[-1]) for t in tensors])

    def ask(self, ids, positions=None, exact=False):
        """-> A and G [L, n, d] of the tokens at `positions`, and each token's NLL [len(ids) - 1]."""
        positions = range(1, len(ids)) if positions is None else positions
        nll, own = self.nll(ids), torch.tensor(positions) - 1
        asked = [nll[t : t + 1] for t in own] if exact else [nll[own]]
        gradients = [self.rows(torch.autograd.grad(-a.sum(), self.outputs, retain_graph=True)) for a in asked]
        if exact:
            gradient = torch.stack([g[:, t] for g, t in zip(gradients, own, strict=False)], dim=1)
        else:
            gradient = gradients[0][:, own]
        return self.rows(self.inputs)[:, own].detach(), gradient, nll.detach()


def expected_slots(inputs, gradients, epsilon):
    norm = gradients.square().sum((0, 2)).sqrt()
    return torch.stack([inputs / inputs.norm(dim=-1, keepdim=True), epsilon * gradients / norm[:, None]], dim=1), norm


def written(memory, start=0):
    return memory.slots[:, :, start : memory.state.used]


def everything(memory):
    state = memory.state
    copies = [arena.compute.clone() for arena in state.arenas]
    return memory.version, state.used, state.capacity, memory.gather_slots(), copies


def assert_unchanged(memory, before):
    now = everything(memory)
    assert now[:3] == before[:3]
    assert torch.equal(now[3], before[3]) and all(torch.equal(a, b) for a, b in zip(now[4], before[4], strict=False))


def breaking_gradient(model, factor=float("nan")):
    return model.lm_head.register_full_backward_pre_hook(lambda module, grad: (grad[0] * factor,))
