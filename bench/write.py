"""Writing a Locas-MLP memory in closed form, against the host's own forward + backward and against backpropagation.

Two tables. One segment of W tokens: `memory.write` of all of them against the plain host's forward and backward to its
FFNs' outputs, the gradients that writing reads; beside a full memory also against those of host and memory. One chunk
of S tokens in a full window of W, as memorizing goes through a text: written and compressed by NL-SVD, written over the
oldest slots, learned by one backprop step, and by one step per token, against reading it with context truncation. On CUDA
all that can be runs from a CUDA graph, and learning eagerly too.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import locas_ext as locas
from locas_ext.evaluation.assets import ASSETS
from locas_ext.hosts.registry import inspect_host
from locas_ext.learning.chunk import Window, WindowReader
from locas_ext.learning.host_kernels.kernels import fast_reader
from locas_ext.learning.settings import Settings
from locas_ext.learning.step import step_for

from .baselines import Truncation, eager, graphed
from .harness import interleaved, parse, percentile, print_table, ratio, report

VOCABULARY = 32768  # of a random host
AGAIN = " again"
PER_TOKEN = "backprop, one step per token"


def load(arguments):
    """A new copy of the host, frozen."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.model is not None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, local_files_only=True)
    else:
        d = arguments.hidden_size
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=d,
            word_embed_proj_dim=d,
            ffn_dim=4 * d,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, d // 64),
            max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        model = OPTForCausalLM(config).to(dtype)
    return model.to(arguments.device).eval().requires_grad_(False)


def text(arguments, tokens: int) -> torch.Tensor:
    """[tokens] ids: of the shipped novel for a given model, else random."""
    if arguments.model is None:
        return torch.randint(4, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    novel = (ASSETS / "nostromo.txt").read_text()[: 20 * tokens]
    return torch.tensor(tokenizer(novel, add_special_tokens=False)["input_ids"][:tokens])


# ---- the peers --------------------------------------------------------------------------------------------------
def forward_backward(model) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """run(ids [n]) -> the loss's gradient at each FFN's output, by the plain host; nothing else gets a gradient."""
    outputs = []

    def keep(module, inputs, output):
        # Below the first FFN nothing needs a gradient: its output is where the graph begins.
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())
        return outputs[-1]

    for ffn in inspect_host(model).ffns.values():
        ffn.projections()[-1].register_forward_hook(keep)

    def run(ids: torch.Tensor) -> list[torch.Tensor]:
        outputs.clear()
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        return torch.autograd.grad(F.cross_entropy(logits.float(), ids[1:], reduction="sum"), outputs)

    return run


# ---- one segment ------------------------------------------------------------------------------------------------
def one_segment(arguments, tokens: int) -> list[dict]:
    ids = text(arguments, tokens)
    plain = forward_backward(load(arguments))
    empty = locas.attach(load(arguments), locas.LocasConfig(variant="mlp", rank=tokens - 1))
    full = locas.attach(load(arguments), locas.LocasConfig(variant="mlp", rank=tokens - 1))
    full.write(ids)
    read = locas.attach(load(arguments), locas.LocasConfig(variant="mlp", rank=tokens - 1))
    read.write(ids)
    for slots in read.parameters():
        slots.requires_grad_(False)
    beside = forward_backward(read.model)

    def write_into_empty():
        # Its rows are written over; reset() would allocate and clear them too.
        empty.state.set_used(0)
        empty.state.version = 0
        empty.write(ids)

    arms = {
        "host forward + backward": lambda: plain(ids),
        "write": write_into_empty,
        f"host + {tokens - 1} slots, forward + backward": lambda: beside(ids),
        f"write beside {tokens - 1} slots": lambda: full.write(ids, capacity=tokens - 1, when_full="drop_oldest"),
        "host forward + backward" + AGAIN: lambda: plain(ids),
    }
    seconds = interleaved(arms, arguments.rounds)
    predicted = dict.fromkeys(arms, tokens - 1)  # all but the first
    return records(seconds, predicted, "host forward + backward", {"window": tokens})


# ---- one chunk --------------------------------------------------------------------------------------------------
def windows(ids: torch.Tensor, window: int, stride: int, chunk: int):
    """Windows of `window` tokens that end with each chunk in turn, without end: (Window, its ids)."""
    ends = range(window, len(ids) + 1, stride)
    return itertools.cycle([(Window.of(ids, end - chunk, end, window, None), ids[end - window : end]) for end in ends])


class Learning:
    """A chunk's turn in a run over a text, again and again: what a memory of its own does with each."""

    def __init__(self, arguments, ids: torch.Tensor, window: int, chunk: int, update: locas.Backprop | locas.Write):
        """chunk: so many tokens at a time; LOCAS_CUDA_GRAPH as it is now says whether from a graph"""
        memory = locas.attach(load(arguments), locas.LocasConfig(variant="mlp", rank=arguments.rank))
        self.window, self.chunks = window, windows(ids, window, arguments.stride, chunk)
        memory.memorize(ids[:window], window=window, stride=arguments.stride, progress=False)
        host = memory._attachment.host
        settings = Settings(window=window, stride=chunk, update=update).resolve(host, memory.state)
        host.reading.begin_run(host.model)
        self.reader = WindowReader(host)
        self.step = step_for(memory._attachment, settings, self.reader)
        self.kernels = fast_reader(self.reader, ids, window)
        self.kernels.__enter__()  # for as long as this lives: a graph holds its buffers
        # Until every further chunk makes the memory overflow.
        while isinstance(update, locas.Write) and memory.state.used + chunk <= update.capacity:
            self()

    def __call__(self) -> None:
        part, _ = next(self.chunks)
        self.reader.settle(part, self.window)
        self.step(part, "this chunk")


def one_chunk(arguments, window: int) -> list[dict]:
    stride = arguments.stride
    # Written again and again, a chunk would give the same slots: the arms walk through a text.
    ids = text(arguments, window + 15 * stride)
    plain = load(arguments)
    kept = min(arguments.slots, plain.config.hidden_size)
    compresses = locas.Write(capacity=kept + stride, when_full="compress", compress_to=kept)
    drops = locas.Write(capacity=kept + stride, when_full="drop_oldest")
    asked = {
        "backprop, one step per chunk": (stride, locas.Backprop()),
        "write, drop oldest": (stride, drops),
        "write, NL-SVD each chunk": (stride, compresses),
        PER_TOKEN: (1, locas.Backprop()),
    }
    learning = {}
    on_gpu = arguments.device == "cuda"
    for eagerly, graph in {"": "1", ", eagerly": "0"}.items() if on_gpu else {"": "1"}.items():
        os.environ["LOCAS_CUDA_GRAPH"] = graph
        for name, (chunk, update) in asked.items():
            learning[name + eagerly] = Learning(arguments, ids, window, chunk, update)
    score, parts = (graphed if on_gpu else eager)(Truncation(plain, window, stride)), windows(ids, window, stride, stride)
    truncation = {name: lambda: score(next(parts)[1]) for name in ("truncation", "truncation" + AGAIN)}
    arms = {"truncation": truncation["truncation"], **learning, **truncation}
    seconds = interleaved(arms, arguments.rounds)
    for name, learned in learning.items():
        print(f"W = {window}: {name}: CUDA graph: {learned.step.report()}")
    tokens = {name: 1 if name.startswith(PER_TOKEN) else stride for name in arms}
    return records(seconds, tokens, "truncation", {"window": window, "stride": stride, "kept": kept})


# ---- what is reported -------------------------------------------------------------------------------------------
def records(seconds: dict[str, list[float]], tokens: dict[str, int], reference: str, settings: dict) -> list[dict]:
    """One record an arm; ratios are of the time a token."""
    each = {name: [value / tokens[name] for value in values] for name, values in seconds.items()}
    return [
        {
            **settings,
            "arm": name,
            "tokens": tokens[name],
            "median_ms": 1e3 * statistics.median(values),
            "p10_ms": 1e3 * percentile(values, 10),
            "p90_ms": 1e3 * percentile(values, 90),
            "tokens_per_second": 1 / statistics.median(each[name]),
            f"ratio to {reference}": ratio(each[name], each[reference]),
        }
        for name, values in seconds.items()
    ]


def rows(measured: list[dict], reference: str) -> list[list]:
    columns = ("arm", "tokens", "median_ms", "p10_ms", "p90_ms", "tokens_per_second", f"ratio to {reference}")
    return [[f"{record['window']}", *(record[column] for column in columns)] for record in measured]


_COLUMNS = ["W", "arm", "tokens", "ms", "p10", "p90", "tokens/s"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.write", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="a two-layer host and the shipped novel; default: a random OPT, random tokens"
    )
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the random host, whose FFN is 4 times as wide")
    parser.add_argument("--layers", type=int, default=4, help="of the random host")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="W, of a segment and of a chunk's window")
    parser.add_argument("--stride", type=int, default=64, help="S, the tokens of a chunk")
    parser.add_argument("--slots", type=int, default=256, help="to how many NL-SVD compresses, the hidden size at most")
    parser.add_argument("--rank", type=int, default=64, help="the slots that backprop trains")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--segments-only", action="store_true", help="only the first table")
    arguments = parse(parser)
    least = max(2, arguments.stride)
    if min(arguments.tokens) < least:
        parser.error(f"--tokens is {min(arguments.tokens)}; expected at least {least}, as long as --stride")

    segments = [record for tokens in arguments.tokens for record in one_segment(arguments, tokens)]
    print_table("One segment of W tokens", [*_COLUMNS, "/ host f + b"], rows(segments, "host forward + backward"))
    chunks = (
        [] if arguments.segments_only else [record for tokens in arguments.tokens for record in one_chunk(arguments, tokens)]
    )
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    report(
        f"One chunk of S = {arguments.stride} tokens in a window of W",
        [*_COLUMNS, "/ truncation"],
        rows(chunks, "truncation"),
        {"settings": settings, "records": segments + chunks},
        arguments.out,
    )


if __name__ == "__main__":
    main()
