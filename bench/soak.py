"""Many threads read memories at once, while another model's memory comes and goes: python -m bench.soak --seconds 60

Every row of logits is compared, bit for bit, with that of a quiet machine. Exit status 1 if one differs or a thread fails.
"""

import argparse
import itertools
import random
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import locas_ext as locas

VOCABULARY, TEXTS = 128, 6
SETTINGS = dict(window=32, stride=16, learning_rate=2e-2, progress=False)


@dataclass
class Tally:
    """What the threads found: rows compared, rows that differed, rounds of attach and detach, errors."""

    rows: int = 0
    wrong: int = 0
    rounds: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rows: int = 0, wrong: int = 0, rounds: int = 0) -> None:
        with self.lock:
            self.rows, self.wrong, self.rounds = self.rows + rows, self.wrong + wrong, self.rounds + rounds


def glu_host(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    return LlamaForCausalLM(config).eval()


def mlp_host(seed: int = 0) -> OPTForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).eval()


def text(seed: int, length: int = 48) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


class Reader:
    """A learned memory, texts, and what they give with the memory and without it."""

    def __init__(self, model, variant: str):
        self.model = model
        self.texts = [text(100 + k, 8 + 4 * k) for k in range(TEXTS)]
        self.alone = [logits(model, ids) for ids in self.texts]
        self.memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host", variant=variant))
        self.memory.memorize(text(1), **SETTINGS)
        self.taught = [logits(model, ids) for ids in self.texts]

    def read(self, k: int, alone: bool, tally: Tally) -> None:
        with self.memory.disabled() if alone else nullcontext():
            rows = logits(self.model, self.texts[k])
        wrong = (rows != (self.alone if alone else self.taught)[k]).any(-1).sum().item()
        tally.add(rows=len(rows), wrong=int(wrong))


def come_and_go(tally: Tally, round_: int) -> None:
    """One round of another model: attached, taught, detached, and the host it was."""
    model, variant = (glu_host(7), "glu") if round_ % 2 else (mlp_host(7), "mlp")
    ids = text(9, 16)
    alone = logits(model, ids)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host", variant=variant))
    memory.memorize(text(2, 32), **SETTINGS)
    memory.detach()
    tally.add(rows=len(ids), wrong=int((logits(model, ids) != alone).any(-1).sum()), rounds=1)


def soak(seconds: float, threads: int = 8) -> Tally:
    """Reads with so many threads, and attaches and detaches with one more, for so long."""
    readers, tally, end = [Reader(glu_host(), "glu"), Reader(mlp_host(), "mlp")], Tally(), time.monotonic() + seconds

    def until_the_end(work) -> None:
        try:
            for number in itertools.count():  # at least one piece of work, however busy the machine is
                work(number)
                if time.monotonic() >= end:
                    break
        except Exception as error:
            tally.errors.append(f"{type(error).__name__}: {error}")

    def reading(seed: int):
        draw = random.Random(seed)
        return lambda number: readers[(seed + number) % 2].read(draw.randrange(TEXTS), draw.random() < 0.3, tally)

    works = [*(reading(seed) for seed in range(threads)), lambda number: come_and_go(tally, number)]
    workers = [threading.Thread(target=until_the_end, args=(work,)) for work in works]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=8, help="that read; one more attaches and detaches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tally = soak(arguments.seconds, arguments.threads)
    print(
        f"{arguments.threads} threads, {arguments.seconds:g} s: {tally.rows} rows compared, {tally.wrong} wrong; "
        f"{tally.rounds} rounds of attach and detach; {len(tally.errors)} threads failed"
    )
    for error in tally.errors:
        print(error)
    sys.exit(1 if tally.wrong or tally.errors or not tally.rows else 0)


if __name__ == "__main__":
    main()
