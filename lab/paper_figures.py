"""From the records of the runs to the figures of `lab/paper.py`: each figure is some panels of points and a table.

A panel has series, a series has points, and a point has a mean with its 95 % interval over the values of all seeds. The
mean of each seed is kept beside it. Where runs are compared seed by seed, the point is the mean of the differences.
"""

import math
from statistics import mean, stdev
from typing import Any

from eval import wilson
from lab.imitation import WAYS
from lab.paper_runs import LONG
from lab.watch import WINDOW, means, stop_at
from tinyworld.world import HARD_TURNS
from tools import TOOLS

Records = dict[str, dict[int, dict]]  # name of the run, seed: data of its record
Sums = list[float]  # n values, their sum, the sum of their squares
Table = list[list[str]]  # its first row is the head
LABELS = {
    "baseline": "Flow-GRPO",
    "last-turn": "reward on the last turn only",
    "fading-credit": "credit halves with each turn before the last",
    "same-turn": "turns compared with turns of the same number",
    "turn-pooled": "statistics pooled over turns",
    "no-std": "without standard deviation",
    "token-mean": "mean over all tokens",
    "group-2": "groups of 2",
    "group-4": "groups of 4",
    "group-16": "groups of 16",
    "no-kl": "without KL",
    "more-kl": "KL weight 0.01",
    "one-update": "one update per step",
    "wide-clip": "clip 0.2 and 0.3",
    "four-updates": "four updates",
    "four-updates-wide-clip": "four updates, clip 0.2 and 0.3",
    "gspo": "ratio of the whole turn (GSPO)",
    "cispo": "clipped ratio as a weight (CISPO)",
    "noisy-10": "a tenth of the verdicts is wrong",
    "noisy-20": "a fifth of the verdicts is wrong",
}
WHEN = {"before": "untrained", "after": "after Flow-GRPO"}
TEST, MISTAKES, GAIN = "test accuracy", "turns with a mistake", "difference to Flow-GRPO"
REWARD, ACCURACY = "training reward (share of trajectories, %)", "test accuracy (share of questions, %)"
AREA = "difference in the mean training reward (points)"
LONG_RUNS = {"long": "KL weight 0.001", "long-no-kl": "without KL"}


def point(x: Any, by_seed: dict[int, Sums], share: bool = True) -> dict:
    """The mean of all seeds' values at x, with its 95 % interval; `share`: whether the values lie between 0 and 1."""
    n, total, squares = map(sum, zip(*by_seed.values()))
    average = total / n
    half = 1.96 * math.sqrt(max(0.0, squares / n - average**2) / n)
    low, high = wilson(total, n) if share else (average - half, average + half)
    low, high = min(low, average), max(high, average)  # whatever rounding does
    seeds = {seed: of_seed / count for seed, (count, of_seed, _) in by_seed.items()}
    return {"x": x, "y": average, "low": low, "high": high, "n": n, "seeds": seeds}


# Student's t, by the number of differences: 95 % of its mass lies within so many standard errors.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20}


def paired_point(x: str, by_seed: dict[int, float]) -> dict:
    """The mean of differences, one for each seed, with its 95 % interval. A single difference has none."""
    values = list(by_seed.values())
    half = STUDENT[min(len(values), max(STUDENT))] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    middle = mean(values)
    return {"x": x, "y": middle, "low": middle - half, "high": middle + half, "n": len(values), "seeds": by_seed}


def panel(x: str, y: str, series: dict[str, list[dict]], share: bool = True, **more: Any) -> dict:
    """Labels of both axes, and the points of each series."""
    return {"x": x, "y": y, "share": share, "series": series, **more}


def tested(figures: dict) -> Sums:
    """An accuracy as sums over the questions."""
    hits = figures["accuracy"] * figures["n"]
    return [figures["n"], hits, hits]


def over_steps(data: dict[int, dict], name: str, share: bool = True, window: int = 1, values: int = 1) -> list[dict]:
    """A series over the steps of a training: what the records have under `name`, over all seeds. A point stands for
    `window` steps. A record that holds a mean of several `values` counts for so many."""
    by_step: dict[int, dict[int, Sums]] = {}
    for seed, record in data.items():
        for step in record["steps"]:
            if step[name]:
                of_seed = by_step.setdefault(-(-step["step"] // window) * window, {})
                of_seed[seed] = [a + values * b for a, b in zip(of_seed.get(seed, [0, 0, 0]), step[name])]
    return [point(step, by_seed, share) for step, by_seed in by_step.items()]


def test_point(x: str, data: dict[int, dict], which: str = "after", family: str = "all") -> dict:
    """The test accuracy that the records hold under `which`, of all questions or of a family."""
    figures = {seed: {"all": record[which], **record[which]["by_family"]}[family] for seed, record in data.items()}
    return point(x, {seed: tested(of_family) for seed, of_family in figures.items()})


def families(data: dict[int, dict], which: str = "after") -> list[str]:
    return list(next(iter(data.values()))[which]["by_family"])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def with_interval(middle: float, low: float, high: float) -> str:
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def paired_text(paired: dict) -> str:
    """What `lab.paired.paired` has found, in points."""
    return with_interval(*(100 * x for x in (paired["difference"], *paired["interval"])))


# --- the main result and how the planner was trained ------------------------------------------------------------------


def main_result(records: Records) -> list[dict]:
    main, series = records["main"], {}
    for when, label in WHEN.items():
        series[label] = [test_point(family, main, when, family) for family in ("all", *families(main))]
    return [panel("family of questions", ACCURACY, series)]


def how_trained(records: Records) -> list[dict]:
    main, peer = records["main"], last_round(records["imitation-peer"])
    points = [
        test_point("frozen", main, "before"),
        test_point("stronger planner, frozen", peer, "teacher"),
        test_point("fine-tuned on its successes", peer),
        test_point("Flow-GRPO", main),
    ]
    return [panel("planner", ACCURACY, {TEST: points})]


def last_round(data: dict[int, dict]) -> dict[int, dict]:
    return {seed: record | {"after": record["rounds"][-1]} for seed, record in data.items()}


def ways(records: Records) -> dict[str, dict[int, dict]]:
    return {way: last_round(records[f"imitation-{way}"]) for way in WAYS}


def imitation(records: Records) -> list[dict]:
    data = ways(records)
    frozen = test_point("frozen", data["peer"], "before")
    by_family = {
        family: [test_point(way, of_way, family=family) for way, of_way in data.items()]
        for family in families(data["peer"])
    }
    return [
        panel("", ACCURACY, {TEST: [frozen, *(test_point(way, of_way) for way, of_way in data.items())]}),
        panel("", ACCURACY, by_family),
    ]


def imitation_table(records: Records) -> Table:
    """The behaviour beside the accuracy. A difference is over the same questions, one for each seed."""
    rows = [["way", "its teacher", "frozen", "after", "difference", "Search", "invented", "errors", "cut off", "KL",
             "expected before the run"]]  # fmt: skip
    for way, data in ways(records).items():
        own = list(data.values())
        last = [record["after"] for record in own]
        cells = [percent(mean(values)) for values in (
            [record["teacher"]["accuracy"] for record in own], [record["before"]["accuracy"] for record in own],
            [r["accuracy"] for r in last], [r["tool_shares"]["Search"] for r in last], [r["invented"] for r in last],
            [r["tool_error_rate"] for r in last], [r["truncated_turns"] for r in last],
        )]  # fmt: skip
        cells.insert(3, ", ".join(paired_text(r["paired"]) for r in last))
        rows.append([way, *cells, f"{mean(r['kl'] for r in last):.2f}", WAYS[way].hypothesis])
    return rows


# --- ablations, each against the baseline of the same seed ------------------------------------------------------------


def rewards(record: dict) -> list[float]:
    """The mean reward of each step."""
    return [step["reward"][1] / step["reward"][0] for step in record["steps"]]


def area(record: dict) -> float:
    """The area under a learning curve, as the mean reward of its steps."""
    return mean(rewards(record))


def differences(records: Records, names: list[str]) -> list[dict]:
    base = records["baseline"]
    return [
        paired_point(LABELS[name], {s: 100 * (area(record) - area(base[s])) for s, record in records[name].items()})
        for name in names
    ]


def ablations(records: Records) -> list[dict]:
    names = [name for name in records if name != "baseline"]
    return [panel("", AREA, {GAIN: differences(records, names)}, False, signed=True, flat=True)]


def curves(records: Records) -> list[dict]:
    """The learning curves, and the differences in the area under them."""
    series = {LABELS[name]: over_steps(data, "reward") for name, data in records.items()}
    gain = differences(records, [name for name in records if name != "baseline"])
    return [panel("step", REWARD, series), panel("", AREA, {GAIN: gain}, False, signed=True)]


def ablation_table(records: Records) -> Table:
    """Mean training rewards of each variant, the difference to the baseline, and what a reader may conclude."""
    rows = [["variant", "all steps", "last three", "difference, points", "what you may conclude"]]
    for name, data in records.items():
        last = mean(mean(rewards(record)[-3:]) for record in data.values())
        cells = [LABELS[name], percent(mean(map(area, data.values()))), percent(last)]
        if name == "baseline":
            rows.append([*cells, "", "This is what the rows below are compared with."])
            continue
        (gap,) = differences(records, [name])
        text = with_interval(gap["y"], gap["low"], gap["high"]) if gap["n"] > 1 else f"{gap['y']:+.1f}"
        rows.append([*cells, text, conclusion(gap)])
    return rows


def conclusion(gap: dict) -> str:
    n, half, how = gap["n"], (gap["high"] - gap["low"]) / 2, "more slowly" if gap["y"] < 0 else "faster"
    if n < 2:
        return "Nothing: a single seed shows no noise."
    if clear(gap):
        agree = sum(value * gap["y"] > 0 for value in gap["seeds"].values())
        return f"It learns {how} here, in {agree} of {n} seeds. Where it ends after more steps is not shown."
    return f"No effect is shown: with {n} seeds as noisy as these, a difference has to exceed about {half:.0f} points."


def clear(gap: dict) -> bool:
    """Whether a difference has an interval that excludes zero."""
    return gap["n"] > 1 and (gap["low"] > 0 or gap["high"] < 0)


# --- what changes over a training -------------------------------------------------------------------------------------


def tools(records: Records) -> list[dict]:
    main = records["main"]
    shares = {tool: over_steps(main, tool) for tool in TOOLS}
    errors = {MISTAKES: over_steps(main, "errors")}
    return [panel("step", "turns with each tool (%)", shares), panel("step", f"{MISTAKES} (%)", errors)]


def over_training(records: Records) -> list[dict]:
    main = records["main"]
    return [
        panel("step", REWARD, {"Flow-GRPO": over_steps(main, "reward")}),
        panel("step", "tokens per turn", {"tokens": over_steps(main, "tokens", False)}, False),
        panel("step", "turns per question", {"turns": over_steps(main, "turns", False)}, False),
    ]


def long_training(records: Records) -> list[dict]:
    """Hundreds of steps at a constant learning rate: the reward, and what may warn of a collapse."""
    kinds = {  # label: (name in the records, is it a share, steps of a point, values behind the number of a step)
        REWARD: ("reward", True, WINDOW, 1),
        "entropy per token (nats)": ("entropy", False, WINDOW, 1),
        "KL to the initial policy": ("kl", False, WINDOW, 1),
        "groups without signal (%)": ("zero_variance_groups", True, WINDOW, LONG["questions_per_step"]),
        "dev accuracy (%)": ("dev", True, 1, LONG["dev_questions"]),
    }
    panels = []
    for y, (name, *how) in kinds.items():
        runs = {"long": LONG_RUNS["long"]} if name == "kl" else LONG_RUNS  # without a KL in the loss, none is computed
        series = {label: over_steps(records[run], name, *how) for run, label in runs.items()}
        panels.append(panel("step", y, series, how[0]))
    return panels


def long_table(records: Records) -> Table:
    rows = [["training", f"best {WINDOW} steps", f"last {WINDOW} steps", "test after", "the rule stops it", "dev then"]]
    for run, label in LONG_RUNS.items():
        for seed, record in records[run].items():
            curve = rewards(record)
            best, last, step = max(means(curve), default=0.0), mean(curve[-WINDOW:]), stop_at(curve)
            devs = [s["dev"][1] for s in record["steps"] if s["dev"] and s["step"] <= (step or math.inf)]
            rows.append([f"{label}, seed {seed}", percent(best), percent(last),
                         percent(record["after"]["accuracy"]), f"step {step}" if step else "never",
                         percent(devs[-1])])  # fmt: skip
    return rows


def noise(records: Records) -> list[dict]:
    seeds = set(records["noisy-10"])
    exact = {seed: record for seed, record in records["main"].items() if seed in seeds}
    data = {"exact": exact, "10 % wrong": records["noisy-10"], "20 % wrong": records["noisy-20"]}
    points = [test_point("untrained", exact, "before"), *(test_point(name, runs) for name, runs in data.items())]
    return [panel("verdicts of the judge in training", ACCURACY, {TEST: points})]


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
        planners = {"small": records["small"], "bundled": records["main"]}
        series[label] = [test_point(f"{sizes[size] / 1e6:.2f} M", data, when) for size, data in planners.items()]
    return [panel("parameters of the planner", ACCURACY, series)]


# --- generalisation ---------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "other-world": "another world",
    "other-families": "families without training",
    "more-turns": "8 turns after training with 3",
    "harder": "the hard split",
}


def elsewhere(records: Records) -> list[dict]:
    series, by_family = {}, {}
    for planner in ("untrained", "trained"):
        series[planner] = [test_point(label, records[name], planner) for name, label in ELSEWHERE.items()]
        by_family[planner] = [
            test_point(f"{family}, {turns} turns", records[name], planner, family)
            for name, turns in (("other-families", 4), ("harder", HARD_TURNS))
            for family in families(records[name], planner)
        ]
    return [panel("", ACCURACY, series), panel("", ACCURACY, by_family)]


def elsewhere_table(records: Records) -> Table:
    rows = [["tested on", "seed", "untrained", "trained", "difference on the same questions"]]
    for name, label in ELSEWHERE.items():
        for seed, record in records[name].items():
            figures = [percent(record[planner]["accuracy"]) for planner in ("untrained", "trained")]
            rows.append([label, str(seed), *figures, paired_text(record["paired"])])
    return rows
