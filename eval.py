"""Accuracy, turns, tool use and errors of one or several planners, side by side, with the same frozen modules.

python eval.py                                                    # the bundled backbone, untrained
python eval.py --planners tinyworld/backbone runs/tinyworld-seed0 # before and after, side by side
"""

import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from agent import AgentSystem, Trajectory
from judge import RULES
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


@dataclass
class EvalConfig:
    planners: list[str] = setting(
        ["tinyworld/backbone"], "model folders, run folders or servers' URL#NAME, compared side by side"
    )
    frozen_model: str = setting("tinyworld/backbone", "of the frozen modules: folder, hub name or a server's URL#NAME")
    engine: str = setting("transformers", "transformers or vllm; a URL is always asked over HTTP")
    engine_memory: float = setting(0.3, "share of the GPU's memory for each vLLM engine, weights and KV cache")
    dtype: str = setting("auto", "float32 or bfloat16; auto: bfloat16 on cuda")
    tokenizer: str = setting(
        "", "for planners behind a URL: folder of their tokenizer, to talk in token ids; empty: chat"
    )
    task: str = setting("tinyworld", "tinyworld, a folder with test.jsonl, or one JSONL file")
    corpus: str = setting("", "file made by `python tools.py index`; empty: the articles of the bundled world")
    split: str = setting("test", "train, dev or test")
    questions: int = setting(0, "number of questions, from the start of the split; 0: all")
    temperature: float = setting(1.0, "sampling temperature of the planner; 0: greedy")
    max_turns: int = setting(4, "turn budget of a question")
    max_planner_tokens: int = setting(64, "tokens of one planner completion, at most")
    max_frozen_tokens: int = setting(64, "tokens of one completion of a frozen module, at most")
    result_chars: int = setting(400, "characters of a tool result in the memory; longer ones are cut in the middle")
    tools: list[str] = setting(list(TOOLS), f"tools on offer, in this order; there are also {', '.join(WEB_TOOLS)}")
    web_cache: str = setting("web_cache", "folder where the web tools store what they fetched; empty: nowhere")
    web_frozen: bool = setting(False, "the web tools answer from web_cache alone; what it lacks stops the run")
    web_summary: bool = setting(False, "a frozen module sums up the passages that the web tools find")
    web_private: bool = setting(False, "Web_Search may open private and loopback addresses")
    seed: int = setting(0, "seed of the sampling")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    output: str = setting("eval.json", "file for the figures; empty: none")


def evaluate(
    system: AgentSystem,
    examples: list[Example],
    temperature: float,
    seed: tuple,
    label: str = "evaluating",
    keep: list[tuple[Example, Trajectory]] | None = None,
) -> dict:
    """One trajectory for each question -> accuracy with its interval, by family, and how it was reached.

    Every question counts: one that crashed is wrong, and is counted under `crashed` as well. A list given as `keep` is
    filled with the trajectories, their rewards set.
    """
    with tqdm(total=len(examples), desc=label, unit="question", leave=False) as bar:
        questions = [example.question for example in examples]
        groups = system.rollout(questions, 1, temperature, seed, on_done=bar.update, keep_crashed=True)
    trajectories = [group[0] for group in groups]
    pairs = list(zip(examples, trajectories))
    rewards = [0.0 if t.crash else RULES[e.kind](e.question, e.answer, t.answer) for e, t in pairs]
    for trajectory, reward in zip(trajectories, rewards):
        trajectory.reward = reward
    if keep is not None:
        keep += pairs
    by_family = {}
    for family in sorted({example.family for example in examples}):
        hits = [reward for reward, example in zip(rewards, examples) if example.family == family]
        by_family[family] = accuracy(hits)
    return {**accuracy(rewards), "by_family": by_family, **behaviour(trajectories, system.tools)}


def accuracy(rewards: list[float]) -> dict[str, Any]:
    n = len(rewards)
    return {"accuracy": sum(rewards) / n, "interval": wilson(sum(rewards), n), "n": n}


def behaviour(trajectories: list[Trajectory], offered: Iterable[str] = TOOLS) -> dict[str, Any]:
    """How the planner worked: turns, tools (share of turns), and turns that ended in a mistake of the model."""
    steps = [step for trajectory in trajectories for step in trajectory.memory.steps]
    tools, errors = Counter(step.tool for step in steps), Counter(step.error for step in steps if step.error)
    total = max(1, len(steps))
    return {
        "turns": len(steps) / len(trajectories),
        "tool_shares": {tool: tools[tool] / total for tool in offered},
        "tool_error_rate": sum(errors.values()) / total,
        "format_error_rate": errors["format"] / total,
        "crashed": sum(bool(trajectory.crash) for trajectory in trajectories),
    }


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson score): right for small n and for shares near 0 and 1 too."""
    share, square = hits / n, z * z / n
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def table(results: dict[str, dict]) -> str:
    """The results side by side, one row a figure."""
    first = next(iter(results.values()))

    def share(value: float, interval: tuple[float, float] | None = None) -> str:
        text = f"{100 * value:5.1f} %"
        return text + (f"  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")

    rows = [("", *results)]
    rows += [(f"accuracy (n = {first['n']})", *(share(r["accuracy"], r["interval"]) for r in results.values()))]
    for family, figures in first["by_family"].items():
        cells = (
            share(r["by_family"][family]["accuracy"], r["by_family"][family]["interval"]) for r in results.values()
        )
        rows.append((f"  {family} (n = {figures['n']})", *cells))
    rows.append(("turns a question", *(f"{r['turns']:5.2f}" for r in results.values())))
    rows += [(f"  {tool}", *(share(r["tool_shares"][tool]) for r in results.values())) for tool in first["tool_shares"]]
    rows.append(("turns with an error", *(share(r["tool_error_rate"]) for r in results.values())))
    if any(r["crashed"] for r in results.values()):
        rows.append(("crashed questions", *(str(r["crashed"]) for r in results.values())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def planner_folder(path: str) -> str:
    """A run's checkpoint where `path` is a run folder, else `path` itself."""
    checkpoint = Path(path) / "checkpoint"
    return str(checkpoint) if checkpoint.is_dir() else path


def main(config: EvalConfig) -> None:
    web = Web(config.web_cache, config.web_frozen, config.web_summary, config.web_private)
    tools = select_tools(config.tools, web)
    device = best_device(config.device)
    examples = load_examples(config.task, config.split)[: config.questions or None]
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {config.dtype}: must be auto, float32 or bfloat16")
    bfloat16 = config.dtype == "bfloat16" or config.dtype == "auto" and device.startswith("cuda")
    dtype, vllm = torch.bfloat16 if bfloat16 else torch.float32, dict(memory_share=config.engine_memory)
    frozen = open_engine(config.engine, config.frozen_model, device, dtype, **vllm)
    sandbox, corpus = Sandbox(), load_corpus(config.corpus)
    print(sandbox.describe())
    limits = (config.max_turns, config.max_planner_tokens, config.max_frozen_tokens, config.result_chars)
    results = {}
    for path in config.planners:
        planner = open_engine(config.engine, planner_folder(path), device, dtype, config.tokenizer, **vllm)
        system = AgentSystem(planner, frozen, corpus, sandbox, *limits, tools, web)
        results[path] = evaluate(system, examples, config.temperature, (config.seed, "eval"), label=path)
    print(table(results))
    if config.output:
        Path(config.output).write_text(json.dumps({"config": asdict(config), "results": results}, indent=2))
        print(f"figures: {config.output}")


if __name__ == "__main__":
    run_main(main, EvalConfig)
