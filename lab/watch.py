"""Stop a run before it falls apart: train.py under one rule, which looks at the reward after each step.

    python -m lab.watch --steps 300 --decay false --questions_per_step 4      # the flags are those of train.py

The rule: when the mean reward of the last ten steps lies a quarter below the best ten steps so far, the run stops. It
does not save the step at which it stops, so `checkpoint/` stays as the run last saved it (--eval_every). docs/paper.md
shows what the rule would have saved in two runs of 300 steps. Entropy rises before the reward falls, but it rises in
healthy runs too: look at it, and let the reward decide.
"""

from pathlib import Path
from statistics import mean
from unittest.mock import patch

import train
from eval import run_main
from tasks import append, read_kept
from tools import UserError

WINDOW, DROP = 10, 0.25


def means(rewards: list[float]) -> list[float]:
    """The mean of each `WINDOW` consecutive steps."""
    return [mean(rewards[end - WINDOW : end]) for end in range(WINDOW, len(rewards) + 1)]


def fell(recent: float, best: float) -> bool:
    return recent < (1 - DROP) * best


def stop_at(rewards: list[float]) -> int | None:
    """The first step at which the rule stops a run, given the reward of each step."""
    best = 0.0
    for step, recent in enumerate(means(rewards), start=WINDOW):
        best = max(best, recent)
        if fell(recent, best):
            return step
    return None


def append_and_watch(path: Path, *rows: dict) -> None:
    """In the place of train.py's `append`: it looks at the log of the run after each step."""
    append(path, *rows)
    if path.name == "metrics.jsonl":
        log = read_kept(path, dict, "is damaged ({error}): mend or remove it")
        recent = means([row["reward"] for row in log if "reward" in row])
        if recent and fell(recent[-1], max(recent)):
            raise UserError(
                f"stopped at step {log[-1]['step']}: the mean reward of the last {WINDOW} steps is {recent[-1]:.2f} "
                f"after {max(recent):.2f}; {path.parent / 'checkpoint'} is the last one saved"
            )


def main(config: train.Config) -> None:
    with patch.object(train, "append", append_and_watch):
        train.main(config)


if __name__ == "__main__":
    run_main(main, train.Config)
