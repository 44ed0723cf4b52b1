"""Several planners on several tasks in one table, laid out as in the paper, beside the bare model.

    python -m lab.benchmark --planners bare:tinyworld/backbone tinyworld/backbone runs/x --trials 3
    python -m lab.benchmark --planners bare:MODEL MODEL runs/x URL#NAME --frozen_model MODEL --tasks data/x data/y

The second command is the paper's comparison: a bare model that answers in one prompt, then the system with the same
model as the planner, with the trained planner, and with another model behind a server. All tasks get the same tools.

Each answer goes to a JSONL file beside the output as it comes. A fault of the machine (a server that is down, a full
disk) stops the evaluation. What was answered by then is kept, and the same command continues from there. It asks only
what these weights have not answered yet, under these flags and by this code. It judges all answers anew.
"""

import ast
import asyncio
import copy
import gc
import hashlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from statistics import mean, pvariance
from typing import Any

from tqdm import tqdm

from agent import AgentSystem, Memory, Planner, Step, Trajectory, parse_answer, solve
from eval import EvalConfig, evaluate, open_system, planner_folder, run_main, setting, share, table, wilson
from llm import Lockstep, open_engine
from sandbox import Sandbox
from tasks import Corpus, Example, append, load_examples, read_kept
from tinyworld.world import World
from tools import ToolEnv, UserError
from train import whole


@dataclass
class BenchmarkConfig(EvalConfig):
    """The flags of eval.py, with several tasks in the place of one."""

    task: str = field(default="", init=False, metadata={"low": None})  # no flag: each of `tasks` in its turn
    planners: list[str] = setting(
        ["tinyworld/backbone"], "* model or run folders, URL#NAME, or bare:MODEL (one prompt)", group="the evaluation"
    )
    tasks: list[str] = setting(["tinyworld"], "* tinyworld, or folders with SPLIT.jsonl (and corpus.db)")
    in_flight: int = setting(512, "answers that are worked on together, at most", low=1)
    output: str = setting("benchmark.json", "file for the figures, the answers go beside it; empty: none")


# --- the bare model, a baseline ---------------------------------------------------------------------------------------

BARE_PROMPT = """Answer the question. Think step by step first. Then write the answer alone, as a name, a number or a \
few words, between the tags <answer> and </answer>.

Question: {question}"""


async def solve_bare(question: str, planner: Planner, *_: Any) -> Trajectory:
    """The planner's model alone, in the place of `agent.solve`: one prompt and its answer, no modules, no tools, no
    turns. What it wrote is kept as the analysis."""
    action = await planner(BARE_PROMPT.format(question=question))
    return Trajectory(question, [], Memory(question, action.text), parse_answer(action.text))


# --- answers that are kept --------------------------------------------------------------------------------------------

KEY = ("planner", "task", "depends", "question", "number", "trial")  # fields that tell answers apart


@dataclass
class KeepingSystem(AgentSystem):
    """A system that keeps its answers in a JSONL file, which is only ever appended to. A kept answer stands for a
    question as long as all of its `KEY` is the same."""

    path: Path | None = None  # None: nothing is kept
    kept: dict[tuple, dict] = field(default_factory=dict)  # the lines of the file, by key
    asked: tuple[str, ...] = ()  # the planner, the task, and a digest of all else that the answers depend on
    in_flight: int = 512

    def rollout(self, questions: list[str], group_size: int, seed: tuple, label: str = "") -> list[list[Trajectory]]:
        """As `AgentSystem.rollout`, with the same seeds, but only what is not kept is asked, `in_flight` at a time."""
        jobs = [(p, g) for p in range(len(questions)) for g in range(group_size)]
        keys = {(p, g): (*self.asked, questions[p], p, g) for p, g in jobs}
        done = {job: read_answer(self.kept[key]) for job, key in keys.items() if key in self.kept}
        todo = [job for job in jobs if job not in done]
        if done:
            print(f"{label}: {len(done)} of {len(jobs)} answers are in {self.path}")
        with tqdm(total=len(jobs), initial=len(done), desc=label, leave=False) as bar:
            for start in range(0, len(todo), self.in_flight):
                lockstep = Lockstep(self.frozen, self.planner)

                async def one(order: int, p: int, g: int) -> None:
                    trajectory = await self.run(questions[p], (*seed, p, g), lockstep, order)
                    row = dict(zip(KEY, keys[p, g])) | write_answer(trajectory)
                    if self.path:
                        append(self.path, row)
                    done[p, g] = read_answer(row)
                    bar.update()

                batch = todo[start : start + self.in_flight]
                asyncio.run(lockstep.gather(one(order, *job) for order, job in enumerate(batch)))
        return [[done[p, g] for g in range(group_size)] for p in range(len(questions))]


def write_answer(t: Trajectory) -> dict:
    """What `read_answer` reads: no turns, as the token ids of thousands of prompts would fill the memory."""
    steps = [asdict(step) for step in t.memory.steps]
    return dict(answer=t.answer, tokens=t.tokens, analysis=t.memory.analysis, steps=steps)


def kept_answer(row: dict) -> tuple[tuple, dict]:
    """(key, row) of a kept answer that can be read."""
    read_answer(row)
    key = tuple(row[name] for name in KEY)
    hash(key)  # a list in it is a `TypeError`
    return key, row


def read_answer(row: dict) -> Trajectory:
    memory = Memory(row["question"], row["analysis"], [Step(**step) for step in row["steps"]])
    return Trajectory(row["question"], [], memory, row["answer"], tokens=Counter(row["tokens"]))


NOT_OF_AN_ANSWER = "planners task tasks split questions trials in_flight engine_memory reward output".split()
CODE = (AgentSystem, Lockstep, ToolEnv, Sandbox, Corpus, World)  # answers depend on the modules that define these


def depends_on(config: BenchmarkConfig, system: AgentSystem, model: str, task: str) -> str:
    """A digest of all that the answers of a planner depend on: flags, settings, code (but not its comments and layout),
    and the files of models and corpus, by size and time."""
    flags = {name: value for name, value in asdict(config).items() if name not in NOT_OF_AN_ANSWER}
    modules = {inspect.getmodule(part) for part in (*CODE, *system.tools.values())}
    sources = [inspect.getsource(part) for part in (*sorted(modules, key=str), system.solve)]
    code = [ast.dump(ast.parse(source)) for source in sources]
    files = [*Path(model).glob("*"), *Path(config.frozen_model).glob("*"), *Path(task).glob("corpus.db")]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    settings = sorted(item for item in os.environ.items() if item[0].startswith("WEB_"))  # of the web tools
    return hashlib.sha256(json.dumps([flags, settings, code, BARE_PROMPT, stats]).encode()).hexdigest()


# --- figures and tables -----------------------------------------------------------------------------------------------

TOKENS = ("planner_read", "planner_written", "frozen_read", "frozen_written")


def figures(system: AgentSystem, examples: list[Example], config: BenchmarkConfig, label: str) -> dict:
    """`eval.evaluate`, with intervals over questions and trials."""
    result, pairs = evaluate(system, examples, (config.seed, "eval"), label, config.trials)
    rewards = [trajectory.reward for _, trajectory in pairs]
    groups = [rewards[i : i + config.trials] for i in range(0, len(rewards), config.trials)]
    result["interval"] = interval(groups)
    for family, of_family in result["by_family"].items():
        of_family["interval"] = interval([g for example, g in zip(examples, groups) if example.family == family])
    result["tokens"] = {kind: result["tokens"].get(kind, 0) for kind in TOKENS}  # a bare model has no frozen ones
    del result["truncated_turns"]  # answers are kept without their turns
    return result


def interval(rewards: list[list[float]]) -> tuple[float, float]:
    """The 95 % interval of the accuracy over questions and trials, from rewards [question][trial]: Wilson's, for as
    many independent answers as these are worth (their effective sample size, as in Franco et al. 2019).

    Trials of a question resemble each other, so n questions with t trials are worth between n and n t: the variance
    p (1 - p) of one answer over the variance of the accuracy. If all answers are right, if all are wrong, or if
    there is one question, the data cannot tell, and n is taken.
    """
    n, trials = len(rewards), len(rewards[0])
    means = [mean(row) for row in rewards]
    accuracy, worth = mean(means), n
    if min(n, trials) > 1 and 0 < accuracy < 1:
        variance = pvariance(means) / n
        worth = min(n * trials, accuracy * (1 - accuracy) / variance) if variance else n * trials
    return wilson(accuracy * worth, worth)


def table_of_tasks(results: dict[str, dict[str, dict]]) -> str:
    """The results {planner: {task: figures}} laid out as in the paper: a row for each planner, a column for each task,
    then the mean of the tasks. The other figures stand below the accuracy in the same way."""
    first = next(iter(results.values()))
    folders = [Path(task).name for task in first]
    rows = [["accuracy"]]
    for (task, r), folder in zip(first.items(), folders):
        name = folder if folders.count(folder) == 1 else task
        trials = f", {r['trials']} trials" if r["trials"] > 1 else ""
        rows[0].append(f"{name} (n = {r['n']}{trials})")
    rows[0].append("average")
    for planner, by_task in results.items():
        average = percent(mean(r["accuracy"] for r in by_task.values()))
        rows.append([f"  {planner}", *map(share, by_task.values()), average])
    for label, (_, write) in more_figures(next(iter(first.values()))).items():
        rows.append([label])
        for planner, by_task in results.items():
            values = [more_figures(r)[label][0] for r in by_task.values()]
            values.append(None if None in values else mean(values))
            rows.append([f"  {planner}", *("    -" if value is None else write(value) for value in values)])
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def percent(value: float) -> str:
    return f"{100 * value:5.1f} %"


def more_figures(r: dict) -> dict[str, tuple[float | None, Callable[[float], str]]]:
    """What the table says below the accuracy: label -> (figure, how it is written). A bare model takes no turns."""
    acts = r["turns"] > 0
    rows = {"turns per question": (r["turns"] if acts else None, "{:5.2f}".format)}
    rows |= {tool: (part if acts else None, percent) for tool, part in r["tool_shares"].items()}
    rows["turns with an error"] = (r["tool_error_rate"] if acts else None, percent)
    return rows | {f"tokens per question, {kind}": (count, "{:5,.0f}".format) for kind, count in r["tokens"].items()}


# --- the command ------------------------------------------------------------------------------------------------------

OF_TRAINING = ("frozen_model", "tools", "temperature", "max_turns", "max_tokens", "result_chars")


def trained_with(path: str, config: BenchmarkConfig) -> str:
    """The flags of a run's training that differ in this evaluation, as for the command line; "" if `path` is no run, or
    if all are the same."""
    if planner_folder(path) == path:
        return ""
    file = Path(path) / "config.json"
    with whole(file):
        trained = json.loads(file.read_text())
        trained["frozen_model"] = trained["frozen_model"] or trained["model"]
        changed = [name for name in OF_TRAINING if trained[name] != getattr(config, name)]
    return " ".join(f"--{name} {as_words(trained[name])}" for name in changed)


def as_words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def main(config: BenchmarkConfig) -> None:
    if config.trials > 1 and config.temperature == 0:
        raise UserError(f"--trials {config.trials} at --temperature 0 are all the same: sample, or take one trial")
    examples = {task: load_examples(task, config.split, config.questions) for task in config.tasks}
    path, kept = None, {}
    if config.output:
        if Path(config.output).is_dir():
            raise UserError(f"--output {config.output} is a folder: name a file")
        path = Path(config.output).with_suffix(".answers.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        mistake = "is no file of answers ({error!r}): remove it, or name another --output"
        path.open("a").close()  # a place that cannot be written to shows now
        kept = dict(read_kept(path, kept_answer, mistake))
    for name in dict.fromkeys(config.planners):
        if name == "bare:":
            raise UserError("--planners bare: names no model: write bare:MODEL")
        if flags := trained_with(name.removeprefix("bare:"), config):
            print(f"{name} was trained with {flags}; here it is evaluated with other values")
    # Bare models that rules judge need no frozen modules, no tools and no articles.
    alone = config.reward == EvalConfig.reward and all(name.startswith("bare:") for name in config.planners)
    systems = {}
    for task in examples:
        of_task = copy.copy(config)
        of_task.task, of_task.tools = task, [] if alone else config.tools
        parts = vars(open_system(of_task))
        systems[task] = KeepingSystem(**parts, path=path, kept=kept, in_flight=config.in_flight)
    print(systems[task].sandbox.describe())
    frozen = None if alone else open_engine(config, config.frozen_model)

    results, planner, loaded = {}, None, ""
    for name in dict.fromkeys(config.planners):
        folder = name.removeprefix("bare:")
        model = planner_folder(folder)
        if model != loaded:
            planner = system = None
            gc.collect()  # frees the last planner before the next is loaded, whatever cycles of references it has
            loaded, shared = model, frozen and model == config.frozen_model
            planner = frozen if shared else open_engine(config, model)
        results[name] = {}
        for task in systems:
            loop = solve if name == folder else solve_bare
            system = replace(systems[task], planner=planner, frozen=frozen, solve=loop)
            system.asked = (name, task, depends_on(config, system, model, task))
            results[name][task] = figures(system, examples[task], config, f"{name}, {task}")
    print(table_of_tasks(results) if len(systems) > 1 else table({name: r[task] for name, r in results.items()}))
    if path:
        Path(config.output).write_text(json.dumps({"config": asdict(config), "results": results}, indent=2))
        print(f"figures: {config.output}; answers: {path}")


if __name__ == "__main__":
    run_main(main, BenchmarkConfig)
