"""What Python costs around the native calls of a patched FFN, at a shape too small to compute; bench.ffn prints it."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import locas_ext as locas
from locas_ext import ops
from locas_ext.ops.backends import glu_ffn_backend

from .arms import SCALE
from .harness import interleaved, summary


def _one_layer_host() -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
    )
    return Qwen3ForCausalLM(config).eval()


def overhead(rounds: int) -> dict:
    """Microseconds of Python around the torch and native calls of a patched FFN, at a shape too small to compute."""
    model = _one_layer_host()
    memory = locas.attach(model, locas.LocasConfig(rank=8))
    memory.memorize(torch.arange(32), window=16, stride=8, progress=False)
    patched, mlp = memory._attachment.ffns[0], model.model.layers[0].mlp
    x = torch.randn(1, 1, 16)
    x2d, host, views = x[0], patched.ffn.weights(), memory.state.arenas[0].views[0]
    slots = memory.gather_slots()[0]  # a copy: who takes the slots themselves has them compared in each forward
    backend = glu_ffn_backend("bench.ffn", x, host.gate, "auto")

    def repeat(call, times=50):
        def run():
            with torch.no_grad():
                for _ in range(times):
                    call()

        return run

    empty = torch.nn.Identity()
    arms = {
        "module call": repeat(lambda: empty(x)),
        "patched": repeat(lambda: mlp(x)),
        "bare": repeat(lambda: backend.glu_ffn_forward(x2d, host, views, SCALE, 0, save=False)),
        "op": repeat(lambda: ops.glu_ffn(x, *host[:3], slots, SCALE)),
        "eager": repeat(lambda: patched.original(x)),
    }
    seconds = interleaved(arms, rounds)
    each = {name: summary(values)["median_us"] / 50 for name, values in seconds.items()}
    around = each["bare"] + each["module call"]
    return {**each, "overhead of a patched FFN": each["patched"] - around, "overhead of the op": each["op"] - around}
