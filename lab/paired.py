"""Two planners on the same questions: the difference, with its interval and a test.

`eval.py` prints it for each planner against the first, and `train.py` for the test after training against the one
before. Alone it compares the two tests of a run:

    python -m lab.paired --run runs/tinyworld-seed0

Questions differ in difficulty more than planners do. A difference of each question leaves that out, so its interval is
narrower than the intervals of two shares suggest.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from eval import Ranged, run_main, setting
from tasks import read_kept
from tools import UserError


def paired(before: list[float], after: list[float]) -> dict:
    """Rewards of the same questions -> the mean difference, its 95 % interval, and McNemar's exact p. If a reward is
    the mean of several trials, p belongs to the sign test, which is the same for one trial."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1))
    half = 1.96 * deviation / math.sqrt(n)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "n": n, "difference": mean, "interval": [mean - half, mean + half],
        "better": better, "worse": worse, "p": sign_test(better, worse),
    }  # fmt: skip


def sign_test(better: int, worse: int) -> float:
    """How often coins would split at least as unevenly, if each of these questions had tossed one (two-sided)."""
    tosses, fewer = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(tosses, k) for k in range(fewer + 1)) / 2**tosses)


def line(name: str, before: list[float], after: list[float]) -> str:
    r = paired(before, after)
    low, high = (100 * x for x in r["interval"])
    p = f"{r['p']:.2g}" if r["p"] >= 1e-6 else "below 1e-6"
    return (
        f"{name}: {100 * r['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] on the same {r['n']} questions; "
        f"{r['better']} better, {r['worse']} worse, McNemar p {p}"
    )


def against_first(rewards: dict[str, list[float]], trials: int) -> str:
    """A line for each planner but the first. Rewards are by planner, those of a question's trials side by side."""
    shares = {
        name: [sum(row[i : i + trials]) / trials for i in range(0, len(row), trials)] for name, row in rewards.items()
    }
    (first, before), *others = shares.items()
    return "\n".join(line(f"{name} against {first}", before, after) for name, after in others)


def line_of_run(run: Path) -> str:
    """The test after training against the test before."""
    tests = []
    for when in ("before", "after"):
        path = run / f"test_{when}.jsonl"
        if not path.exists():
            raise UserError(f"{path} is missing: restore it, or let the run end")
        tests.append(read_kept(path, dict, "is damaged ({error}): restore it"))
    questions = [[row["question"] for row in rows] for rows in tests]
    if questions[0] != questions[1]:
        raise UserError(f"{run}: the tests before and after have different questions")
    return line("after against before", *([row["reward"] for row in rows] for rows in tests))


@dataclass
class PairedConfig(Ranged):
    run: str = setting("runs/tinyworld-seed0", "folder of a run that has ended", group="the comparison")


def main(config: PairedConfig) -> None:
    print(line_of_run(Path(config.run)))


if __name__ == "__main__":
    run_main(main, PairedConfig)
