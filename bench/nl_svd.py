"""NL-SVD of one layer's memory against one torch.linalg.eigh, d x d, in float32, on the same device in the same round.

The slots' weighted norms fall from 1 to 1e-5, as those of a memory with few strong directions do. The last arms are the
ways to its eigenvectors; `resolved` is the smallest weighted norm, relative to the largest, down to which a way finds
all of them within 1% of a float64 SVD.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from locas_ext.transforms.nl_svd import nl_svd

from .harness import interleaved, ratio, report, summary


def norms_by_eigh(weighted: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(weighted.T @ weighted).eigenvalues.flip(0).clamp_min(0).sqrt()


def norms_by_svd(weighted: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(weighted, full_matrices=False).S


def resolved(norms: torch.Tensor, exact: torch.Tensor) -> float:
    right = ((norms.double() - exact).abs() < 0.01 * exact).cumprod(0).sum()
    return float(exact[right - 1] / exact[0]) if right else float("nan")


def slots(m: int, d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [m, d] whose energies fall over five orders of magnitude."""
    directions = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, device=device)).Q
    scales = torch.logspace(0, -5, d, dtype=torch.float64, device=device)
    key = (torch.randn(m, d, dtype=torch.float64, device=device) * scales @ directions).float()
    value = F.normalize(torch.randn(m, d, device=device), dim=-1)
    return key, value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.nl_svd", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; a CSV file beside it")
    arguments = parser.parse_args()
    m, d, rank = arguments.slots, arguments.hidden_size, arguments.rank
    if not 1 <= rank <= min(m, d):
        parser.error(f"--rank is {rank}; expected 1 to {min(m, d)}, no more than --slots and --hidden-size")
    return arguments


def main() -> None:
    arguments = _arguments()
    m, d, rank, device = arguments.slots, arguments.hidden_size, arguments.rank, torch.device(arguments.device)
    torch.manual_seed(0)
    key, value = slots(m, d, device)
    weighted = value.norm(dim=1, keepdim=True) * key
    square = weighted.T @ weighted

    def waits(run):
        def timed():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return timed

    reference = "eigh, d x d, float32"
    arms = {
        reference: (lambda: torch.linalg.eigh(square), None),
        "... again": (lambda: torch.linalg.eigh(square), None),
        "nl_svd, float32": (lambda: nl_svd(key, value, rank), None),
        "product and eigh, float32": (lambda: norms_by_eigh(weighted), lambda: norms_by_eigh(weighted)),
        "product and eigh, float64 (nl_svd's)": (
            lambda: norms_by_eigh(weighted.double()),
            lambda: norms_by_eigh(weighted.double()),
        ),
        "thin SVD, float32": (lambda: norms_by_svd(weighted), lambda: norms_by_svd(weighted)),
    }
    seconds = interleaved({name: waits(run) for name, (run, _) in arms.items()}, arguments.rounds, warmup=1)
    exact = norms_by_svd(weighted.double())
    rows, records = [], []
    for name, (_, norms) in arms.items():
        record = {"device": device.type, "slots": m, "d": d, "rank": rank, "arm": name, **summary(seconds[name])}
        record["ratio"] = ratio(seconds[name], seconds[reference])
        record["resolved"] = resolved(norms(), exact) if norms else None
        records.append(record)
        times = [record[key] / 1e3 for key in ("median_us", "p10_us", "p90_us")]
        rows.append([name, *times, record["ratio"], f"{record['resolved']:.1e}" if norms else ""])
    title = f"NL-SVD of {m} slots to {rank} at d = {d} on {device}"
    columns = ["arm", "ms", "p10", "p90", "/ eigh", "resolved"]
    report(title, columns, rows, {"records": records}, arguments.out)


if __name__ == "__main__":
    main()
