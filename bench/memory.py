"""Peak memory of learning one chunk against the same chunk through the unpatched, frozen host.

Every allocation and release that PyTorch makes during one step is added up; the peak is counted from the step's start.
The bound: the host's own forward and backward of the chunk on the same cache (its embeddings require the gradient, so that
the backward runs), plus 5 arenas, plus what the memory itself saves for its backward.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS, MODEL
from locas_ext.hosts.cache_names import cache_argument
from locas_ext.hosts.context_cache import ContextCache
from locas_ext.learning.backprop import EagerStep
from locas_ext.learning.chunk import Window, WindowReader

from .harness import report


def peak_bytes(step) -> int:
    """The most bytes that were allocated at one time during step(), beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    plain, host = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval() for _ in range(2))
    plain.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer((ASSETS / "nostromo.txt").read_text()[:20000])["input_ids"])[: arguments.window]
    memory = locas.attach(host, locas.LocasConfig(rank=arguments.rank))
    memory.memorize(ids, window=arguments.window, stride=arguments.stride, progress=False)
    attachment = memory._attachment
    step = EagerStep(attachment, locas.Backprop(), WindowReader(attachment.host))
    window = Window.of(ids, len(ids) - arguments.stride, len(ids), arguments.window, None)

    def of_host():
        cache = ContextCache(plain, torch.device("cpu"), None)
        cache.fill(plain, window.context[None])
        embedded = plain.get_input_embeddings()(window.inputs[None]).requires_grad_()
        logits = plain(inputs_embeds=embedded, **cache_argument(plain, cache), use_cache=True).logits
        F.cross_entropy(logits[0].float(), window.targets).backward()

    def of_memory():
        step(window, "here")

    alone, learning = peak_bytes(of_host), peak_bytes(of_memory)
    arena = 4 * memory.slots.numel()
    saved = 4 * len(memory.layers) * len(window.inputs) * 2 * arguments.rank  # the pre-activations x G^T, x K^T
    # The arenas (slots, gradient, two states) are there before the step and so not in its peak.
    rows = [
        ["host alone, forward + backward", alone / 2**20],
        ["memory: forward, backward, update", learning / 2**20],
        ["... and its arenas (slots, gradient, two states)", (learning + 4 * arena) / 2**20],
        ["bound: host + 5 arenas + saved pre-activations", (alone + 5 * arena + saved) / 2**20],
    ]
    results = {"records": [{"what": name, "mebibytes": value} for name, value in rows]}
    report("Peak memory of one chunk", ["", "MiB"], rows, results, arguments.out)


if __name__ == "__main__":
    main()
