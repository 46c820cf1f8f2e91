"""What bench.ffn measured, from its JSON file: tables in Markdown, a picture, and the rows of backend "auto".

python -m bench.ffn_report FILE.json                   Markdown: every shape; the best arm per range of tokens
python -m bench.ffn_report FILE.json --plot FILE.png   and the picture
python -m bench.ffn_report FILE.json --auto            the entries of locas_ext/ops/backends/cuda_families.py
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from .harness import print_table

FORWARD, BACKWARD = "forward", "forward + backward"
TOKEN_GROUPS = ((1, 32), (64, 512), (2048, 8192))
COLUMNS = ["dtype d T", "", "arm", "us", "p10", "p90", "TFLOP/s", "GB/s", "% floor", "/ eager", "/ eager + sideway"]


# ---- in the terminal, while and after measuring -------------------------------------------------------------------
def line(record: dict) -> str:
    """For the log of a run that may be cut short."""
    return (
        f"{record['dtype']} {record['d']} {record['tokens']} {record['mode']}, {record['arm']}: "
        f"{record['median_us']:.1f} us, {record['ratio to eager']:.3f} of eager"
    )


def row(record: dict, cuda: bool) -> list:
    """A row of the table of every arm."""
    return [
        f"{record['dtype']} {record['d']} {record['tokens']}",
        record["mode"],
        record["arm"],
        record["median_us"],
        record["p10_us"],
        record["p90_us"],
        record["tflops"],
        record["gigabytes_per_second"],
        record["percent_of_floor"] if cuda else "",
        record["ratio to eager"],
        record["ratio to eager + sideway"],
    ]


def print_ratios(records: list[dict], peers: list[str], cuda: bool) -> None:
    """The compact table: our arms over each peer."""
    rows, same = [], _same(records)
    for record in records:
        if record["arm"].startswith("ours"):
            shape = [f"{record['dtype']} {record['d']} {record['tokens']}", record["mode"], record["arm"]]
            floor = record["percent_of_floor"] if cuda else ""
            ratios = [record.get(f"ratio to {peer}", "") for peer in peers]
            noise = same[_shape(record)]["eager again"]["ratio to eager"]
            rows.append([*shape, record["median_us"], floor, *ratios, noise])
    print_table("FFN with memory: time over each peer's", [*COLUMNS[:3], "us", "% floor", *peers, "noise"], rows)


# ---- from the JSON file -------------------------------------------------------------------------------------------
def _shape(record: dict) -> tuple:
    return record["dtype"], record["d"], record["tokens"], record["mode"]


def _same(records: list[dict]) -> dict[tuple, dict[str, dict]]:
    """shape and mode -> arm -> record, in the order in which they were measured."""
    result: dict[tuple, dict[str, dict]] = {}
    for record in records:
        result.setdefault(_shape(record), {})[record["arm"]] = record
    return result


def _ours(arms: Iterable[str]) -> list[str]:
    return [arm for arm in arms if arm.startswith("ours")]


def _table(columns: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def every_shape(records: list[dict]) -> Iterator[str]:
    """A row per shape and mode: each arm's time over eager's, and the best of ours in TFLOP/s and percent of the floor."""
    arms = list(dict.fromkeys(r["arm"] for r in records if r["arm"] not in ("eager", "eager again")))
    rows = []
    for (dtype, d, tokens, mode), same in _same(records).items():
        best = min((same[arm] for arm in _ours(same)), key=lambda record: record["median_us"])
        ratios = [f"{same[arm]['ratio to eager']:.2f}" if arm in same else "" for arm in arms]
        numbers = [f"{best['tflops']:.0f}", f"{best['percent_of_floor']:.0f}", f"{same['eager again']['ratio to eager']:.2f}"]
        rows.append([dtype, str(d), str(tokens), mode, f"{same['eager']['median_us']:.1f}", *ratios, *numbers])
    columns = ["", "d", "T", "", "eager us", *arms, "TFLOP/s of our best", "% floor", "noise"]
    return _table(columns, rows)


def per_group(records: list[dict]) -> Iterator[str]:
    """Time over eager's, from the best to the worst T of a group; of each of our arms, and of the best one at each T."""
    same, arms = _same(records), _ours(dict.fromkeys(record["arm"] for record in records))
    rows = []
    for dtype, d in dict.fromkeys((record["dtype"], record["d"]) for record in records):
        for first, last in TOKEN_GROUPS:
            for mode in (FORWARD, BACKWARD):
                shapes = [key for key in same if key[:2] == (dtype, d) and first <= key[2] <= last and key[3] == mode]
                if shapes:
                    here = [{arm: same[shape][arm]["ratio to eager"] for arm in arms if arm in same[shape]} for shape in shapes]
                    best = [min(ratios.values()) for ratios in here]
                    each = [[ratios[arm] for ratios in here if arm in ratios] for arm in arms]
                    cells = [f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "" for ratios in [best, *each]]
                    rows.append([dtype, str(d), f"{first}-{last}", mode, *cells])
    return _table(["", "d", "T", "", "best of ours", *arms], rows)


def faster_ranges(ratios: dict[int, float]) -> tuple[tuple[int, int | None], ...]:
    """Tokens -> time over the other backend's; -> the ranges of tokens in which it is less.

    What lies between two measured numbers of tokens is the other's unless both win; the ends go on as they were measured.
    """
    tokens, ranges, first = sorted(ratios), [], None
    for index, count in enumerate(tokens):
        if ratios[count] < 1 and first is None:
            first = count if index else 1
        if first is not None and (index + 1 == len(tokens) or not ratios[tokens[index + 1]] < 1) and ratios[count] < 1:
            ranges.append((first, None if index + 1 == len(tokens) else count))
            first = None
    return tuple(ranges)


def auto_entries(results: dict) -> Iterator[str]:
    """Each family's entry in FASTER: where it takes less time than matmul, in the mean of both modes."""
    same = _same(results["records"])
    families = dict.fromkeys(r["arm"].removeprefix("ours, ") for r in results["records"] if r["arm"].startswith("ours, sm"))
    machine = results["machine"]
    source = f"{machine.get('gpu')}, torch {machine['torch']}, commit {machine['commit']}"
    for family in families:
        yield f'    "{family}": Faster('
        yield f'        "{source}",'
        yield "        {"
        for d in sorted({shape[1] for shape in same}):
            means = {}
            for tokens in sorted({shape[2] for shape in same if shape[1] == d}):
                both = [same["bfloat16", d, tokens, mode] for mode in (FORWARD, BACKWARD)]
                ratios = [arms[f"ours, {family}"]["median_us"] / arms["ours, matmul"]["median_us"] for arms in both]
                means[tokens] = (ratios[0] * ratios[1]) ** 0.5
            yield f"            {d}: {faster_ranges(means)!r},"
        yield "        },"
        yield "    ),"


def _draw(axes, points: dict[str, list[tuple[int, float]]], title: str) -> None:
    """arm -> (tokens, time over eager's): ours as coloured lines, the others dotted, named where they begin."""
    from locas_ext.evaluation.report.plots.style import FAINT, INK, style

    style(axes)
    axes.axhline(1, color=INK, linewidth=0.8)
    for index, (arm, line_points) in enumerate(points.items()):
        if arm.startswith("ours"):
            axes.plot(*zip(*line_points, strict=True), "-o", color=f"C{index}", label=arm, markersize=3, linewidth=1.6)
        else:
            axes.plot(*zip(*line_points, strict=True), ":", color=FAINT, linewidth=1)
            axes.annotate(arm, line_points[0], fontsize=6, color=INK, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0.4, 1.8)
    axes.set_title(title, fontsize=9, color=INK, loc="left")


def plot(results: dict, path: Path) -> None:
    """Time over eager's against tokens: a column per hidden size, a row per mode."""
    from locas_ext.evaluation.report.plots.style import new_figure, save, write_heading

    same = _same(results["records"])
    widths = sorted({shape[1] for shape in same})
    arms = [arm for arm in dict.fromkeys(r["arm"] for r in results["records"]) if arm not in ("eager", "eager again")]
    figure, width = new_figure(7.2), 0.90 / len(widths)
    gpu = results["machine"].get("gpu", results["machine"]["cpu"])
    write_heading(figure, 0.06, "One FFN with its memory", f"time over transformers' FFN without a memory; {gpu}")
    for column, d in enumerate(widths):
        for line_number, mode in enumerate((FORWARD, BACKWARD)):
            axes = figure.add_axes((0.06 + column * width, 0.50 - line_number * 0.44, width - 0.03, 0.35))
            shapes = sorted(shape for shape in same if shape[1] == d and shape[3] == mode)
            points = {arm: [(s[2], same[s][arm]["ratio to eager"]) for s in shapes if arm in same[s]] for arm in arms}
            _draw(axes, {arm: found for arm, found in points.items() if found}, f"d = {d}, {mode}")
            if column == line_number == 0:
                axes.legend(fontsize=7, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ffn_report", description=__doc__)
    parser.add_argument("file", type=Path, help="what bench.ffn --out wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--auto", action="store_true", help="print the entries of cuda_families.FASTER instead")
    arguments = parser.parse_args()
    results = json.loads(arguments.file.read_text())
    if arguments.auto:
        print("\n".join(auto_entries(results)))
        return
    print("\n".join([*per_group(results["records"]), "", *every_shape(results["records"])]))
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
