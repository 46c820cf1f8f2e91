"""Whether two checkouts of the project compute the same, bit for bit, on this machine.

Each checkout runs in a process of its own, with that checkout first on PYTHONPATH and the same number of threads. It
memorizes the same random text into memories of tiny random hosts: a gated memory beside a Qwen3, an ungated one beside
an OPT by backpropagation, and the same written in closed form; each with the backends `matmul` and `fused`, in float32 and
bfloat16. Compared are the slots after the last chunk, each chunk's nll per token, the number of updates, and every tensor of
a file saved with the optimizer's states. A case that the library refuses is listed with the library's reason.

Differences are absolute; of a saved tensor whose numbers are all under 1, relative to the largest of them. The exit status is
1 if one is over 1e-6, or if a case or a tensor is missing on one side.
"""

import argparse
import importlib.machinery
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-6
WINDOW, STRIDE, VOCABULARY = 64, 16, 101
VARIANTS = ("glu", "mlp", "mlp written")
CASES = list(itertools.product(VARIANTS, ("matmul", "fused"), ("float32", "bfloat16")))


# ---- one checkout, in a process of its own ----------------------------------------------------------------------
def host(variant: str, dtype: str, device: str):
    """A random model with two layers; the same in every process."""
    from transformers import OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2 * WINDOW
    )
    torch.manual_seed(0)
    if variant == "glu":
        model = Qwen3ForCausalLM(
            Qwen3Config(
                **sizes,
                intermediate_size=192,
                num_key_value_heads=2,
                head_dim=16,
                initializer_range=0.1,
            )
        )
    else:
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=256, word_embed_proj_dim=64, init_std=0.1))
    return model.to(device, getattr(torch, dtype)).eval()


def memorize(locas, memory, variant: str, chunks: int):
    """The report of memorizing the text; every setting is given, as defaults may differ between the checkouts."""
    ids = torch.randint(3, VOCABULARY, (chunks * STRIDE // 2,), generator=torch.Generator().manual_seed(1)).repeat(2)
    common = dict(window=WINDOW, stride=STRIDE, progress=False)
    if variant != "mlp written":
        return memory.memorize(ids, **common, learning_rate=4e-3, epochs=1, optimizer="adamw")
    write = dict(epsilon=1e-2, tokens="all", capacity=4 * STRIDE, when_full="compress", compress_to=2 * STRIDE)
    if hasattr(locas, "Write"):
        return memory.memorize(ids, **common, update=locas.Write(**write))
    return memory.memorize(ids, **common, update="write", **write)


def run_checkout(arguments) -> None:
    """Writes NUMBER.safetensors, or NUMBER.txt with the library's reason, into arguments.worker for each case."""
    import locas_ext as locas

    folder = arguments.worker
    tree = arguments.old if folder.name == "OLD" else arguments.new
    if locas.__file__ is None or not Path(locas.__file__).resolve().is_relative_to(tree):
        sys.exit(f"locas_ext was imported from {locas.__file__ or list(locas.__path__)}; expected from a package in {tree}")
    for number, (variant, backend, dtype) in enumerate(CASES):
        label, started = f"  {number + 1}/{len(CASES)} {variant}, {backend}, {dtype}: ", time.perf_counter()
        config = locas.LocasConfig(variant=variant[:3], rank=STRIDE, init="topk", scale="host", clip=True, backend=backend)
        try:
            memory = locas.attach(host(variant, dtype, arguments.device), config)
        except ValueError as error:
            if backend != "fused":
                raise
            (folder / f"{number}.txt").write_text(str(error))
            print(label + "skipped", flush=True)
            continue
        report = memorize(locas, memory, variant, arguments.chunks)
        if memory.version < arguments.chunks:
            sys.exit(f"{label}{memory.version} updates in {arguments.chunks} chunks; expected one per chunk at least")
        memory.save_pretrained(folder / "memory", optimizer=True)
        save_file(
            {
                "slots": memory.slots.detach().cpu().contiguous(),
                "nll per token": torch.tensor([chunk.nll / chunk.tokens for chunk in report.chunks], dtype=torch.float64),
                "updates": torch.tensor(memory.version),
                **{f"saved {name}": x for name, x in load_file(folder / "memory" / "locas_memory.safetensors").items()},
            },
            folder / f"{number}.safetensors",
        )
        print(f"{label}{memory.version} updates, {time.perf_counter() - started:.1f} s", flush=True)


# ---- the two side by side ---------------------------------------------------------------------------------------
def distance(name: str, a: torch.Tensor, b: torch.Tensor) -> float | None:
    """None if the bytes are the same, else the largest difference; infinite for another shape or dtype, or a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8)):
        return None
    a, b = a.double(), b.double()
    largest = a.abs().max().item() if name.startswith("saved ") else 1.0
    worst = (a - b).abs().max().item() / (min(1.0, largest) or 1.0)
    return math.inf if math.isnan(worst) else worst


def compare(number: int, old: Path, new: Path) -> dict:
    """What one case came to: each tensor's difference, and whether the case fails."""
    record = dict(zip(("variant", "backend", "dtype"), CASES[number], strict=True))
    reasons = {side: (path / f"{number}.txt") for side, path in (("OLD", old), ("NEW", new))}
    reasons = {side: path.read_text() for side, path in reasons.items() if path.exists()}
    if reasons:
        sides = "" if len(reasons) == 2 else f" by {next(iter(reasons))} only"
        return {**record, "verdict": f"skipped{sides}: {list(reasons.values())[-1]}", "fails": len(reasons) == 1}
    a, b = (load_file(path / f"{number}.safetensors") for path in (old, new))
    if missing := a.keys() ^ b.keys():
        sides = [f"{name} (only in {'OLD' if name in a else 'NEW'})" for name in sorted(missing)]
        return {**record, "verdict": f"differs: {', '.join(sides)}", "fails": True}
    differences = {name: distance(name, a[name], b[name]) for name in a}
    unequal = {name: value for name, value in differences.items() if value is not None}
    worst = max(unequal, key=unequal.get, default=None)
    return {
        **record,
        "updates": int(b["updates"]),
        "largest_slots_difference": unequal.get("slots", 0.0),
        "largest_difference": unequal.get(worst, 0.0),
        "fails": any(value > TOLERANCE for value in unequal.values()),
        "verdict": "equal" if worst is None else f"differs, most in {worst}",
        "differences": json.dumps(unequal),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout with its extension built in place")
    parser.add_argument("new", type=Path, metavar="NEW", help="another one")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of torch, in both (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=20, help="to memorize, an even number (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}; expected at least 1")
    arguments.old, arguments.new = arguments.old.resolve(), arguments.new.resolve()
    for path in (arguments.old, arguments.new):
        if not any((path / "locas_ext" / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
            parser.error(f"{path} holds no built locas_ext; run there: python setup.py build_ext --inplace")
    if arguments.chunks < 2 or arguments.chunks % 2:
        parser.error(f"--chunks is {arguments.chunks}; expected an even number, at least 2")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device")
    return arguments


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    checkouts = arguments.old, arguments.new
    if arguments.worker is not None:
        return run_checkout(arguments)
    from .harness import commit_of, report  # imports locas_ext, which a worker takes from its own checkout

    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / side for side in ("OLD", "NEW")]
        for tree, folder in zip(checkouts, folders, strict=True):
            folder.mkdir()
            print(f"{folder.name}: {tree}, commit {commit_of(tree)}", flush=True)
            command = [sys.executable, __file__, *checkouts, "--worker", folder, "--device", arguments.device]
            command += ["--threads", str(arguments.threads), "--chunks", str(arguments.chunks)]
            # PYTHONSAFEPATH: this file's folder must not come before the checkout.
            environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
            if status := subprocess.run(command, env=environment).returncode:
                sys.exit(f"{folder.name} ({tree}) ended with status {status} before all cases were run")
        records = [compare(number, *folders) for number in range(len(CASES))]
    rows = [
        [
            f"{record['variant']}, {record['backend']}, {record['dtype']}",
            *(f"{record[name]:.2g}" if name in record else "" for name in ("largest_slots_difference", "largest_difference")),
            ("FAILS: " if record["fails"] else "") + record["verdict"],
        ]
        for record in records
    ]
    about = {side.lower(): f"{tree}, commit {commit_of(tree)}" for side, tree in zip(("OLD", "NEW"), checkouts, strict=True)}
    about |= {"device": arguments.device, "threads": arguments.threads, "chunks": arguments.chunks}
    report(
        f"{arguments.chunks} chunks on {arguments.device}: the largest difference of OLD and NEW",
        ["case", "slots", "all", "verdict"],
        rows,
        {"settings": about, "records": records},
        arguments.out,
    )
    compared = sum("updates" in record for record in records)
    if failed := sum(record["fails"] for record in records):
        sys.exit(f"{failed} of {len(records)} cases fail: a difference over {TOLERANCE:g}, or something is missing on one side")
    print(f"{compared} of {len(records)} cases compared, none differs by more than {TOLERANCE:g}; the others were skipped")


if __name__ == "__main__":
    main()
