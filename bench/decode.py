"""Generating with an attached memory against the bare host: one token behind many others in a static KV cache.

With --learn W a text is also learned token by token (stride 1) over a kept context of W tokens; timed are the full windows.

On CUDA a step is a CUDA graph, replayed; on the CPU it runs eagerly. The memory has learned a chunk first, or its FFNs would
run as the host's own.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import StaticCache

import locas_ext as locas
from locas_ext.learning.cuda_graph import capture, rehearse

from .harness import interleaved, parse, ratio, report, summary
from .hosts import add_options, check, load

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
            logits = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token = logits[0].argmax(-1, keepdim=True)

    @torch.no_grad()
    def work(self) -> None:
        for layer in self.cache.layers:  # every step writes the same place
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
                layer.cumulative_length.fill_(self.context)
        logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[0].argmax(-1, keepdim=True))

    def runner(self) -> Callable[[], None]:
        if self.model.device.type == "cpu":
            return self.work
        rehearse(self.work, self.model.device)
        return capture(self.work, self.model.device)


def learned(arguments) -> tuple[list[float], locas.GraphReport]:
    """Seconds of each token in a full window, and how many of the updates were replayed."""
    memory = locas.attach(load(arguments), locas.LocasConfig(rank=arguments.rank), rehome=arguments.rehome)
    ids = torch.randint(0, memory.model.config.vocab_size, (arguments.learn + arguments.rounds,))
    seconds: list[float] = []
    before = time.perf_counter()

    def note(chunk: locas.Chunk) -> None:
        nonlocal before
        if chunk.end > arguments.learn:
            seconds.append(time.perf_counter() - before)
        before = time.perf_counter()

    settings = dict(window=arguments.learn, stride=1, context="keep", on_divergence="ignore", progress=False)
    report_ = memory.memorize(ids, **settings, callback=note)
    return seconds, report_.graph


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
        seconds[f"learning a token, W = {arguments.learn}"], graph = learned(arguments)
        print(f"learning: {graph}")
    rows, records = [], []
    for name, values in seconds.items():
        record = {"arm": name, **summary(values), "ratio_host": ratio(values, seconds["host"])}
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
