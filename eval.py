"""Accuracy, turns, tool use, errors and cost of one or several planners, side by side, with the same frozen modules.

    python eval.py                                                      # the bundled backbone, untrained
    python eval.py --planners tinyworld/backbone runs/tinyworld-seed0   # before and after, side by side
    python eval.py --task bamboogle 2wiki --max_turns 10 --trials 3     # benchmarks, in one table
    python eval.py --planners bare:MODEL MODEL runs/x https://api.openai.com/v1#gpt-4o --frozen_model MODEL

The last one is the paper's comparison: a bare model that answers in one prompt, the system with the same model as the
planner, with the trained one, and with another model that is not trained.

Every answer goes to a JSONL file beside the output as it comes. The same command continues from there; it asks only
what is not answered yet, under these flags, by these weights and this code.
"""

import hashlib
import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from agent import AgentSystem, Memory, Step, Trajectory
from judge_llm import ModelJudge, check_judge, keep_row, open_judge, read_kept, score
from llm import EngineError, UserError, best_device, open_engine
from tasks import Example, load_corpus, load_examples
from tools import TOOLS, Sandbox
from web import WEB_TOOLS, Web, select_tools


def setting(default: Any, help: str) -> Any:
    """A field of a config, with the text that `--help` shows beside its default."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def run_main(main: Callable[[Any], None], config_class: type) -> None:
    """Parse the command line into the config and run; bad input is one line and exit code 2."""
    try:
        config, *_, unknown = HfArgumentParser(config_class).parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            raise UserError(f"unknown: {' '.join(unknown)}; --help lists every flag")
        main(config)
    except (UserError, EngineError, torch.OutOfMemoryError) as error:
        if isinstance(error, EngineError) and error.__cause__:
            traceback.print_exception(error.__cause__)  # for whoever has to mend the machine
        if isinstance(error, torch.OutOfMemoryError):
            error = f"out of GPU memory ({str(error).splitlines()[0]}); --help lists what takes less"
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)


@dataclass
class EvalConfig:
    planners: list[str] = setting(
        ["tinyworld/backbone"],
        "model folders, run folders or servers' URL#NAME, side by side; bare:MODEL answers alone, in one prompt",
    )
    frozen_model: str = setting("tinyworld/backbone", "of the frozen modules: folder, hub name or a server's URL#NAME")
    engine: str = setting("transformers", "transformers or vllm; a URL is always asked over HTTP")
    engine_memory: float = setting(0.3, "share of the GPU's memory for each vLLM engine, weights and KV cache")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on cuda")
    tokenizer: str = setting(
        "", "for planners behind a URL: folder of their tokenizer, to talk in token ids; empty: chat"
    )
    task: list[str] = setting(
        ["tinyworld"], "tinyworld, prepared tasks, folders with test.jsonl, or JSONL files; several are one table"
    )
    corpus: str = setting("", "file made by `python tools.py index`; empty: the articles of the bundled world")
    split: str = setting("test", "train, dev or test")
    questions: int = setting(0, "number of questions, from the start of the split; 0: all")
    trials: int = setting(1, "answers to each question, sampled from seeds of their own")
    in_flight: int = setting(512, "answers that are worked on together, at most")
    temperature: float = setting(1.0, "sampling temperature of the planner; 0: greedy")
    max_turns: int = setting(4, "turn budget of a question")
    max_planner_tokens: int = setting(64, "tokens of one completion of a planner or bare model, at most")
    max_frozen_tokens: int = setting(64, "tokens of one completion of a frozen module, at most")
    result_chars: int = setting(400, "characters of a tool result in the memory; longer ones are cut in the middle")
    tools: list[str] = setting(list(TOOLS), f"tools on offer, in this order; there are also {', '.join(WEB_TOOLS)}")
    web_cache: str = setting("web_cache", "folder where the web tools store what they fetched; empty: nowhere")
    web_frozen: bool = setting(False, "the web tools answer from web_cache alone; what it lacks stops the run")
    web_summary: bool = setting(False, "a frozen module sums up the passages that the web tools find")
    web_private: bool = setting(False, "Web_Search may open private and loopback addresses")
    judge: str = setting("rules", "rules; llm: rules, then a language model about what they do not accept")
    judge_model: str = setting("", "of --judge llm: folder, hub name or a server's URL#NAME")
    judge_tokens: int = setting(256, "tokens of one reply of the judge, at most")
    judge_compare: bool = setting(False, "ask the judge about what the rules accept too, to report their agreement")
    seed: int = setting(0, "seed of the sampling")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    output: str = setting("eval.json", "file for the figures, the answers go beside it; empty: none")


# --- one planner, one task --------------------------------------------------------------------------------------------


def evaluate(
    system: AgentSystem,
    examples: list[Example],
    temperature: float,
    seed: tuple,
    label: str = "evaluating",
    keep: list[tuple[Example, Trajectory]] | None = None,
    judge: ModelJudge | None = None,
    trials: int = 1,
    in_flight: int = 512,
    answers: "Answers | None" = None,
) -> dict:
    """`trials` trajectories for each question -> accuracy with its interval, by family, and how it was reached.

    Every question counts: one that crashed is wrong, and is counted under `crashed` as well. A list given as `keep` is
    filled with the trajectories, their rewards set. What `answers` holds is not asked again; it gets the rest.
    """
    jobs = [(number, trial) for number in range(len(examples)) for trial in range(trials)]
    done = {}  # (number of the question, trial) -> trajectory
    for number, trial in jobs if answers else []:
        if trajectory := answers.get(examples[number].question, number, trial):
            done[number, trial] = trajectory
    if done:
        print(f"{label}: {len(done)} of {len(jobs)} answers are in {answers.path}")
    todo = [job for job in jobs if job not in done]
    with tqdm(total=len(jobs), initial=len(done), desc=label, unit="question", leave=False) as bar:
        for batch in (todo[i : i + in_flight] for i in range(0, len(todo), in_flight)):

            def finish(index: int, trajectory: Trajectory) -> None:
                done[batch[index]] = trajectory
                if answers:
                    answers.add(trajectory, *batch[index])
                if keep is None:
                    trajectory.turns = []  # the token ids of thousands of prompts would fill the memory
                bar.update()

            requests = [(examples[number].question, (*seed, number, trial)) for number, trial in batch]
            system.solve_all(requests, temperature, finish, keep_crashed=True)
    pairs = [(examples[number], done[number, trial]) for number, trial in jobs]
    score(pairs, judge)
    if keep is not None:
        keep += pairs
    rewards = [[done[number, trial].reward for trial in range(trials)] for number in range(len(examples))]
    by_family = {}
    for family in sorted({example.family for example in examples}):
        by_family[family] = accuracy([row for row, example in zip(rewards, examples) if example.family == family])
    judged = judge.report() if judge else {}
    how = behaviour([trajectory for _, trajectory in pairs], system.tools)
    return {**accuracy(rewards), "trials": trials, "by_family": by_family, **how, **judged}


def accuracy(rewards: list[list[float]]) -> dict[str, Any]:
    """Of rewards [question][trial]."""
    n = len(rewards)
    return {"accuracy": sum(map(sum, rewards)) / (n * len(rewards[0])), "interval": interval(rewards), "n": n}


def interval(rewards: list[list[float]]) -> tuple[float, float]:
    """The 95 % interval of the accuracy over questions and trials, from rewards [question][trial].

    The Wilson interval of as many independent answers as these are worth (their effective sample size, as in Franco et
    al. 2019). Trials of a question resemble each other, so n questions with t trials are worth between n and n t: the
    variance p (1 - p) of one answer, over the variance of the accuracy, which is that of the questions' means, over n.
    With one trial this is n. Where all answers are right, or all wrong, the data cannot tell, and n is taken.
    """
    n, trials = len(rewards), len(rewards[0])
    means = [sum(row) / trials for row in rewards]
    share = sum(means) / n
    variance = sum((x - share) ** 2 for x in means) / n**2
    worth = n
    if trials > 1 and 0 < share < 1:
        worth = min(n * trials, share * (1 - share) / variance) if variance else n * trials
    return wilson(sum(map(sum, rewards)) * worth / (n * trials), worth)


def wilson(hits: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score): right for small n and for shares near 0 and 1 too."""
    z = 1.96  # standard deviations of a normal distribution hold 95 % of it
    share, square = hits / n, z * z / n
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(max(0.0, share * (1 - share) / n + square / (4 * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


TOKENS = ("planner_read", "planner_written", "frozen_read", "frozen_written")


def behaviour(trajectories: list[Trajectory], offered: Iterable[str] = TOOLS) -> dict[str, Any]:
    """How the planner worked: turns, tools (share of turns), turns that ended in a mistake of the model, and the tokens
    that a question costs, as if nothing were cached."""
    steps = [step for trajectory in trajectories for step in trajectory.memory.steps]
    tools, errors = Counter(step.tool for step in steps), Counter(step.error for step in steps if step.error)
    tokens = sum((trajectory.tokens for trajectory in trajectories), Counter())
    total = max(1, len(steps))
    return {
        "turns": len(steps) / len(trajectories),
        "tool_shares": {tool: tools[tool] / total for tool in offered},
        "tool_error_rate": sum(errors.values()) / total,
        "format_error_rate": errors["format"] / total,
        "crashed": sum(bool(trajectory.crash) for trajectory in trajectories),
        "tokens": {kind: tokens[kind] / len(trajectories) for kind in TOKENS},
    }


# --- answers that are kept --------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """The answers of one planner to one task in a JSONL file, so that an evaluation that was stopped continues.

    The key of a line stands for all that its answer depends on: planner, task, question, trial, and `depends`. After a
    change of any of it, the question is asked again; so is one that crashed. Rewards are not kept: answers are judged
    each time anew, however they are judged.
    """

    path: Path
    rows: dict[str, dict]  # of the file, by key
    planner: str
    task: str
    depends: str

    def key(self, *job: Any) -> str:
        return hashlib.sha256(json.dumps([self.planner, self.task, self.depends, *job]).encode()).hexdigest()

    def get(self, question: str, number: int, trial: int) -> Trajectory | None:
        row = self.rows.get(self.key(question, number, trial))
        if row is None or row["crash"]:
            return None
        memory = Memory(question, row["analysis"], [Step(**step) for step in row["steps"]])
        return Trajectory(question, [], memory, row["answer"], tokens=Counter(row["tokens"]))

    def add(self, t: Trajectory, number: int, trial: int) -> None:
        job = dict(planner=self.planner, task=self.task, number=number, trial=trial, question=t.question)
        end = dict(answer=t.answer, crash=t.crash, tokens=t.tokens, analysis=t.memory.analysis)
        steps = [asdict(step) for step in t.memory.steps]
        keep_row(self.path, {"key": self.key(t.question, number, trial), **job, **end, "steps": steps})


NOT_OF_AN_ANSWER = ("planners", "task", "split", "questions", "trials", "in_flight", "engine_memory", "output",
                    "judge", "judge_model", "judge_tokens", "judge_compare")  # fmt: skip


def depends_on(config: EvalConfig, model: str, offered: Iterable[str]) -> str:
    """All that a planner's answers depend on: flags, code, and the files of models and corpus, by size and time."""
    flags = {name: value for name, value in asdict(config).items() if name not in NOT_OF_AN_ANSWER}
    flags["tools"] = list(offered)  # without a key, a tool that was named may not be among them
    code = [(Path(__file__).parent / name).read_text() for name in ("agent.py", "llm.py", "tools.py", "web.py")]
    paths = [Path(path) for path in (model, config.frozen_model, config.corpus) if path]
    files = [file for path in paths for file in (sorted(path.glob("*")) if path.is_dir() else [path]) if file.exists()]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([flags, code, stats]).encode()).hexdigest()


# --- tables -----------------------------------------------------------------------------------------------------------


def percent(value: float, interval: tuple[float, float] | None = None) -> str:
    text = f"{100 * value:5.1f} %"
    return text + (f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def count(r: dict) -> str:
    return f"n = {r['n']}" + (f", {r['trials']} trials" if r.get("trials", 1) > 1 else "")


def figures_below(r: dict) -> dict[str, tuple[float | None, Callable[[float], str]]]:
    """What a table says below the accuracy: label -> (figure, how it is written). Results of older runs have less."""
    acts = r["turns"] > 0  # a bare model does not
    rows = {"turns a question": (r["turns"] if acts else None, "{:5.2f}".format)}
    rows |= {f"  {tool}": (share if acts else None, percent) for tool, share in r["tool_shares"].items()}
    rows["turns with an error"] = (r["tool_error_rate"] if acts else None, percent)
    for kind in TOKENS:
        tokens = r["tokens"][kind] if "tokens" in r else None
        rows[f"tokens a question, {kind.replace('_', ' ')}"] = (tokens, "{:5,.0f}".format)
    rows["crashed questions"] = (r["crashed"] or None, "{:5g}".format)
    decided = r.get("judge_decided", {})
    rows["judged by the model"] = (decided.get("model", 0) / sum(decided.values()) if decided else None, percent)
    rows["  agrees with the rules"] = (r.get("judge_agreement"), percent)
    return rows


def written(figure: float | None, write: Callable[[float], str]) -> str:
    return "    -" if figure is None else write(figure)


def table(results: dict[str, dict]) -> str:
    """The results on one task side by side, one row a figure."""
    first, columns = next(iter(results.values())), list(results.values())
    rows = [["", *results]]
    rows.append([f"accuracy ({count(first)})", *(percent(r["accuracy"], r["interval"]) for r in columns)])
    for family, figures in first["by_family"].items():
        cells = (percent(r["by_family"][family]["accuracy"], r["by_family"][family]["interval"]) for r in columns)
        rows.append([f"  {family} (n = {figures['n']})", *cells])
    below = [figures_below(r) for r in columns]
    for label in below[0]:
        if any(of_one[label][0] is not None for of_one in below):
            rows.append([label, *(written(*of_one[label]) for of_one in below)])
    return grid(rows)


def table_of_tasks(results: dict[str, dict[str, dict]]) -> str:
    """The results {planner: {task: figures}} laid out as in the paper: a row for each planner, a column for each task,
    then the mean of the tasks. Below the accuracy, the other figures in the same way."""
    first = next(iter(results.values()))
    rows = [["accuracy", *(f"{Path(task).stem} ({count(r)})" for task, r in first.items()), "average"]]
    for planner, of_task in results.items():
        cells = [percent(r["accuracy"], r["interval"]) for r in of_task.values()]
        rows.append([f"  {planner}", *cells, percent(mean(r["accuracy"] for r in of_task.values()))])
    below = {planner: [figures_below(r) for r in of_task.values()] for planner, of_task in results.items()}
    for label in next(iter(below.values()))[0]:
        found = {planner: [of_one[label] for of_one in of_task] for planner, of_task in below.items()}
        if all(figure is None for of_task in found.values() for figure, _ in of_task):
            continue
        rows.append([label.strip()])
        for planner, of_task in found.items():
            figures, write = [figure for figure, _ in of_task], of_task[0][1]
            average = None if None in figures else mean(figures)
            rows.append([f"  {planner}", *(written(figure, write) for figure in [*figures, average])])
    return grid(rows)


def grid(rows: list[list[str]]) -> str:
    """Columns of equal width; a row may be shorter."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# --- the command ------------------------------------------------------------------------------------------------------


def planner_folder(path: str) -> str:
    """A run's checkpoint where `path` is a run folder, else `path` itself."""
    checkpoint = Path(path) / "checkpoint"
    return str(checkpoint) if checkpoint.is_dir() else path


def read_json(path: Path) -> dict:
    """What a run has written; `UserError` where that is damaged or missing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged or missing") from None


def trained_with(path: str, config: EvalConfig) -> str:
    """The flags of a run's training that stand otherwise in this evaluation, as for the command line; "" where `path`
    is no run, or all are the same."""
    if planner_folder(path) == path:
        return ""
    trained = read_json(Path(path) / "config.json")
    trained["frozen_model"] = trained["frozen_model"] or trained["model"]
    flags = "frozen_model corpus tools temperature max_turns max_planner_tokens max_frozen_tokens result_chars"
    changed = {flag: trained[flag] for flag in flags.split() if trained[flag] != getattr(config, flag)}
    return " ".join(f"--{flag} {' '.join(v) if isinstance(v, list) else v}" for flag, v in changed.items())


def check(config: EvalConfig) -> None:
    """Bad values are refused before anything is loaded."""
    check_judge(config)
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {config.dtype}: must be auto, float32 or bfloat16")
    for name in ("trials", "in_flight"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.trials > 1 and config.temperature == 0:
        raise UserError(f"--trials {config.trials} at --temperature 0 are all the same: sample, or take one trial")
    if Path(config.output).is_dir() and config.output:
        raise UserError(f"--output {config.output}: is a folder, name a file")
    if config.judge == "llm" and not config.output:
        raise UserError("--judge llm keeps its verdicts beside the figures: name a file with --output")


def main(config: EvalConfig) -> None:
    check(config)
    web = Web(config.web_cache, config.web_frozen, config.web_summary, config.web_private)
    tools = select_tools(config.tools, web, bool(config.corpus) or "tinyworld" in config.task)
    device = best_device(config.device)
    tasks = {task: load_examples(task, config.split)[: config.questions or None] for task in config.task}
    bfloat16 = config.dtype == "bfloat16" or config.dtype == "auto" and device.startswith("cuda")
    dtype, vllm = torch.bfloat16 if bfloat16 else torch.float32, dict(memory_share=config.engine_memory)
    alone = all(name.startswith("bare:") for name in config.planners)
    frozen = None if alone else open_engine(config.engine, config.frozen_model, device, dtype, **vllm)
    verdicts = Path(config.output).parent / "verdicts.jsonl"
    judge = open_judge(config, verdicts, device, dtype, {config.frozen_model: frozen})
    sandbox, corpus = Sandbox(), load_corpus(config.corpus)
    print(sandbox.describe())
    limits = (config.max_turns, config.max_planner_tokens, config.max_frozen_tokens, config.result_chars)
    path = Path(config.output).with_suffix(".answers.jsonl") if config.output else None
    kept = read_kept(path, lambda row: (row["key"], row)) if path else {}
    results: dict[str, dict[str, dict]] = {}
    shared = {config.frozen_model: frozen} if frozen and not config.tokenizer else {}  # equal weights are loaded once
    engines = dict(shared)
    for name in dict.fromkeys(config.planners):
        path_or_name = name.removeprefix("bare:")
        model = planner_folder(path_or_name)
        if flags := trained_with(path_or_name, config):
            print(f"{name} was trained with {flags}; here it is evaluated with other values")
        if model not in engines:
            engines, planner, system = dict(shared), None, None  # frees the last planner, though not one of vLLM
            engines[model] = open_engine(config.engine, model, device, dtype, config.tokenizer, **vllm)
        planner = engines[model]
        system = AgentSystem(planner, frozen, corpus, sandbox, *limits, tools, web, bare=name.startswith("bare:"))
        results[name] = {}
        for task, examples in tasks.items():
            answers = Answers(path, kept, name, task, depends_on(config, model, tools)) if path else None
            label = f"{name}, {task}" if len(tasks) > 1 else name
            results[name][task] = evaluate(
                system, examples, config.temperature, (config.seed, "eval"), label,
                judge=judge, trials=config.trials, in_flight=config.in_flight, answers=answers,
            )  # fmt: skip
    if len(tasks) > 1:
        print(table_of_tasks(results))
    else:
        print(table({name: figures for name, of_task in results.items() for figures in of_task.values()}))
    if path:
        Path(config.output).write_text(json.dumps({"config": asdict(config), "results": results}, indent=2))
        print(f"figures: {config.output}; answers: {path}")


if __name__ == "__main__":
    run_main(main, EvalConfig)
