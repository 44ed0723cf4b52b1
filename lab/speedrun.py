"""Seconds to 90 %: the default run with seeds 0 to 4, and whether it is a record by the rules of docs/speedrun.md.

python -m lab.speedrun                          # runs/speedrun; stopped, the same command goes on
python -m lab.speedrun --processes 2            # each run under torchrun, with a process per core
python -m lab.speedrun --learning_rate 5e-4     # all flags of train.py, for a try
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from eval import one_line_errors
from tools import UserError

SEEDS = range(5)
MEDIAN, EACH = 0.90, 0.88  # of the test questions, at least


def verdict(results: list[dict]) -> str:
    """A row of the table in docs/speedrun.md, and what the rules say of it."""
    after = [result["after"]["accuracy"] for result in results]
    seconds = [result["train_seconds"] for result in results]
    row = f"{statistics.median(seconds):.0f} s | " + ", ".join(f"{100 * share:.1f}" for share in after) + " %"
    valid = statistics.median(after) >= MEDIAN and min(after) >= EACH
    times = ", ".join(f"{s:.0f}" for s in seconds)
    return f"{row} ({times} s): " + ("valid" if valid else f"not valid: median {MEDIAN:.0%}, each {EACH:.0%} at least")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Five runs; all other flags go to train.py.", allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, help="processes of each run, under torchrun if not 1")
    options, flags = parser.parse_known_args(arguments)
    launcher = [sys.executable]
    if options.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(options.processes), "--standalone"]
    results = []
    for seed in SEEDS:
        run = Path("runs") / "speedrun" / f"seed{seed}"
        command = [*launcher, "train.py", *flags, "--seed", str(seed), "--run_dir", str(run)]
        if subprocess.run(command, cwd=Path(__file__).parent.parent).returncode or not (run / "result.json").exists():
            raise UserError(f"{run} did not end: the same command goes on")
        results.append(json.loads((run / "result.json").read_text()))
    print(verdict(results))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
