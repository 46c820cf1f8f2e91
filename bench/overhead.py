"""What a memory costs in Python around its kernels: per call of a patched FFN, and per forward of the decoder.

The FFN is too small to compute, so its time is that of the calls. `alone` is a call of the FFN by itself, `in a forward` one
inside a forward of the decoder, whose hooks take over changes from outside once for all FFNs; from both the time of the kernels
and of an empty module's call is subtracted. A decode step is one token through the shipped model behind 64 in a KV cache:
`watch` is what the hooks on the decoder take of it, with the slots compared or not. Times are of this thread's CPU, so a busy
machine counts as far as it makes caches cold.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM

import locas_ext as locas
from locas_ext import ops
from locas_ext.evaluation.assets import MODEL
from locas_ext.hosts.cache_names import cache_argument
from locas_ext.ops.backends import glu_ffn_backend

from .arms import SCALE
from .harness import interleaved, parse, report, summary

CALLS = 50  # of an FFN in a round


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


@contextmanager
def _forward_of(model: torch.nn.Module, memory: locas.Memory):
    """What is done around the layers in a decoder's forward."""
    watch, decoder = memory._attachment.watch, model.base_model
    watch.before(decoder, (), {})
    yield
    watch.after(decoder, (), {}, object())


def overhead(rounds: int) -> dict:
    """Microseconds of Python around the torch and native calls of a patched FFN, at a shape too small to compute."""
    model = _one_layer_host()
    memory = locas.attach(model, locas.LocasConfig(rank=8))
    memory.memorize(torch.arange(32), window=16, stride=8, progress=False)
    patched, mlp = memory._attachment.ffns[0], model.model.layers[0].mlp
    x = torch.randn(1, 1, 16)
    x2d, host, views = x[0], patched.ffn.weights(), memory.state.arenas[0].views[0]
    slots = memory.gather_slots()[0]  # a copy: who takes the slots themselves has them compared in each forward
    backend = glu_ffn_backend("bench.overhead", x, host.gate, "auto")

    @torch.no_grad()
    def repeat(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    def in_a_forward() -> None:
        with _forward_of(model, memory):
            repeat(lambda: mlp(x))

    empty = torch.nn.Identity()
    arms = {
        "module call": lambda: repeat(lambda: empty(x)),
        "patched, alone": lambda: repeat(lambda: mlp(x)),
        "patched, in a forward": in_a_forward,
        "bare": lambda: repeat(lambda: backend.glu_ffn_forward(x2d, host, views, SCALE, 0, save=False)),
        "op": lambda: repeat(lambda: ops.glu_ffn(x, *host[:3], slots, SCALE)),
        "eager": lambda: repeat(lambda: patched.original(x)),
    }
    seconds = interleaved(arms, rounds, clock=time.thread_time)
    each = {name: summary(values)["median_us"] / CALLS for name, values in seconds.items()}
    around = each["bare"] + each["module call"]
    return {
        **each,
        "overhead, alone": each["patched, alone"] - around,
        "overhead, in a forward": each["patched, in a forward"] - around,
        "overhead of the op": each["op"] - around,
    }


@torch.no_grad()
def decode(rounds: int) -> dict:
    """Microseconds of a decode step of the shipped model, and of the hooks on its decoder."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    memory = locas.attach(model, locas.LocasConfig(rank=64))
    ids = torch.arange(3, 67)
    memory.memorize(ids, window=64, stride=32, progress=False)
    watch, decoder, cache = memory._attachment.watch, model.base_model, DynamicCache(config=model.config)
    model(input_ids=ids[None], **cache_argument(model, cache))

    spent = {}

    def timed(name: str, hook: Callable) -> Callable:
        def around(*arguments: object) -> None:
            start = time.thread_time()
            hook(*arguments)
            spent[name] = time.thread_time() - start

        return around

    watch.unbind()
    decoder.register_forward_pre_hook(timed("before", watch.before), with_kwargs=True)
    decoder.register_forward_hook(timed("after", watch.after), with_kwargs=True)

    def measured() -> tuple[float, float]:
        """Median seconds of a step, and of its hooks."""
        steps, hooks = [], []
        for _ in range(rounds):
            start = time.thread_time()
            model(input_ids=torch.tensor([[5]]), **cache_argument(model, cache))
            steps.append(time.thread_time() - start)
            hooks.append(sum(spent.values()))
            cache.crop(-1)
        return statistics.median(steps), statistics.median(hooks)

    step, hooks = measured()
    memory.slots  # noqa: B018 (handed out, so from now on the slots are compared)
    _, comparing = measured()
    return {
        "step": 1e6 * step,
        "watch": 1e6 * hooks,
        "watch, % of a step": 100 * hooks / step,
        "watch, slots compared": 1e6 * comparing,
        "watch, slots compared, % of a step": 100 * comparing / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parse(parser)
    records = [
        {"what": what, "figure": name, "value": value}
        for what, figures in (("FFN", overhead(arguments.rounds)), ("decode", decode(arguments.rounds)))
        for name, value in figures.items()
    ]
    rows = [[record["what"], record["figure"], record["value"]] for record in records]
    report("Python around the kernels, us", ["", "", "us or %"], rows, {"records": records}, arguments.out)


if __name__ == "__main__":
    main()
