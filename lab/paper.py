"""The paper's analyses in small: its tables and figures on the bundled world, variants of the algorithm, and one page.

    python -m lab.paper             # about 76 minutes on 2 cores; if stopped, the same command continues
    python -m lab.paper --quick     # 10 minutes: one seed and fewer steps, and the page says so
    python -m lab.paper --plan      # the runs, and the minutes that each is expected to take
    python -m lab.paper --figures   # the page again, from the JSON alone

Writes paper/index.html, paper/findings.md with its sentences and tables, a JSON file for each figure, and paper/runs.
`lab/variants.py` has the variants, `lab/paper_runs.py` the runs, and `lab/paper_figures.py` makes numbers of them. Here
are the paper's own numbers, the drawings, the sentences and the page. Each JSON carries a fingerprint of the code and
the settings that made it, and the page refuses one that other code has made.
"""

import html
import inspect
import io
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure as Canvas

import train
from eval import run_main, setting
from lab import paper_figures
from lab.paper_figures import GAIN, LABELS, MISTAKES, TEST, WHEN, Records
from lab.paper_runs import SCALES, Run, Scale, by_id, code_behind, digest, do, do_all, fingerprint, folder_of_runs, plan
from lab.variants import ABLATIONS, FLAGS, PATCHES
from tasks import write_atomically
from tools import UserError


@dataclass
class PaperConfig:
    quick: bool = setting(False, "whether to run one seed and fewer steps, in about 10 minutes")
    plan: bool = setting(False, "whether to print the runs and their minutes, and do nothing")
    figures: bool = setting(False, "whether to make the page again from the figures' JSON alone")
    out: str = setting("paper", "folder for everything")
    scale: Literal["", "full", "quick", "tiny"] = setting("", "size of the runs; empty: full, or quick with --quick")
    run: str = setting("", "a single run to do, in this process, by its name in --plan; empty: all")


def main(config: PaperConfig) -> None:
    scale, out = SCALES[config.scale or ("quick" if config.quick else "full")], Path(config.out)
    if config.plan:
        return print_plan(scale)
    if config.run:
        runs = by_id(scale)
        if config.run not in runs:
            raise UserError(f"--run {config.run}: there is no such run; --plan lists them")
        return do(runs[config.run], folder_of_runs(out, scale) / config.run, fingerprint(runs[config.run], runs))
    if not config.figures:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        do_all(out, scale)
        write_figures(out, scale)
    print(f"{write_page(out)}: open it in a browser")


def print_plan(scale: Scale) -> None:
    runs = plan(scale)
    for run in runs:
        print(f"{run.id:30} {run.seconds / 60:5.1f} min   {run.settings}")
    print(f"{len(runs)} runs, {sum(run.seconds for run in runs) / 120:.0f} minutes on two quiet cores")


# --- the figures, beside the paper's own numbers ----------------------------------------------------------------------

UNTRAINED, TRAINED = WHEN["before"], WHEN["after"]
FIRST, LAST = "first", "last"  # point of a series


@dataclass(frozen=True)
class Claim:
    """Two points to compare, each as (series, x) in the first panel that has it; x may be `FIRST` or `LAST`."""

    a: tuple[str, Any]
    b: tuple[str, Any]
    sign: int = 0  # sign of a - b in the paper, 0 if it gives none
    paper: str = ""  # the paper's numbers
    why: str = ""  # a possible reason if our sign differs


@dataclass(frozen=True)
class Figure:
    title: str
    uses: tuple[str, ...]  # names of runs; "group-" takes all that begin so
    make: Callable[[Records], list[dict]]
    says: Callable[[dict], str]  # the figure in one plain sentence, from its JSON
    paper: str  # the paper's counterpart
    claims: tuple[Claim, ...] = ()
    variants: tuple[str, ...] = ()  # shown with their code
    table: Callable[[Records], paper_figures.Table] | None = None


def moves(label: str, x: Any, other: str, other_x: Any, words: str) -> Callable[[dict], str]:
    """A sentence about two points: {a} and {b} in `words` become their numbers."""

    def says(data: dict) -> str:
        found = find_point(data, label, x), find_point(data, other, other_x)
        return words.format(**{name: number(*point) for name, point in zip("ab", found)}) + "."

    return says


def number(panel: dict, point: dict) -> str:
    return f"{100 * point['y']:.1f} %" if panel["share"] else f"{point['y']:.1f}"


def gains(data: dict) -> list[dict]:
    return [p for panel in data["panels"] for p in panel["series"].get(GAIN, [])]


def effects(data: dict) -> str:
    """Which ablations differ from the baseline, largest first."""
    points = sorted(gains(data), key=lambda p: -abs(p["y"]))
    if points[0]["n"] < 2:
        return "One seed shows no noise, so these differences prove nothing."
    shown = [f"{p['x']} ({p['y']:+.1f} points)" for p in points if paper_figures.clear(p)]
    if not shown:
        return f"None of {len(points)} changes differs from Flow-GRPO by more than the noise between seeds."
    differ = "differs" if len(shown) == 1 else "differ"
    text = f"{len(shown)} of {len(points)} changes {differ} from Flow-GRPO by more than the noise between seeds"
    return f"{text}: {', '.join(shown)}."


def compared(title: str, names: tuple[str, ...], text: str) -> Figure:
    """Some ablations: their curves, their differences to the baseline, their code."""
    edited = tuple(name for name in names if name in FLAGS or name in PATCHES)
    return Figure(title, ("baseline", *names), paper_figures.curves, effects, text, (), edited)


COMPARED = {
    "credit": compared(
        "Ablation: credit of the turns", ("last-turn", "fading-credit", "same-turn"),
        "None: the paper broadcasts the outcome to every turn (Eq. 4) without an ablation.",
    ),
    "statistics": compared(
        "Ablation: statistics and means", ("turn-pooled", "no-std", "token-mean"),
        "None: mean and standard deviation are over the trajectories of a group (Eq. 7), means over turns and tokens "
        "nested (Eq. 5). The authors' code pools over turns and takes a mean over tokens; to leave out the standard "
        "deviation is Dr. GRPO's idea (arXiv 2503.20783).",
    ),
    "group": compared(
        "Ablation: group size", ("group-2", "group-4", "group-16"),
        "None: the paper uses groups of 8 throughout. Here the number of trajectories per step stays the same: larger "
        "groups mean fewer questions.",
    ),
    "kl": compared(
        "Ablation: weight of the KL", ("no-kl", "more-kl"),
        "None: the paper uses 0.001.",
    ),
    "updates": compared(
        "Ablation: updates per step and clip", ("one-update", "wide-clip", "four-updates", "four-updates-wide-clip"),
        "None: the paper says neither how many updates it makes nor its clip; the authors ran a clip of 0.2 below and "
        "0.3 above. With a single update the ratio is 1 and no clip acts. Flow-GRPO here makes two.",
    ),
    "ratio": compared(
        "Ablation: ratio", ("gspo", "cispo"),
        "None: the ratio is one of tokens (Eq. 6). The ideas are from arXiv 2507.18071 and arXiv 2506.13585.",
    ),
}  # fmt: skip
FIGURES = {
    "main": Figure(
        "Main result", ("main",), paper_figures.main_result,
        moves(UNTRAINED, "all", TRAINED, "all",
              "The planner answers {a} of the test questions before Flow-GRPO and {b} after"),
        "Tables 1 and 2, a planner of 7B before and after Flow-GRPO, accuracy over 3 trials: search 47.2 to 57.3 %, "
        "agentic 17.2 to 33.1 %, mathematics 31.7 to 51.5 %, science 56.5 to 63.5 %.",
        tuple(Claim((TRAINED, family), (UNTRAINED, family), 1, "more in all four domains")
              for family in ("all", "lookup", "two-hop", "three-hop", "difference", "earlier", "arithmetic")),
    ),
    "elsewhere": Figure(
        "Generalisation: did it learn to plan, or the answers?", tuple(paper_figures.ELSEWHERE),
        paper_figures.elsewhere,
        moves("untrained", "another world", "trained", "another world",
              "In a world that shares no fact with its own, the planner answers {a} untrained and {b} trained"),
        "Fig. 10 tests budgets that the training did not have. Other worlds and families have no counterpart.",
        (Claim(("trained", "another world"), ("untrained", "another world")),
         Claim(("trained", "families without training"), ("untrained", "families without training")),
         Claim(("trained", "the hard split"), ("untrained", "the hard split"))),
        table=paper_figures.elsewhere_table,
    ),
    "training": Figure(
        "How the planner was trained", ("main", "imitation-peer"), paper_figures.how_trained,
        moves(TEST, "fine-tuned on its successes", TEST, "Flow-GRPO",
              "Imitation of a peer's successes reaches {a}, Flow-GRPO {b}"),
        "Table 3, mean of six benchmarks: frozen 38.5 %, GPT-4o frozen 44.3 %, fine-tuned on GPT-4o's traces 19.5 %, "
        "Flow-GRPO 55.7 %. Here the stronger planner plans ideally in 3 of 4 turns and as clumsily as the backbone's "
        "own teacher in the others; its accuracy is over the questions of the traces. Fine-tuning sees its "
        "successes, one per question, 3 times.",
        (Claim((TEST, "stronger planner, frozen"), (TEST, "frozen"), 1, "+5.8 points"),
         Claim((TEST, "fine-tuned on its successes"), (TEST, "frozen"), -1, "-19.0 points",
               "this teacher sees what the student sees. The next figure shows teachers that do not."),
         Claim((TEST, "Flow-GRPO"), (TEST, "frozen"), 1, "+17.2 points"),
         Claim((TEST, "Flow-GRPO"), (TEST, "fine-tuned on its successes"), 1, "+36.2 points",
               "imitated successes teach the same habits here."),
         Claim((TEST, "Flow-GRPO"), (TEST, "stronger planner, frozen"), 1, "+11.4 points",
               "the stronger planner here reads its plans off the facts; GPT-4o has to find them.")),
    ),
    "imitation": Figure(
        "When does imitation collapse?", ("imitation-",), paper_figures.imitation,
        moves(TEST, "peer", TEST, "privileged-tool",
              "After imitation the student answers {a} if its teacher saw what it sees, and {b} if the teacher's tool "
              "knew what the student's does not"),
        "Table 3: fine-tuning on GPT-4o's successes falls from 38.5 to 19.5 %. The paper does not say how they were "
        "made. Each way here is a possible cause; lab/imitation.py has the hypotheses from before the runs.",
        table=paper_figures.imitation_table,
    ),
    "ablations": Figure(
        "Which parts of the algorithm matter?", (*ABLATIONS, "group-"), paper_figures.ablations, effects,
        "None of these has an ablation in the paper. All runs here have the same number of rollouts on the hard split, "
        "and each is compared with Flow-GRPO of the same seed by the area under its learning curve.",
        table=paper_figures.ablation_table,
    ),
    **COMPARED,
    "tools": Figure(
        "Tools and mistakes over training", ("main",), paper_figures.tools,
        moves("Search", FIRST, "Search", LAST, "Search takes {a} of the turns in the first step and {b} in the last"),
        "Step 0 to 32, share of calls: 2Wiki Google 28.5 to 70.5 %, Wikipedia 28.8 to 4.0 %; MedQA base generator "
        "28.7 to 6.3 %, Wikipedia 0 to 59.8 %. Tool-call errors fall by 28.4 points on GAIA, 19.4 on 2Wiki, 7.8 on "
        "Bamboogle, 8.4 on AIME24.",
        (Claim(("Search", LAST), ("Search", FIRST), 1, "Google on 2Wiki +42.0 points"),
         Claim(("Base_Generator", LAST), ("Base_Generator", FIRST), -1, "MedQA -22.4 points"),
         Claim(("Python_Coder", LAST), ("Python_Coder", FIRST)),
         Claim((MISTAKES, LAST), (MISTAKES, FIRST), -1, "-7.8 to -28.4 points",
               "the bundled planner makes few mistakes of form to begin with.")),
    ),
    "length": Figure(
        "Reward and length over training", ("main",), paper_figures.over_training,
        moves("turns", FIRST, "turns", LAST, "A question takes {a} turns in the first step and {b} in the last"),
        "Fig. 8: the training reward rises; the planner's response length rises first, then shrinks and settles.",
        (Claim(("Flow-GRPO", LAST), ("Flow-GRPO", FIRST), 1, "rises"),
         Claim(("tokens", LAST), ("tokens", FIRST)),
         Claim(("turns", LAST), ("turns", FIRST))),
    ),
    "budget": Figure(
        "Turn budget", ("turn-budget",), paper_figures.by_budget,
        moves("trained", 4, "trained", LAST,
              "The trained planner answers {a} with the 4 turns of its training, and {b} with twice as many"),
        "Fig. 10: accuracy rises up to the largest budget, 10, on all four benchmarks; turns used with budgets of "
        "3, 5, 7, 10: 2Wiki 2.22, 3.18, 3.81, 4.44; Game of 24 1.63, 2.12, 2.36, 2.67; GAIA 2.43, 3.46, 4.28, 5.42. "
        "All planners here were trained with a budget of 4.",
        (Claim(("trained", LAST), ("trained", FIRST), 1, "rises"),
         Claim(("trained", LAST), ("trained", 4), 1, "rises beyond the budget of the training, 3",
               "no question here needs more than three good turns."),
         Claim(("untrained", LAST), ("untrained", FIRST))),
    ),
    "size": Figure(
        "Backbone size", ("main", "pretrain", "small"), paper_figures.by_size,
        moves(TRAINED, FIRST, TRAINED, LAST, "The smaller planner, pretrained less, reaches {a}, the bundled one {b}"),
        "Fig. 9: Flow-GRPO helps backbones of 3B and of 7B, in bars without numbers. There the backbone plays all "
        "modules; here the planner alone is smaller: 2 of 3 layers, and a quarter of the pretraining steps.",
        (Claim((TRAINED, FIRST), (UNTRAINED, FIRST), 1, "more"), Claim((TRAINED, LAST), (UNTRAINED, LAST), 1, "more"),
         Claim((TRAINED, LAST), (TRAINED, FIRST))),
    ),
    "long": Figure(
        "Hundreds of steps at a constant learning rate", tuple(paper_figures.LONG_RUNS), paper_figures.long_training,
        moves("KL weight 0.001", LAST, "without KL", LAST,
              "In the last ten steps the training reward is {a} with the KL and {b} without"),
        "None: the paper's figures end at step 32.",
        (Claim(("KL weight 0.001", LAST), ("without KL", LAST)),),
        table=paper_figures.long_table,
    ),
    "noise": Figure(
        "A judge that errs", ("main", "noisy-10", "noisy-20"), paper_figures.noise,
        moves(TEST, "exact", TEST, "20 % wrong",
              "If a fifth of the training verdicts are wrong, some too kind and some too strict, the planner answers "
              "{b} of the test questions; with an exact judge it answers {a}"),
        "None: the paper's judge is GPT-4o, and its errors are not measured.",
        (Claim((TEST, "10 % wrong"), (TEST, "exact")), Claim((TEST, "20 % wrong"), (TEST, "exact"))),
        ("noisy-10", "noisy-20"),
    ),
}  # fmt: skip


# --- from the runs to JSON --------------------------------------------------------------------------------------------


def runs_of(figure: Figure, runs: dict[str, Run]) -> list[Run]:
    """The runs behind a figure; [] if the scale leaves one of them out."""
    found = []
    for use in figure.uses:
        used = [run for run in runs.values() if run.name == use or (use.endswith("-") and run.name.startswith(use))]
        if not used:
            return []
        found += used
    return found


def fingerprints(name: str, scale: Scale) -> dict[str, str]:
    """Fingerprints of the code that made a figure's data, and of each run behind it."""
    runs, figure = by_id(scale), FIGURES[name]
    makers = [figure.make.__name__, figure.table.__name__ if figure.table else ""]
    made_by = {"figure": digest(code_behind("lab/paper_figures.py"), *makers)}
    return made_by | {run.id: fingerprint(run, runs) for run in runs_of(figure, runs)}


def write_figures(out: Path, scale: Scale) -> None:
    """OUT/NAME.json for each figure, from the records of the runs."""
    runs, folder = by_id(scale), folder_of_runs(out, scale)
    for name, figure in FIGURES.items():
        records: Records = {}
        about_runs = {}
        for run in runs_of(figure, runs):
            record = json.loads((folder / run.id / "record.json").read_text())
            records.setdefault(run.name, {})[run.seed] = record["data"]
            about_runs[run.id] = {"seconds": record["seconds"], "date": record["date"], "settings": run.settings}
        data = {
            "scale": scale.name,
            "made_by": fingerprints(name, scale),
            "runs": about_runs,
            "panels": figure.make(records) if records else [],
            "table": figure.table(records) if records and figure.table else [],
        }
        write_atomically(out / f"{name}.json", json.dumps(data, indent=1))


def read_figures(out: Path) -> dict[str, dict]:
    """The figures' JSON; `UserError` if one is missing or was not made by this code."""
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


# --- drawings ---------------------------------------------------------------------------------------------------------

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"]  # Okabe and Ito


def draw(name: str, panel: dict) -> str:
    """A panel as SVG: lines with bands over numbers, dots with bars over categories."""
    salt = name + json.dumps(panel)  # of the ids in the drawing: no other on the page may have them
    style = {"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        lines = len(panel["series"].get(GAIN, [])) if panel.get("flat") else 0
        figure = Canvas(figsize=(5.6, max(4, 0.32 * lines + 1)), layout="constrained")
        draw_panel(figure.subplots(), panel)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(panel["y"])}"', 1)


def draw_panel(axis: Any, panel: dict) -> None:
    points = [p for points in panel["series"].values() for p in points]
    if panel.get("flat"):
        return draw_flat(axis, panel, points)
    if isinstance(points[0]["x"], str):
        draw_categories(axis, panel, list(dict.fromkeys(p["x"] for p in points)))
    else:
        draw_lines(axis, panel)
    axis.set(xlabel=panel["x"], ylabel=panel["y"])
    if panel.get("signed"):
        axis.axhline(0, color="#888")
    else:
        axis.set_ylim(0, 102 if panel["share"] else None)
    axis.grid(alpha=0.3)
    if len(panel["series"]) > 1:
        axis.legend(fontsize=8)


def draw_lines(axis: Any, panel: dict) -> None:
    scale = 100 if panel["share"] else 1
    for number, (label, points) in enumerate(panel["series"].items()):
        colour, x = COLOURS[number % len(COLOURS)], [p["x"] for p in points]
        y, low, high = ([scale * p[key] for p in points] for key in ("y", "low", "high"))
        axis.plot(x, y, color=colour, label=label, marker="." if len(x) < 12 else None)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.xaxis.get_major_locator().set_params(integer=True)


def draw_categories(axis: Any, panel: dict, categories: list[str]) -> None:
    scale, count = 100 if panel["share"] else 1, len(panel["series"])
    for number, (label, points) in enumerate(panel["series"].items()):
        colour, shift = COLOURS[number % len(COLOURS)], 0.6 / max(3, count) * (number - (count - 1) / 2)
        x = [categories.index(p["x"]) + shift for p in points]
        y, low, high = ([scale * p[key] for p in points] for key in ("y", "low", "high"))
        below, above = [a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]
        axis.errorbar(x, y, [below, above], fmt="o", color=colour, capsize=4, label=label)
        for place, p in zip(x, points):
            each = [scale * value for value in p["seeds"].values()]
            axis.plot([place + 0.08] * len(each), each, "_", color=colour, alpha=0.6)
    axis.set_xticks(range(len(categories)), categories, rotation=20, ha="right")
    axis.set_xlim(-0.5, len(categories) - 0.5)


def draw_flat(axis: Any, panel: dict, points: list[dict]) -> None:
    """Differences as dots with bars, a line for each; what excludes zero is in colour."""
    for place, p in enumerate(reversed(points)):
        colour = COLOURS[1] if paper_figures.clear(p) else "#888"
        axis.errorbar(p["y"], place, xerr=[[p["y"] - p["low"]], [p["high"] - p["y"]]], fmt="o", color=colour, capsize=3)
        axis.plot(list(p["seeds"].values()), [place - 0.25] * len(p["seeds"]), "|", color=colour)
    axis.set_yticks(range(len(points)), [p["x"] for p in reversed(points)])
    axis.axvline(0, color="#888")
    axis.set_xlabel(panel["y"])
    axis.grid(alpha=0.3, axis="x")


# --- sentences --------------------------------------------------------------------------------------------------------


def find_point(data: dict, label: str, x: Any) -> tuple[dict, dict] | None:
    """(panel, point) of a series at x, in the first panel that has it."""
    for panel in data["panels"]:
        points = panel["series"].get(label, [])
        if x not in (FIRST, LAST):
            points = [p for p in points if p["x"] == x]
        if points:
            return panel, points[-1 if x == LAST else 0]
    return None


def in_words(panel: dict, label: str, p: dict) -> str:
    """A point, as in "Search, step 36: 76.1 % [74.0, 78.1] (n = 1,021, seeds 0, 1, 2)"."""
    factor, unit = (100, " %") if panel["share"] else (1, "")
    place = p["x"] if isinstance(p["x"], str) else f"{panel['x'].split(' (')[0]} {p['x']}"
    place = place if label == TEST else f"{label}, {place}"
    interval = f"[{factor * p['low']:.1f}, {factor * p['high']:.1f}]"
    return f"{place}: {factor * p['y']:.1f}{unit} {interval} (n = {p['n']:,.0f}, {seeds_text(p['seeds'])})"


def seeds_text(seeds: Any) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def sentence(data: dict, claim: Claim) -> str:
    """What came out, in words that follow from the numbers; "" if this scale has no such points."""
    found = find_point(data, *claim.a), find_point(data, *claim.b)
    if None in found:
        return ""
    (panel, a), (_, b) = found
    high, low = (a, b) if a["y"] > b["y"] else (b, a)
    apart = high["low"] > low["high"]
    alone = min(len(a["seeds"]), len(b["seeds"])) < 2
    clear = apart and not alone and min(high["seeds"].values()) > max(low["seeds"].values())
    difference = f"{100 * (a['y'] - b['y']):+.1f} points" if panel["share"] else f"{a['y'] - b['y']:+.1f}"
    text = f"{in_words(panel, claim.a[0], a)}; {in_words(panel, claim.b[0], b)}. Difference {difference}, "
    if apart and alone:
        text += "beyond the intervals, but one seed does not show the noise between seeds."
    else:
        text += "clear: neither intervals nor seeds overlap." if clear else "not clear: intervals or seeds overlap."
    if not claim.sign:
        return text
    beyond, agrees = clear or (apart and alone), (high is a) == (claim.sign > 0)
    verdict = f"the {'same' if agrees else 'other'} direction here" if beyond else "open here"
    verdict += " (one seed)" if beyond and alone else ""
    text += f" Paper: {claim.paper}; {verdict}."
    return text + (f" A possible reason: {claim.why}" if claim.why and not (beyond and agrees) else "")


def sentences(figure: Figure, data: dict) -> list[str]:
    """The sentences of a figure's claims for which this scale has the points."""
    return [line for claim in figure.claims if (line := sentence(data, claim))]


# --- the page, from the figures' JSON alone ---------------------------------------------------------------------------


def code_of(name: str) -> str:
    """A variant as an edit: changed settings of train.py, and a function that stands in the place of one of its own."""
    defaults, text = train.Config(), ""
    for flag, value in FLAGS.get(name, {}).items():
        text += f"- {flag} = {getattr(defaults, flag)!r}\n+ {flag} = {value!r}\n"
    if name in PATCHES:
        place, function = PATCHES[name]
        text += (
            f"- train.{place} = {getattr(train, place).__module__}.{place}\n+ train.{place} = {function.__name__}\n\n"
        )
        text += inspect.getsource(function)
    return text


def section(name: str, figure: Figure, data: dict) -> str:
    e = html.escape
    text = f'<section id="{name}">\n<h2>{e(figure.title)}</h2>\n'
    if not data["panels"]:
        return text + "<p>Left out at this scale: it takes <code>make paper</code> without QUICK.</p>\n</section>\n"
    points = [p for panel in data["panels"] for points in panel["series"].values() for p in points]
    sizes, seeds = [p["n"] for p in points], dict.fromkeys(seed for p in points for seed in p["seeds"])
    n = f"{min(sizes):,.0f}" + (f" to {max(sizes):,.0f}" if max(sizes) > min(sizes) else "")
    drawings = "\n".join(draw(name, panel) for panel in data["panels"])
    text += f'<p class="says">{e(figure.says(data))}</p>\n<figure><div class="panels">{drawings}</div>\n<figcaption>'
    text += f"n = {n} values behind a point, {seeds_text(seeds)}; bars and bands are 95 % intervals, small dashes are "
    text += f'single seeds. <a href="{name}.json">{name}.json</a><br>\n<b>In the paper.</b> {e(figure.paper)}'
    text += "</figcaption></figure>\n"
    if lines := sentences(figure, data):
        text += "<ul>\n" + "".join(f"<li>{e(line)}</li>\n" for line in lines) + "</ul>\n"
    if data["table"]:
        text += f'<div class="wide">\n<table class="small">\n{rows(data["table"])}</table>\n</div>\n'
    for variant in figure.variants:
        text += f"<p>The edit: {e(LABELS[variant])}</p>\n<pre>{e(code_of(variant))}</pre>\n"
    return text + "</section>\n"


def rows(table: list[list[str]]) -> str:
    kinds = ["th", *["td"] * (len(table) - 1)]
    lines = ["".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) for kind, row in zip(kinds, table)]
    return "".join(f"<tr>{line}</tr>\n" for line in lines)


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
.says { font-size: 20px; font-weight: 600; margin: .5em 0; }
.note { border-left: 4px solid #d55e00; padding: .5rem 1rem; font-weight: 600; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
</style>
<h1>The paper in miniature</h1>
"""
INTRO = """<p>This page repeats the analyses of <a href="https://arxiv.org/abs/2510.05592">AgentFlow (arXiv
2510.05592)</a>, and adds some that the paper does not have. It uses a made-up world of 300 articles and a planner of
0.7 million parameters. The sizes of the effects are this world's own. The captions have the paper's numbers. Sentences,
numbers and verdicts are computed from the JSON of each figure; reasons are guesses.</p>
<p class="small">Shares have Wilson intervals; lengths and turns have the mean ± 1.96 standard errors. Both are over the
values of all seeds. A training reward counts each question once, by the mean of its rollouts, so its interval is a
little too wide. Other values of one question, or of one seed, are alike, and the seeds share their test questions.
Those intervals are a little too narrow. So a difference is called clear only if the seeds do not overlap either. An
ablation is compared with Flow-GRPO of the same seed: its interval is Student's, over the differences of the seeds. All
intervals hold 95 %, so of 17 ablations without an effect about one would seem to have one.</p>
"""


def write_page(out: Path) -> Path:
    """The page from the figures' JSON, which must be of this code; its sentences and tables go to findings.md too."""
    figures = read_figures(out)
    scale = SCALES[figures["main"]["scale"]]
    page = PAGE + ("" if scale.name == "full" else QUICK_NOTE) + INTRO
    page += "".join(section(name, FIGURES[name], data) for name, data in figures.items())
    page += '<section id="runs">\n<h2>Runs</h2>\n'
    example = folder_of_runs(out, scale) / "main-seed0" / "run"
    page += f"<p>To look into a training run: <code>python -m lab.report {html.escape(str(example))}</code></p>\n"
    runs: dict[str, dict] = {}
    for data in figures.values():
        runs |= data["runs"]
    about = [["run", "date", "minutes since last start", "differs from the defaults"]]
    for name, run in runs.items():
        settings = ", ".join(f"{key} {value}" for key, value in run["settings"].items())
        about.append([name, run["date"], f"{run['seconds'] / 60:.1f}", settings])
    page += f'<div class="wide">\n<table class="small">\n{rows(about)}</table>\n</div>\n</section>\n</html>\n'
    write_atomically(
        out / "findings.md", "\n".join(findings(name, data) for name, data in figures.items() if data["panels"])
    )
    write_atomically(out / "index.html", page)
    return out / "index.html"


def findings(name: str, data: dict) -> str:
    """A figure in Markdown: its sentence, its comparisons, its table."""
    figure = FIGURES[name]
    text = "".join(f"- {line}\n" for line in sentences(figure, data))
    if text and data["table"]:
        text += "\n"
    for number, row in enumerate(data["table"]):
        text += f"| {' | '.join(row)} |\n" + ("|---" * len(row) + "|\n" if number == 0 else "")
    return f"## {figure.title}\n\n**{figure.says(data)}**\n\n{text}"


if __name__ == "__main__":
    run_main(main, PaperConfig)
