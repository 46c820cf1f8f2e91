"""Random sequences of verbs on tiny hosts, checked after each: python -m bench.fuzz --sequences 1000

Each sequence has a seed of its own. One that fails is printed as the lines of Python it ran, and `--seed N --sequences 1`
repeats it. Exit status 1 if one fails.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))

from support.world import run_sequence


def sequence(seed: int, tally: Counter) -> bool:
    """Runs the sequence of a seed, and prints it if it fails. Returns whether it did not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            world = run_sequence(seed, Path(folder))
        except Exception as error:
            print(f"\n# seed {seed}: {type(error).__name__}: {error}")
            print("\n".join(error.world.log))
            return False
    for verb, (done, refused) in world.tally.items():
        tally[verb, "done"] += done
        tally[verb, "refused"] += refused
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="how long at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tally, failed, done, end = Counter(), [], 0, time.monotonic() + 60 * arguments.minutes
    for seed in track(range(arguments.seed, arguments.seed + arguments.sequences), "sequences", transient=True):
        if time.monotonic() > end:
            break
        done += 1
        if not sequence(seed, tally):
            failed.append(seed)
    for verb in sorted({verb for verb, _ in tally}):
        print(f"{verb:36} {tally[verb, 'done']:6} done {tally[verb, 'refused']:6} refused")
    print(f"{done} sequences, {len(failed)} failed" + (f": seeds {failed}" if failed else ""))
    sys.exit(1 if failed or not done else 0)


if __name__ == "__main__":
    main()
