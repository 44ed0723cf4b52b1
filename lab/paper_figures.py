"""From the records of the runs to the figures of `lab/paper.py`: each figure is some panels of points, as JSON.

A panel has series, a series has points, and a point has a mean with its 95 % interval over the values of all seeds. The
mean of each seed is kept beside it.
"""

import math
from collections.abc import Callable
from typing import Any

import train
from eval import wilson
from tools import TOOLS

Records = dict[str, dict[int, dict]]  # name of the run, seed: data of its record
Sums = list[float]  # n values, their sum, the sum of their squares
LABELS = {
    "baseline": "Flow-GRPO",
    "last-turn": "reward on the last turn only",
    "fading-credit": "credit halves with each turn before the last",
    "turn-pooled": "statistics pooled over turns",
    "no-std": "without standard deviation",
    "no-kl": "without KL",
    "two-updates": "Flow-GRPO, two updates per step",
    "dapo": "asymmetric clip and token mean, two updates",
    "gspo": "sequence-level ratio, two updates",
}
WHEN = {"before": "untrained", "after": "after Flow-GRPO"}
TEST, MISTAKES = "test accuracy", "turns with a mistake"
REWARD, ACCURACY = "training reward (share of trajectories, %)", "test accuracy (share of questions, %)"
TURN_STATISTICS = ("baseline", "last-turn", "fading-credit")
GROUP_STATISTICS = ("baseline", "turn-pooled", "no-std", "no-kl")


def point(x: Any, by_seed: dict[int, Sums], share: bool = True) -> dict:
    """The mean of all seeds' values at x, with its 95 % interval; `share`: whether the values lie between 0 and 1."""
    n, total, squares = map(sum, zip(*by_seed.values()))
    mean = total / n
    half = 1.96 * math.sqrt(max(0.0, squares / n - mean**2) / n)
    low, high = wilson(total, n) if share else (mean - half, mean + half)
    low, high = min(low, mean), max(high, mean)  # whatever rounding does
    seeds = {seed: of_seed / count for seed, (count, of_seed, _) in by_seed.items()}
    return {"x": x, "y": mean, "low": low, "high": high, "n": n, "seeds": seeds}


def panel(x: str, y: str, series: dict[str, list[dict]], share: bool = True) -> dict:
    """Labels of both axes, and the points of each series."""
    return {"x": x, "y": y, "share": share, "series": series}


def tested(figures: dict) -> Sums:
    """An accuracy as sums over the questions."""
    hits = figures["accuracy"] * figures["n"]
    return [figures["n"], hits, hits]


def over_steps(data: dict[int, dict], read: Callable[[dict], Sums], share: bool = True) -> list[dict]:
    """A series over the steps of a training: what `read` finds in each step, over all seeds."""
    by_step: dict[int, dict[int, Sums]] = {}
    for seed, record in data.items():
        for step in record["steps"]:
            by_step.setdefault(step["step"], {})[seed] = read(step)
    return [point(step, by_seed, share) for step, by_seed in by_step.items()]


def reward_curves(records: Records, names: tuple[str, ...]) -> dict:
    return panel("step", REWARD, {LABELS[name]: reward_curve(records[name]) for name in names})


def reward_curve(data: dict[int, dict]) -> list[dict]:
    return over_steps(data, lambda step: step["reward"])


def test_point(x: str, data: dict[int, dict], which: str = "after") -> dict:
    """The test accuracy that the records hold under `which`."""
    return point(x, {seed: tested(record[which]) for seed, record in data.items()})


def accuracies(records: Records, names: tuple[str, ...]) -> dict:
    return panel("", ACCURACY, {TEST: [test_point(LABELS[name], records[name]) for name in names]})


# --- the panels of each figure ----------------------------------------------------------------------------------------


def main_result(records: Records) -> list[dict]:
    series = {}
    for when, label in WHEN.items():
        by_family: dict[str, dict[int, Sums]] = {}
        for seed, record in records["main"].items():
            for family, figures in ({"all": record[when]} | record[when]["by_family"]).items():
                by_family.setdefault(family, {})[seed] = tested(figures)
        series[label] = [point(family, by_seed) for family, by_seed in by_family.items()]
    return [panel("family of questions", ACCURACY, series)]


def how_trained(records: Records) -> list[dict]:
    main, taught = records["main"], records["taught"]
    points = [
        test_point("frozen", main, "before"),
        test_point("ideal in 3 of 4 turns, frozen", taught, "teacher"),
        test_point("fine-tuned on its successes", taught, "student"),
        test_point("Flow-GRPO", main, "after"),
    ]
    return [panel("planner", ACCURACY, {TEST: points})]


def side_by_side(records: Records) -> list[dict]:
    names = tuple(records)
    panels = [reward_curves(records, names), accuracies(records, names)]
    if "two-updates" in names:  # does the clip do anything?
        clipped = {LABELS[name]: over_steps(records[name], lambda step: step["clipped"]) for name in names}
        panels.append(panel("step", "tokens clipped in the second update (%)", clipped) | {"top": None})
    return panels


def credit(records: Records) -> list[dict]:
    names = (*TURN_STATISTICS, *GROUP_STATISTICS[1:])
    curves = [reward_curves(records, some) for some in (TURN_STATISTICS, GROUP_STATISTICS)]
    return [*curves, accuracies(records, names)]


def tools(records: Records) -> list[dict]:
    main = records["main"]
    shares = {tool: over_steps(main, lambda step: step["tools"][tool]) for tool in TOOLS}
    errors = {MISTAKES: over_steps(main, lambda step: step["errors"])}
    return [panel("step", "turns with each tool (%)", shares), panel("step", f"{MISTAKES} (%)", errors)]


def over_training(records: Records) -> list[dict]:
    main = records["main"]
    return [
        panel("step", REWARD, {"Flow-GRPO": reward_curve(main)}),
        panel("step", "tokens per turn", {"tokens": over_steps(main, lambda step: step["tokens"], False)}, False),
        panel("step", "turns per question", {"turns": over_steps(main, lambda step: step["turns"], False)}, False),
    ]


def by_budget(records: Records) -> list[dict]:
    data = records["turn-budget"]

    def series(what: str, share: bool) -> dict[str, list[dict]]:
        lines = {}
        for name, by_turns in next(iter(data.values())).items():
            lines[name] = []
            for turns in by_turns:
                sums = {seed: record[name][turns][what] for seed, record in data.items()}
                lines[name].append(point(int(turns), sums, share))
        return lines

    budget = "turn budget (turns per question, at most)"
    return [panel(budget, ACCURACY, series("reward", True)), panel(budget, "turns used", series("turns", False), False)]


def by_size(records: Records) -> list[dict]:
    sizes, series = records["pretrain"][0], {}
    for when, label in WHEN.items():
        planners = {"small": records["small"], "bundled": records["baseline"]}
        series[label] = [test_point(f"{sizes[size] / 1e6:.2f} M", data, when) for size, data in planners.items()]
    return [panel("parameters of the planner", ACCURACY, series)]


def by_group(records: Records) -> list[dict]:
    runs = {train.Config.group_size: records["baseline"]}
    for name, data in records.items():
        if name != "baseline":
            runs[int(name.removeprefix("group-"))] = data
    runs = dict(sorted(runs.items()))
    curves = {f"G = {size}": reward_curve(data) for size, data in runs.items()}
    points = [test_point(f"G = {size}", data) for size, data in runs.items()]
    return [panel("step", REWARD, curves), panel("", ACCURACY, {TEST: points})]
