"""`python -m bench.ffn_report`: what a measurement says for backend "auto", and that tables and picture come from any."""

import itertools
import random

from bench.ffn_report import auto_entries, every_shape, faster_ranges, per_group, plot
from locas_ext.ops.backends.cuda_families import Faster

TOKENS = (1, 8, 32, 64, 128, 512, 2048, 8192)


def test_ranges_hold_exactly_where_it_was_faster():
    for _ in range(200):
        ratios = {tokens: random.choice([0.5, 0.99, 1.0, 2.0]) for tokens in random.sample(TOKENS, random.randint(1, 8))}
        faster = Faster("drawn", {1024: faster_ranges(ratios)})
        assert {tokens for tokens in ratios if faster.holds(tokens, 1024)} == {t for t, ratio in ratios.items() if ratio < 1}, (
            ratios
        )
        # Between two that were measured it takes both; beyond them the nearest.
        ordered = sorted(ratios)
        for before, after in itertools.pairwise(ordered):
            if after - before > 1:
                assert faster.holds(before + 1, 1024) == (ratios[before] < 1 and ratios[after] < 1), ratios
        assert faster.holds(10**6, 1024) == (ratios[ordered[-1]] < 1)
        assert faster.holds(1, 1024) == (ratios[ordered[0]] < 1)


def measured():
    """Records as bench.ffn writes them: sm90 beats matmul below 100 tokens, sm80 nowhere; one kernel up to 64."""
    microseconds = {"eager": 10.0, "ours, matmul": 11.0, "ours, sm80": 12.0, "eager again": 10.1}
    records = []
    for d in (1024, 2048):
        for tokens in TOKENS:
            for mode in ("forward", "forward + backward"):
                arms = {**microseconds, "ours, sm90": 9.0 if tokens < 100 else 11.5}
                for arm, median in (arms | {"ours, one kernel": 9.5} if tokens <= 64 else arms).items():
                    shape = {"dtype": "bfloat16", "d": d, "tokens": tokens, "mode": mode, "arm": arm}
                    figures = {"median_us": median, "tflops": 1.0, "percent_of_floor": 50.0, "ratio to eager": median / 10}
                    records.append({**shape, **figures})
    return {"machine": {"gpu": "H100", "cpu": "EPYC", "torch": "2.11", "commit": "abc"}, "records": records}


def test_the_entries_are_python_and_say_where_a_family_was_faster():
    entries = eval("{" + "\n".join(auto_entries(measured())) + "}", {"Faster": Faster})
    assert entries == {
        "sm80": Faster("H100, torch 2.11, commit abc", {1024: (), 2048: ()}),
        "sm90": Faster("H100, torch 2.11, commit abc", {1024: ((1, 64),), 2048: ((1, 64),)}),
    }


def test_tables_and_picture(tmp_path):
    results = measured()
    groups, shapes = list(per_group(results["records"])), list(every_shape(results["records"]))
    assert "| bfloat16 | 1024 | 1-32 | forward | 0.90-0.90 | 1.10-1.10 | 1.20-1.20 | 0.90-0.90 | 0.95-0.95 |" in groups
    assert "| bfloat16 | 2048 | 64-512 | forward | 0.90-1.10 | 1.10-1.10 | 1.20-1.20 | 0.90-1.15 | 0.95-0.95 |" in groups
    assert "| bfloat16 | 2048 | 2048-8192 | forward | 1.10-1.10 | 1.10-1.10 | 1.20-1.20 | 1.15-1.15 |  |" in groups
    assert len(shapes) == 2 + 2 * len(TOKENS) * 2 and len({line.count("|") for line in shapes}) == 1
    plot(results, tmp_path / "ffn.png")
    assert (tmp_path / "ffn.png").read_bytes().startswith(b"\x89PNG")


def test_the_ends_go_on():
    assert faster_ranges({8: 0.5}) == ((1, None),)
    assert faster_ranges({8: 0.5, 64: 1.0}) == ((1, 8),)
    assert faster_ranges({8: 1.0, 64: 0.5}) == ((64, None),)
