"""The paper's analyses in small: its tables and figures on the bundled world, variants of the algorithm, and one page.

    python paper.py             # at most two hours on 2 cores; stopped, the same command continues
    python paper.py --quick     # at most 15 minutes: one seed and fewer steps, and the page says so
    python paper.py --plan      # the runs, and the minutes that each is expected to take
    python paper.py --figures   # the page again, from the JSON alone

Writes paper/index.html, a JSON file for each of its figures, and paper/runs. What is run stands in paper_runs.py; here
is what becomes of it: figures as JSON, then drawings, sentences and the page. Each JSON carries a fingerprint of the
code and the settings that made it, and the page refuses one that other code has made.
"""

import argparse
import html
import inspect
import io
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train
from eval import wilson
from llm import EngineError, UserError
from paper_runs import (
    COMPARED,
    FLAGS,
    PATCHES,
    SCALES,
    Run,
    Scale,
    by_id,
    digest,
    do,
    do_all,
    fingerprint,
    folder_of_runs,
    meaning,
    plan,
)
from tools import TOOLS

# --- figures: what the runs gave, as JSON -----------------------------------------------------------------------------

Records = dict[str, dict[int, dict]]  # name of the run, seed: data of its record
LABELS = {
    "baseline": "Flow-GRPO",
    "last-turn": "reward on the last turn only",
    "fading-credit": "credit halves with each turn before the last",
    "turn-pooled": "statistics pooled over turns",
    "no-std": "without standard deviation",
    "no-kl": "without KL",
    "two-updates": "Flow-GRPO, two updates a step",
    "dapo": "asymmetric clip and token mean, two updates",
    "gspo": "sequence-level ratio, two updates",
}
UNTRAINED, TRAINED = "untrained", "after Flow-GRPO"
WHEN = {"before": UNTRAINED, "after": TRAINED}
TEST, MISTAKES = "test accuracy", "turns with a mistake"
REWARD, ACCURACY = "training reward (share of trajectories, %)", "test accuracy (share of questions, %)"


def point(x: Any, sums: dict[int, list[float]], share: bool = True) -> dict:
    """The mean of all seeds' values with its 95 % interval, from [n, sum, sum of squares] of each seed."""
    n, total, squares = map(sum, zip(*sums.values()))
    half = 1.96 * math.sqrt(max(0.0, squares / n - (total / n) ** 2) / n)
    low, high = wilson(total, n) if share else (total / n - half, total / n + half)
    low, high = min(low, total / n), max(high, total / n)  # whatever rounding does
    each = {seed: of_seed / count for seed, (count, of_seed, _) in sums.items()}
    return {"x": x, "y": total / n, "low": low, "high": high, "n": n, "seeds": each}


def panel(x: str, y: str, series: dict[str, list[dict]], share: bool = True) -> dict:
    return {"x": x, "y": y, "share": share, "series": series}


def tested(figures: dict) -> list[float]:
    hits = figures["accuracy"] * figures["n"]
    return [figures["n"], hits, hits]


def over_steps(data: dict[int, dict], read: Callable[[dict], list[float]], share: bool = True) -> list[dict]:
    by_seed = {seed: {step["step"]: read(step) for step in record["steps"]} for seed, record in data.items()}
    steps = next(iter(by_seed.values()))
    return [point(step, {seed: sums[step] for seed, sums in by_seed.items()}, share) for step in steps]


def rewards(records: Records, names: tuple[str, ...]) -> dict:
    return panel("step", REWARD, {LABELS[n]: over_steps(records[n], lambda step: step["reward"]) for n in names})


def accuracies(records: Records, names: tuple[str, ...]) -> dict:
    points = [point(LABELS[n], {s: tested(r["after"]) for s, r in records[n].items()}) for n in names]
    return panel("", ACCURACY, {TEST: points})


def main_result(records: Records) -> list[dict]:
    main, series = records["main"], {}
    for when, label in WHEN.items():
        figures = {seed: record[when] for seed, record in main.items()}
        families = ["all", *next(iter(figures.values()))["by_family"]]
        of = {seed: {"all": f} | f["by_family"] for seed, f in figures.items()}
        series[label] = [point(name, {seed: tested(f[name]) for seed, f in of.items()}) for name in families]
    return [panel("family of questions", ACCURACY, series)]


def how_trained(records: Records) -> list[dict]:
    main, taught = records["main"], records["taught"]
    bars = {
        "frozen": {seed: r["before"] for seed, r in main.items()},
        "ideal in 3 of 4 turns, frozen": {seed: r["teacher"] for seed, r in taught.items()},
        "fine-tuned on its successes": {seed: r["student"] for seed, r in taught.items()},
        "Flow-GRPO": {seed: r["after"] for seed, r in main.items()},
    }
    points = [point(name, {seed: tested(f) for seed, f in figures.items()}) for name, figures in bars.items()]
    return [panel("planner", ACCURACY, {TEST: points})]


def side_by_side(records: Records) -> list[dict]:
    names = tuple(records)
    panels = [rewards(records, names), accuracies(records, names)]
    if "two-updates" in names:  # does the clip do anything?
        clipped = {LABELS[n]: over_steps(records[n], lambda step: step["clipped"]) for n in names}
        panels.append(panel("step", "tokens clipped in the second update (%)", clipped) | {"top": None})
    return panels


def credit(records: Records) -> list[dict]:
    turns, statistics = ("baseline", "last-turn", "fading-credit"), ("baseline", "turn-pooled", "no-std", "no-kl")
    return [rewards(records, turns), rewards(records, statistics), accuracies(records, (*turns, *statistics[1:]))]


def tools(records: Records) -> list[dict]:
    main = records["main"]
    shares = {tool: over_steps(main, lambda step: step["tools"][tool]) for tool in TOOLS}
    errors = {MISTAKES: over_steps(main, lambda step: step["errors"])}
    return [panel("step", "turns with each tool (%)", shares), panel("step", f"{MISTAKES} (%)", errors)]


def over_training(records: Records) -> list[dict]:
    main = records["main"]
    return [
        panel("step", REWARD, {"Flow-GRPO": over_steps(main, lambda step: step["reward"])}),
        panel("step", "tokens a turn", {"tokens": over_steps(main, lambda step: step["tokens"], False)}, False),
        panel("step", "turns a question", {"turns": over_steps(main, lambda step: step["turns"], False)}, False),
    ]


def by_budget(records: Records) -> list[dict]:
    data = records["turn-budget"]
    keys = [key.split() for key in next(iter(data.values()))]

    def series(what: str, share: bool) -> dict[str, list[dict]]:
        lines = {name: [] for name, _ in keys}
        for name, turns in keys:
            sums = {seed: record[f"{name} {turns}"][what] for seed, record in data.items()}
            lines[name].append(point(int(turns), sums, share))
        return lines

    budget = "turn budget (turns a question, at most)"
    return [panel(budget, ACCURACY, series("reward", True)), panel(budget, "turns used", series("turns", False), False)]


def by_size(records: Records) -> list[dict]:
    sizes, series = records["pretrain"][0], {}
    for when, label in WHEN.items():
        series[label] = [
            point(f"{sizes[size] / 1e6:.2f} M", {seed: tested(r[when]) for seed, r in records[run].items()})
            for size, run in (("small", "small"), ("bundled", "baseline"))
        ]
    return [panel("parameters of the planner", ACCURACY, series)]


def by_group(records: Records) -> list[dict]:
    runs = {int(name.split("-")[1]): data for name, data in records.items() if name != "baseline"}
    runs = dict(sorted((runs | {train.Config.group_size: records["baseline"]}).items()))
    curves = {f"G = {size}": over_steps(data, lambda step: step["reward"]) for size, data in runs.items()}
    points = [point(f"G = {size}", {s: tested(r["after"]) for s, r in data.items()}) for size, data in runs.items()]
    return [panel("step", REWARD, curves), panel("", ACCURACY, {TEST: points})]


@dataclass(frozen=True)
class Claim:
    """Two points of the first panel that has both, as (series, x), x may be `FIRST` or `LAST`; the paper's sign for
    their difference, 0 where it gives none, and its numbers; what may be the reason where ours is another."""

    a: tuple[str, Any]
    b: tuple[str, Any]
    sign: int = 0
    paper: str = ""
    why: str = ""


FIRST, LAST = 0, -1


@dataclass(frozen=True)
class Figure:
    title: str
    uses: tuple[str, ...]  # names of runs; "group-" stands for all that begin so
    make: Callable[[Records], list[dict]]
    paper: str  # the paper's counterpart
    claims: tuple[Claim, ...] = ()
    variants: tuple[str, ...] = ()  # shown with their code


def variant(title: str, name: str, base: str, text: str) -> Figure:
    """The curve of a variant beside that of what it departs from."""
    claim = Claim((TEST, LABELS[name]), (TEST, LABELS[base]))
    return Figure(title, (base, name), side_by_side, text, (claim,), (name,))


FEW_MISTAKES = "The bundled planner makes few mistakes of form to begin with, so it has little to lose there."
BASE = (TEST, LABELS["baseline"])
FIGURES = {
    "main": Figure(
        "Main result", ("main",), main_result,
        "Tables 1 and 2, a planner of 7B before and after Flow-GRPO, accuracy over 3 trials: search 47.2 to 57.3 %, "
        "agentic 17.2 to 33.1 %, mathematics 31.7 to 51.5 %, science 56.5 to 63.5 %.",
        tuple(Claim((TRAINED, family), (UNTRAINED, family), 1, "more in all four domains")
              for family in ("all", "lookup", "two-hop", "three-hop", "difference", "earlier", "arithmetic")),
    ),
    "training": Figure(
        "How the planner was trained", ("main", "taught"), how_trained,
        "Table 3, mean of six benchmarks: frozen 38.5 %, GPT-4o frozen 44.3 %, fine-tuned on GPT-4o's traces 19.5 %, "
        "Flow-GRPO 55.7 %. Here the stronger planner plans ideally in 3 of 4 turns and as clumsily as the backbone's "
        "own teacher in the fourth; fine-tuning sees its successful trajectories, one for a question, 3 times.",
        (Claim((TEST, "ideal in 3 of 4 turns, frozen"), (TEST, "frozen"), 1, "+5.8 points"),
         Claim((TEST, "fine-tuned on its successes"), (TEST, "frozen"), -1, "-19.0 points",
               "Here the traces are in the very words that the planner already writes, their noise is known, and only "
               "successes are kept. The paper gives neither number nor filter of its traces; a fall below the frozen "
               "planner points to a broken format or to over-fitting rather than to a principle."),
         Claim((TEST, "Flow-GRPO"), (TEST, "frozen"), 1, "+17.2 points"),
         Claim((TEST, "Flow-GRPO"), (TEST, "fine-tuned on its successes"), 1, "+36.2 points",
               "Successes that are imitated teach the same habits here, and are given by a planner that knows the "
               "way; Flow-GRPO has to find it."),
         Claim((TEST, "Flow-GRPO"), (TEST, "ideal in 3 of 4 turns, frozen"), 1, "+11.4 points",
               "The stronger planner here reads its plans off the facts; GPT-4o has to find them.")),
    ),
    "credit": Figure(
        "Credit assignment", COMPARED[:6], credit,
        "None: the paper broadcasts the outcome to every turn (Eq. 4), takes mean and standard deviation over the "
        "group's trajectories (Eq. 7) and a KL weight of 0.001 without an ablation. The authors' code pools the "
        "statistics over turns.",
        tuple(Claim((TEST, LABELS[name]), BASE) for name in COMPARED[1:6]),
        ("last-turn", "turn-pooled", "no-kl"),
    ),
    "tools": Figure(
        "Tools and mistakes over training", ("main",), tools,
        "Step 0 to 32, share of calls: 2Wiki Google 28.5 to 70.5 %, Wikipedia 28.8 to 4.0 %; MedQA base generator "
        "28.7 to 6.3 %, Wikipedia 0 to 59.8 %. Tool-call errors fall by 28.4 points on GAIA, 19.4 on 2Wiki, 7.8 on "
        "Bamboogle, 8.4 on AIME24.",
        (Claim(("Search", LAST), ("Search", FIRST), 1, "Google on 2Wiki +42.0 points"),
         Claim(("Base_Generator", LAST), ("Base_Generator", FIRST), -1, "MedQA -22.4 points"),
         Claim(("Python_Coder", LAST), ("Python_Coder", FIRST)),
         Claim((MISTAKES, LAST), (MISTAKES, FIRST), -1, "-7.8 to -28.4 points", FEW_MISTAKES)),
    ),
    "length": Figure(
        "Reward and length over training", ("main",), over_training,
        "Fig. 8: the training reward rises; the planner's response length rises first, then shrinks and settles.",
        (Claim(("Flow-GRPO", LAST), ("Flow-GRPO", FIRST), 1, "rises"),
         Claim(("tokens", LAST), ("tokens", FIRST)),
         Claim(("turns", LAST), ("turns", FIRST))),
    ),
    "budget": Figure(
        "Turn budget", ("turn-budget",), by_budget,
        "Fig. 10: accuracy rises up to the largest budget, 10, on all four benchmarks; turns used with budgets of "
        "3, 5, 7, 10: 2Wiki 2.22, 3.18, 3.81, 4.44; Game of 24 1.63, 2.12, 2.36, 2.67; GAIA 2.43, 3.46, 4.28, 5.42. "
        "All planners here were trained with a budget of 4.",
        (Claim(("trained", LAST), ("trained", FIRST), 1, "rises"),
         Claim(("trained", LAST), ("trained", 4), 1, "rises beyond the budget of the training, 3",
               "No question here needs more than three good turns."),
         Claim(("untrained", LAST), ("untrained", FIRST))),
    ),
    "size": Figure(
        "Backbone size", ("baseline", "pretrain", "small"), by_size,
        "Fig. 9: Flow-GRPO helps backbones of 3B and of 7B, in bars without numbers. There the backbone plays all "
        "modules; here the planner alone is smaller: 2 of 3 layers, and half the pretraining steps.",
        (Claim((TRAINED, FIRST), (UNTRAINED, FIRST), 1, "more"), Claim((TRAINED, LAST), (UNTRAINED, LAST), 1, "more"),
         Claim((TRAINED, LAST), (TRAINED, FIRST))),
    ),
    "group": Figure(
        "Group size", ("baseline", "group-"), by_group,
        "None: the paper uses groups of 8 throughout. Here the number of trajectories in a step stays the same: larger "
        "groups mean fewer questions.",
        (Claim((TEST, LAST), (TEST, FIRST)),),
    ),
    "variant-std": variant(
        "Variant: GRPO without standard deviation", "no-std", "baseline",
        "None; the idea is Dr. GRPO's (arXiv 2503.20783): dividing favours questions nearly always solved or failed.",
    ),
    "variant-dapo": variant(
        "Variant: asymmetric clip and token mean", "dapo", "two-updates",
        "None in the paper; the authors ran a clip of 0.2 below and 0.3 above and a mean over tokens. The idea is "
        "DAPO's (arXiv 2503.14476), of which this leaves out the resampling of groups without signal. With a single "
        "update a step the ratio is 1 and no clip can matter: hence two.",
    ),
    "variant-gspo": variant(
        "Variant: ratio of the whole turn", "gspo", "two-updates",
        "None; the idea is GSPO's (arXiv 2507.18071). With a single update a step it would equal Flow-GRPO: hence two.",
    ),
    "variant-credit": variant(
        "Variant: turn-level credit", "fading-credit", "baseline",
        "None: in the paper all turns of a trajectory have the same advantage (Eq. 4, Eq. 7).",
    ),
}  # fmt: skip


def runs_of(figure: Figure, runs: dict[str, Run]) -> list[Run]:
    """The runs behind a figure; [] where the scale leaves one of them out."""
    by_use = [
        [run for run in runs.values() if run.name == use or (use.endswith("-") and run.name.startswith(use))]
        for use in figure.uses
    ]
    return [run for used in by_use for run in used] if all(by_use) else []


def fingerprints(name: str, scale: Scale) -> dict[str, str]:
    """Of the code that made a figure's data, and of each run behind it."""
    runs, figure = by_id(scale), FIGURES[name]
    helpers = (point, panel, tested, over_steps, rewards, accuracies, figure.make)
    made_by = digest(
        [*map(meaning, helpers), repr(figure.uses), repr((LABELS, WHEN, TEST, MISTAKES, REWARD, ACCURACY))]
    )
    return {"figure": made_by} | {run.id: fingerprint(run, runs) for run in runs_of(figure, runs)}


def write_figures(out: Path, scale: Scale) -> None:
    """OUT/NAME.json for each figure, out of the records of the runs."""
    runs, folder = by_id(scale), folder_of_runs(out, scale)
    for name, figure in FIGURES.items():
        used = runs_of(figure, runs)
        files = {run.id: json.loads((folder / run.id / "record.json").read_text()) for run in used}
        records: Records = {}
        for run in used:
            records.setdefault(run.name, {})[run.seed] = files[run.id]["data"]
        data = {
            "scale": scale.name,
            "made_by": fingerprints(name, scale),
            "runs": {i: {k: files[i][k] for k in ("seconds", "date")} | {"settings": runs[i].settings} for i in files},
            "panels": figure.make(records) if used else [],
        }
        train.write_atomically(out / f"{name}.json", json.dumps(data, indent=1).encode())


def read_figures(out: Path) -> dict[str, dict]:
    """The figures' JSON; `UserError` where one is missing or was not made by this code."""
    figures = {}
    for name in FIGURES:
        path = out / f"{name}.json"
        try:
            data = figures[name] = json.loads(path.read_text())
            current = fingerprints(name, SCALES[data["scale"]]) == data["made_by"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): run `make paper`") from None
        if not current:
            raise UserError(f"{path} was made by other code or settings than these: run `make paper` again")
    if len({data["scale"] for data in figures.values()}) > 1:
        raise UserError(f"the figures in {out} are of several scales: run `make paper` again")
    return figures


# --- the page, out of the figures' JSON alone -------------------------------------------------------------------------

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"]  # Okabe and Ito


def draw(name: str, of: dict) -> str:
    """A panel as SVG: lines with bands over numbers, dots with bars over categories."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    salt = name + json.dumps(of)  # of the ids in the drawing: no other on the page may have them
    with plt.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
        draw_panel(axis, of)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(of["y"])}"', 1)


def draw_panel(axis: Any, of: dict) -> None:
    scale = 100 if of["share"] else 1
    categories = list(dict.fromkeys(p["x"] for points in of["series"].values() for p in points))
    in_words = isinstance(categories[0], str)
    for number, (label, points) in enumerate(of["series"].items()):
        colour, shift = COLOURS[number % len(COLOURS)], 0.2 * (number - (len(of["series"]) - 1) / 2)
        x = [categories.index(p["x"]) + shift if in_words else p["x"] for p in points]
        y, low, high = ([scale * p[key] for p in points] for key in ("y", "low", "high"))
        if in_words:
            below, above = [a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]
            axis.errorbar(x, y, [below, above], fmt="o", color=colour, capsize=4, label=label)
            for place, p in zip(x, points):
                each = [scale * value for value in p["seeds"].values()]
                axis.plot([place + 0.08] * len(each), each, "_", color=colour, alpha=0.6)
        else:
            axis.plot(x, y, color=colour, label=label, marker="." if len(x) < 12 else None)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
    if in_words:
        axis.set_xticks(range(len(categories)), categories, rotation=20, ha="right")
        axis.set_xlim(-0.5, len(categories) - 0.5)
    axis.set(xlabel=of["x"], ylabel=of["y"], ylim=(0, of.get("top", 102 if of["share"] else None)))
    axis.grid(alpha=0.3)
    if len(of["series"]) > 1:
        axis.legend(fontsize=8)


def find(data: dict, where: tuple[str, Any]) -> tuple[dict, dict] | None:
    """(panel, point) of a series at x, in the first panel that has it."""
    label, x = where
    for of in data["panels"]:
        points = of["series"].get(label, [])
        found = points[x : x + 1 or None] if x in (FIRST, LAST) else [p for p in points if p["x"] == x]
        if found:
            return of, found[0]
    return None


def words(of: dict, label: str, p: dict) -> str:
    """A point, as in "Search, step 36: 76.1 % [74.0, 78.1] (n = 1,021, seeds 0, 1, 2)"."""
    factor, unit = (100, " %") if of["share"] else (1, "")
    place = p["x"] if isinstance(p["x"], str) else f"{of['x'].split(' (')[0]} {p['x']}"
    place = place if label == TEST else f"{label}, {place}"
    interval = f"[{factor * p['low']:.1f}, {factor * p['high']:.1f}]"
    return f"{place}: {factor * p['y']:.1f}{unit} {interval} (n = {p['n']:,.0f}, {seeds_text(p['seeds'])})"


def sentence(data: dict, claim: Claim) -> str:
    """What came out, in words that follow from the numbers; "" where this scale has no such points."""
    found = find(data, claim.a), find(data, claim.b)
    if None in found:
        return ""
    (of, a), (_, b) = found
    more, up = a["y"] - b["y"], a["y"] > b["y"]
    high, low = (a, b) if up else (b, a)
    clear = high["low"] > low["high"] and min(high["seeds"].values()) > max(low["seeds"].values())
    difference = f"{100 * more:+.1f} points" if of["share"] else f"{more:+.1f}"
    text = f"{words(of, claim.a[0], a)}; {words(of, claim.b[0], b)}. Difference {difference}, "
    text += "clear: neither intervals nor seeds overlap." if clear else "not clear: intervals or seeds overlap."
    agrees = clear and claim.sign and up == (claim.sign > 0)
    if claim.sign:
        verdict = "the same direction here" if agrees else "the other direction here" if clear else "open here"
        text += f" Paper: {claim.paper}; {verdict}."
    return text + (f" A possible reason: {claim.why}" if claim.why and not agrees else "")


def seeds_text(seeds: Any) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def code_of(name: str) -> str:
    """A variant as an edit: changed settings of train.py, and a function that stands in the place of one of its own."""
    defaults = train.Config()
    text = "".join(f"- {k} = {getattr(defaults, k)!r}\n+ {k} = {v!r}\n" for k, v in FLAGS.get(name, {}).items())
    if name in PATCHES:
        place, function = PATCHES[name]
        text += f"- train.{place} = flow_grpo.{place}\n+ train.{place} = {function.__name__}\n\n"
        text += inspect.getsource(function)
    return text


def section(name: str, figure: Figure, data: dict) -> str:
    e = html.escape
    text = f'<section id="{name}">\n<h2>{e(figure.title)}</h2>\n'
    if not data["panels"]:
        return text + "<p>Left out at this scale: it takes <code>make paper</code> without QUICK.</p>\n</section>\n"
    points = [p for of in data["panels"] for points in of["series"].values() for p in points]
    sizes, seeds = [p["n"] for p in points], dict.fromkeys(seed for p in points for seed in p["seeds"])
    n = f"{min(sizes):,.0f}" + (f" to {max(sizes):,.0f}" if max(sizes) > min(sizes) else "")
    drawings = "\n".join(draw(name, of) for of in data["panels"])
    text += f'<figure><div class="panels">{drawings}</div>\n<figcaption>'
    text += f"n = {n} values behind a point, {seeds_text(seeds)}; bars and bands are 95 % intervals, small dashes are "
    text += f'single seeds. <a href="{name}.json">{name}.json</a><br>\n<b>In the paper.</b> {e(figure.paper)}'
    text += "</figcaption></figure>\n<ul>\n"
    text += "".join(f"<li>{e(line)}</li>\n" for line in (sentence(data, claim) for claim in figure.claims) if line)
    text += "</ul>\n"
    for variant in figure.variants:
        text += f"<p>The edit: {e(LABELS[variant])}</p>\n<pre>{e(code_of(variant))}</pre>\n"
    return text + "</section>\n"


QUICK_NOTE = """<p class="note">This is the quick version: one seed, few steps, few questions. Small differences mean
nothing here; <code>make paper</code> runs more seeds for longer.</p>
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The paper in miniature</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
h2 { margin: 2.5em 0 .5em; } figure { margin: 0; } figcaption, .small { font-size: 14px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); background: #fff; }
.wide { overflow-x: auto; } svg { display: block; width: 100%; max-width: 37rem; height: auto; }
pre { overflow-x: auto; font-size: 13px; padding: .8rem; border: 1px solid #8888; }
.note { border-left: 4px solid #d55e00; padding: .5rem 1rem; font-weight: 600; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
</style>
<h1>The paper in miniature</h1>
"""
INTRO = """<p>The analyses of <a href="https://arxiv.org/abs/2510.05592">AgentFlow (arXiv 2510.05592)</a> on a made-up
world of 300 articles with a planner of 0.7 million parameters. The sizes of the effects are this world's own; the
paper's numbers stand in each caption. Numbers and verdicts below a figure are computed from its JSON; reasons
are guesses.</p>
<p class="small">Shares have Wilson intervals, lengths and turns mean ± 1.96 standard errors, over all seeds' values.
Values of one question, or of one seed, are alike, and the seeds share their test questions: intervals are a little too
narrow, and a difference is called clear only if the seeds do not overlap either.</p>
"""


def write_page(out: Path) -> Path:
    """OUT/index.html from the figures' JSON, which must be of this code."""
    figures, e = read_figures(out), html.escape
    scale = SCALES[figures["main"]["scale"]]
    page = PAGE + ("" if scale.name == "full" else QUICK_NOTE) + INTRO
    page += "".join(section(name, FIGURES[name], data) for name, data in figures.items())
    page += '<section id="runs">\n<h2>Runs</h2>\n'
    example = folder_of_runs(out, scale) / "main-seed0"
    page += f"<p>A training run can be looked into: <code>python report.py {e(str(example))}</code></p>\n"
    page += '<div class="wide">\n<table class="small">\n'
    page += "<tr><th>run</th><th>date</th><th>minutes since last start</th><th>differs from the defaults</th></tr>\n"
    for i, run in {i: run for data in figures.values() for i, run in data["runs"].items()}.items():
        settings = ", ".join(f"{key} {value}" for key, value in run["settings"].items())
        cells = (i, run["date"], f"{run['seconds'] / 60:.1f}", settings)
        page += f"<tr>{''.join(f'<td>{e(cell)}</td>' for cell in cells)}</tr>\n"
    train.write_atomically(out / "index.html", f"{page}</table>\n</div>\n</section>\n</html>\n".encode())
    return out / "index.html"


# --- the command ------------------------------------------------------------------------------------------------------


def print_plan(scale: Scale) -> None:
    runs = plan(scale)
    for run in runs:
        print(f"{run.id:22} {run.seconds / 60:5.1f} min   {run.settings}")
    print(f"{len(runs)} runs, {sum(run.seconds for run in runs) / 60:.0f} minutes on two quiet cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="at most 15 minutes: one seed and fewer steps")
    parser.add_argument("--plan", action="store_true", help="print the runs and their minutes, and do nothing")
    parser.add_argument("--figures", action="store_true", help="make the page again from the figures' JSON alone")
    parser.add_argument("--out", type=Path, default=Path("paper"), help="folder for everything")
    parser.add_argument("--scale", choices=SCALES, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in this process
    args = parser.parse_args()
    scale = SCALES[args.scale or ("quick" if args.quick else "full")]
    try:
        if args.plan:
            return print_plan(scale)
        if args.run:
            runs = by_id(scale)
            return do(runs[args.run], folder_of_runs(args.out, scale) / args.run, fingerprint(runs[args.run], runs))
        if not args.figures:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            do_all(args.out, scale)
            write_figures(args.out, scale)
        print(f"{write_page(args.out)}: open it in a browser")
    except (UserError, EngineError, KeyboardInterrupt) as error:
        print(f"paper.py: {str(error) or 'stopped; the same command continues'}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
