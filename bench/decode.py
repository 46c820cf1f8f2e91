"""Generating with an attached memory against the bare host: one token behind many others in a static KV cache.

With --learn W a text is also learned token by token (stride 1) over a kept context of W tokens: in the second half of the
windows that are not full yet, and in full ones.

On CUDA a step is a CUDA graph, replayed; on the CPU it runs eagerly. The memory has learned a chunk first, or its FFNs would
run as the host's own.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import StaticCache

import locas_ext as locas
from locas_ext.hosts.cache_names import cache_argument
from locas_ext.learning.cuda_graph import capture, rehearse

from .harness import interleaved, parse, ratio, report, summary
from .models import add_options, check, load

ROOM = 24  # rows of the cache behind the context


class DecodeStep:
    """One greedy token behind those in the cache."""

    def __init__(self, model, context: int):
        """context: the tokens before"""
        self.model, self.context = model, context
        self.cache = StaticCache(config=model.config, max_cache_len=context + ROOM)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, vocabulary, (1, context), generator=torch.Generator().manual_seed(0)).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, **cache_argument(model, self.cache), use_cache=True, logits_to_keep=1).logits
        self.token = logits[0].argmax(-1, keepdim=True)

    @torch.no_grad()
    def work(self) -> None:
        for layer in self.cache.layers:  # every step writes the same place
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.fill_(self.context)
        behind = cache_argument(self.model, self.cache)
        logits = self.model(input_ids=self.token, **behind, use_cache=True).logits
        self.token.copy_(logits[0].argmax(-1, keepdim=True))

    def runner(self) -> Callable[[], None]:
        if self.model.device.type == "cpu":
            return self.work
        rehearse(self.work, self.model.device)
        return capture(self.work, self.model.device)


def learned(arguments) -> tuple[dict[str, list[float]], locas.MemorizeReport]:
    """Arm -> seconds of each token; and what the run said of itself."""
    memory = locas.attach(load(arguments), locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
    window = arguments.learn
    ids = torch.randint(0, memory.model.config.vocab_size, (window + arguments.rounds,))
    growing: list[float] = []
    full: list[float] = []
    before = time.perf_counter()

    def note(chunk: locas.Chunk) -> None:  # a step ends with a read from the device
        nonlocal before
        if chunk.end > window or window // 2 < chunk.end < window:  # between them the step is captured anew
            (full if chunk.end > window else growing).append(time.perf_counter() - before)
        before = time.perf_counter()

    settings = dict(window=window, stride=1, context="keep", on_divergence="ignore", progress=False)
    said = memory.memorize(ids, **settings, callback=note)
    return {f"learning a token, W = {window} not yet full": growing, f"learning a token, W = {window}": full}, said


def _ratio(values: list[float], host: list[float]) -> float:
    """Of the medians where an arm has its own number of rounds."""
    return ratio(values, host) if len(values) == len(host) else statistics.median(values) / statistics.median(host)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    add_options(parser)
    parser.add_argument("--context", type=int, default=1000, help="tokens in the cache")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rehome", action="store_true", help="attach with rehome=True")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--learn", type=int, metavar="W", help="learn a text token by token too, over W tokens of context")
    arguments = parse(parser)
    check(parser, arguments)
    if arguments.learn is not None and arguments.learn < 16:
        parser.error(f"--learn is {arguments.learn}; expected at least 16")
    bare, host = load(arguments), load(arguments)
    memory = locas.attach(host, locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
    vocabulary = host.config.vocab_size
    text = torch.randint(0, vocabulary, (65,), generator=torch.Generator().manual_seed(1))
    memory.memorize(text, window=64, stride=32, progress=False)
    arms = {
        "host": DecodeStep(bare, arguments.context).runner(),
        "host with a memory": DecodeStep(host, arguments.context).runner(),
        "host again": DecodeStep(bare, arguments.context).runner(),
    }
    seconds = interleaved(arms, arguments.rounds)
    if arguments.learn is not None:
        of_learning, said = learned(arguments)
        seconds |= of_learning
        print(f"learning: {said.seconds:.1f} s; CUDA graph: {said.graph}; host kernels: {said.host_kernels}")
    rows, records = [], []
    for name, values in seconds.items():
        record = {"arm": name, **summary(values), "ratio_host": _ratio(values, seconds["host"])}
        records.append(record)
        rows.append([name, record["median_us"], record["p10_us"], record["p90_us"], record["ratio_host"]])
    report(
        f"One token behind {arguments.context} others, rank {arguments.rank}",
        ["arm", "us", "p10", "p90", "/ host"],
        rows,
        {"settings": {name: str(value) for name, value in vars(arguments).items() if name != "out"}, "records": records},
        arguments.out,
    )


if __name__ == "__main__":
    main()
