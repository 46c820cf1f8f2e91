"""What all benchmarks share: interleaved timing, robust statistics, the machine, the table and the JSON file."""

import argparse
import csv
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import locas_ext
from locas_ext import _C


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with what every benchmark of a whole model takes too: --device, --dtype, --threads, --out."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def machine() -> dict:
    """What the figures were measured on."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return {
        **gpu,
        "cpu": cpu,
        "cpu_isa": _C.build_info()["cpu_isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "locas_ext": locas_ext.__version__,
        "commit": commit_of(Path(__file__).parent),
    }


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of a git working tree is at, or None; "-dirty" if files differ from it."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else None


def interleaved(
    arms: dict[str, Callable[[], object]], rounds: int, warmup: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each arm in each round; a round runs every arm once, A, B, C, so that noise hits all alike."""
    for _ in range(warmup):
        for run in arms.values():
            run()
    seconds = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            _wait_for_gpu()
            start = clock()
            run()
            _wait_for_gpu()
            seconds[name].append(clock() - start)
    return seconds


def _wait_for_gpu() -> None:
    """An arm on CUDA may return before its work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def summary(seconds: list[float]) -> dict:
    """Median, p10 and p90 in microseconds."""
    return {
        "median_us": 1e6 * statistics.median(seconds),
        "p10_us": 1e6 * percentile(seconds, 10),
        "p90_us": 1e6 * percentile(seconds, 90),
    }


def report(title: str, columns: list[str], rows: list[list], results: dict, out: Path | None) -> None:
    """Prints the table and writes the results, if there is a file for them."""
    print_table(title, columns, rows)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if out is not None:
        write(results, out)
        print(f"written: {out}, {out.with_suffix('.csv')}")


def write(results: dict, out: Path) -> None:
    """{"machine", **results} as JSON, and results["records"] with the machine as CSV beside it."""
    about = machine()
    out.write_text(json.dumps({"machine": about, **results}, indent=1))
    records = [{**record, **about} for record in results["records"]]
    with open(out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for record in records for name in record)))
        writer.writeheader()
        writer.writerows(records)


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    console = Console(width=max(100, 16 * len(columns)))
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*[cell if isinstance(cell, str) else f"{cell:.3g}" if cell < 10 else f"{cell:,.0f}" for cell in row])
    console.print(table)
