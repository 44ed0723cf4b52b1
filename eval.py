"""Compare planners, all with the same frozen modules, in accuracy, turns, tool use, errors and cost.

    python eval.py                                                      # the bundled backbone, untrained
    python eval.py --planners tinyworld/backbone runs/tinyworld-seed0   # before and after, side by side
    python eval.py --planners MODEL runs/x http://localhost:8000/v1#NAME --frozen_model MODEL

`lab/benchmark.py` evaluates on several tasks at once, beside the bare model, and keeps each answer as it comes.
"""

import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from agent import AgentSystem, Trajectory
from judge import score
from llm import open_engine
from sandbox import Sandbox
from tasks import Example, load_corpus, load_examples
from team import team
from tools import TOOLS, UserError, find, find_tools

# --- the command line of the scripts that have a config ---------------------------------------------------------------


def setting(default: Any, help: str, group: str = "", low: float = 0, high: float = 1e9) -> Any:
    """A field of a config: its default, its text in --help, its range if it is a number. A `group` begins a group of
    flags."""
    if type(default) in (int, float):
        help += f" (at least {low})" if high == 1e9 else f" ({low} to {high})"
    else:
        low = None
    metadata = {"help": help, "group": group, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Flags(HfArgumentParser):
    """The flags of a config, in groups. (HfArgumentParser hands each field's metadata to `add_argument`.)"""

    group = None

    def error(self, message):
        raise UserError(f"{message}; --help lists every flag")

    def add_argument(self, *names, group="", low=None, high=None, **options):
        if group:
            self.group = self.add_argument_group(group)
        return (self.group or super()).add_argument(*names, **options)


ADVICE = {
    ModuleNotFoundError: "; pip install -r requirements-gpu.txt brings vLLM, LoRA and 8-bit Adam",
    torch.OutOfMemoryError: "; train.py has --lora_rank, --optimizer adamw8bit and --micro_batch_tokens against it",
}


def run_main(main: Callable, config_class: type) -> None:
    """Parse the command line into the config and run."""
    with one_line_errors():
        flags = Flags(config_class, description="Flags marked * are the ones to change first.", allow_abbrev=False)
        config, *_, unknown = flags.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            raise UserError(f"unknown: {' '.join(unknown)}; --help lists every flag")
        main(config)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """An error prints one line and ends the script, with code 2 if the user can mend it."""
    try:
        yield
        sys.stdout.flush()  # a full disk shows here, or in no handler at all
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code, message, advice = 2, str(error) or repr(error), ADVICE.get(type(error), "")
        if not isinstance(error, (UserError, OSError, *ADVICE)):  # not the user's mistake
            code, message, advice = 1, f"{type(error).__name__}: {error}", "; traceback.log says where"
            Path("traceback.log").write_text(traceback.format_exc())
        print(f"{Path(sys.argv[0]).name}: {message.strip().splitlines()[0]}{advice}", file=sys.stderr)
        sys.exit(code)


class Ranged:
    """A config that refuses numbers outside the ranges that stand beside its flags."""

    def __post_init__(self):
        for flag in fields(self):
            value, low = getattr(self, flag.name), flag.metadata["low"]
            if low is not None and not low <= value <= flag.metadata["high"]:  # this form refuses nan too
                raise UserError(f"--{flag.name} {value} is out of range: {flag.metadata['help']}")


@dataclass
class SystemConfig(Ranged):
    """The settings that train.py and eval.py share: the task, the system that solves it, and the reward."""

    task: str = setting(
        "tinyworld", "* tinyworld, tinyworld-hard or a folder with SPLIT.jsonl (and corpus.db)", group="the system"
    )
    engine: Literal["transformers", "vllm"] = setting("transformers", "engine of each model, unless it is a URL")
    engine_memory: float = setting(0.3, "share of the GPU's memory for each vLLM engine, weights and KV cache", high=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device; CUDA_VISIBLE_DEVICES chooses among GPUs")
    tools: list[str] = setting(list(TOOLS), "tools on offer, in this order; one of your own is module.function")
    max_turns: int = setting(4, "* turn budget of a question", low=1)
    max_tokens: int = setting(64, "* tokens of one completion, at most", low=1)
    result_chars: int = setting(400, "characters of a result or command in the memory; longer ones are cut", low=1)
    enable_thinking: bool = setting(True, "whether a model like Qwen3 thinks before it writes; that takes more tokens")
    temperature: float = setting(1.0, "sampling temperature of the planner, in rollouts, loss and evaluation")
    reward: str = setting("judge.rules", "module.function of the reward, such as lab.judge_llm.reward")
    seed: int = setting(0, "* seed of everything random")


@dataclass
class EvalConfig(SystemConfig):
    planners: list[str] = setting(
        ["tinyworld/backbone"], "* model folders, run folders or servers' URL#NAME", group="the evaluation"
    )
    frozen_model: str = setting("tinyworld/backbone", "model of the frozen modules: folder, hub name or URL#NAME")
    split: Literal["train", "dev", "test"] = setting("test", "split of the task")
    questions: int = setting(0, "* number of questions, from the start of the split; 0: all")
    trials: int = setting(1, "answers per question", low=1)
    output: str = setting("eval.json", "file for the figures; empty: none")


# --- one planner on the questions of a task ---------------------------------------------------------------------------


def open_system(config: SystemConfig) -> AgentSystem:
    """Build the system without its engines, so that a wrong name of a tool or file shows before a model loads."""
    tools = find_tools(config.tools)
    return AgentSystem(
        planner=None,
        frozen=None,
        corpus=load_corpus(config.task, needed="Search" in tools),
        sandbox=Sandbox(),
        max_turns=config.max_turns,
        max_tokens=config.max_tokens,
        result_chars=config.result_chars,
        tools=tools,
        temperature=config.temperature,
        reward=find(config.reward, {}, 3),
    )


def evaluate(
    system: AgentSystem, examples: list[Example], seed: tuple, label: str = "evaluating", trials: int = 1
) -> tuple[dict, list[tuple[Example, Trajectory]]]:
    """Solve each question `trials` times -> (figures: accuracy with its interval, also by family, and how the planner
    worked; pairs of example and scored trajectory)."""
    groups = system.rollout([example.question for example in examples], trials, seed, label)
    pairs = score(examples, groups, system.reward, system.frozen)
    return summary(examples, groups, system.tools), pairs


def summary(examples: list[Example], groups: list[list[Trajectory]], tools: Iterable[str]) -> dict:
    """The figures of scored trajectories [question][trial]."""
    by_family = {
        family: accuracy([group for example, group in zip(examples, groups) if example.family == family])
        for family in sorted({example.family for example in examples})
    }
    how = behaviour([trajectory for group in groups for trajectory in group], tools)
    return {**accuracy(groups), "trials": len(groups[0]), "by_family": by_family, **how}


def accuracy(groups: list[list[Trajectory]]) -> dict:
    """Mean reward of trajectories [question][trial], with its 95 % interval over the questions. (More trials per
    question would narrow it a little. They resemble each other, so the interval does not count on them.)"""
    shares = [sum(trajectory.reward for trajectory in group) / len(group) for group in groups]
    return {"accuracy": sum(shares) / len(shares), "interval": wilson(sum(shares), len(shares)), "n": len(shares)}


def wilson(hits: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score), which holds for small n and for shares near 0 and 1 too."""
    z = 1.96  # 95 % of a normal distribution lies within 1.96 standard deviations
    half = z * math.sqrt(max(0.0, hits * (n - hits) / n) + z * z / 4)
    low, high = ((hits + z * z / 2 + side * half) / (n + z * z) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def behaviour(trajectories: list[Trajectory], tools: Iterable[str]) -> dict:
    """How the planner worked: turns, tools (share of turns), turns that ended in a mistake of the model, and the tokens
    per question, as if nothing were cached."""
    steps = [step for trajectory in trajectories for step in trajectory.memory.steps]
    used, errors = Counter(step.tool for step in steps), [step.error for step in steps if step.error]
    tokens = sum((trajectory.tokens for trajectory in trajectories), Counter())
    total = max(1, len(steps))
    return {
        "turns": len(steps) / len(trajectories),
        "tool_shares": {tool: used[tool] / total for tool in tools},
        "tool_error_rate": len(errors) / total,
        "format_error_rate": errors.count("format") / total,
        "tokens_per_turn": tokens["planner_written"] / total,
        "truncated_turns": sum(turn.truncated for trajectory in trajectories for turn in trajectory.turns) / total,
        "tokens": {kind: count / len(trajectories) for kind, count in tokens.items()},
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def figures(r: dict) -> dict[str, str]:
    """The rows of a table for one result: label -> figure."""
    cells = {f"accuracy (n = {r['n']})": share(r)}
    cells |= {f"  {family} (n = {f['n']})": share(f) for family, f in r["by_family"].items()}
    cells["turns per question"] = f"{r['turns']:5.2f}"
    cells |= {f"  {tool}": f"{100 * part:5.1f} %" for tool, part in r["tool_shares"].items()}
    cells["turns without a usable plan"] = f"{100 * r['format_error_rate']:5.1f} %"
    cells["turns with an error"] = f"{100 * r['tool_error_rate']:5.1f} %"
    cells |= {f"tokens per question, {kind}": f"{count:5,.0f}" for kind, count in r["tokens"].items()}
    return cells


def share(r: dict) -> str:
    low, high = r["interval"]
    return f"{100 * r['accuracy']:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def table(results: dict[str, dict]) -> str:
    """The results on one task side by side, one row per figure."""
    columns = [figures(r) for r in results.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [["", *results]]
    rows += [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# --- the command ------------------------------------------------------------------------------------------------------


def planner_folder(path: str) -> str:
    """A run's checkpoint if `path` is a run folder, else `path` itself."""
    checkpoint = Path(path) / "checkpoint"
    return str(checkpoint) if checkpoint.is_dir() else path


def main(config: EvalConfig) -> None:
    examples = load_examples(config.task, config.split, config.questions)
    system = open_system(config)
    if team().rank:  # one process writes
        config.output = ""
    if config.output:
        open(config.output, "a").close()  # a place that cannot be written to shows now
    print(system.sandbox.describe())
    system.frozen = open_engine(config, config.frozen_model)
    results, rewards = {}, {}
    for name in config.planners:
        path = planner_folder(name)
        system.planner = None  # frees the last planner
        system.planner = system.frozen if path == config.frozen_model else open_engine(config, path)
        results[name], pairs = evaluate(system, examples, (config.seed, "eval"), name, config.trials)
        rewards[name] = [trajectory.reward for _, trajectory in pairs]
    print(table(results))
    if len(rewards) > 1:
        print(find("lab.paired.against_first", {})(rewards, config.trials))
    if config.output:
        Path(config.output).write_text(json.dumps({"config": asdict(config), "results": results}, indent=2))
        print(f"figures: {config.output}")


if __name__ == "__main__":
    run_main(main, EvalConfig)
