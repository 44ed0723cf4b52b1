"""Ask one question and watch the system think. `python agent.py` comes here.

    python agent.py "Who is the president of the country of Vibel?"
    python agent.py "Who is the president of the country of Vibel?" --compare runs/tinyworld-seed0
    python agent.py --planner http://localhost:8000/v1#NAME      # no question: one per line, until Ctrl-D

Each line of the output is one module's work, printed as it happens, in the module's colour.
"""

import functools
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from agent import Planner, Trajectory, parse_answer, parse_verdict, solve
from eval import SystemConfig, open_system, planner_folder, run_main, setting
from llm import Completion, open_engine
from tools import ToolEnv
from train import visible

COLOURS = {"analyst": 35, "planner": 36, "executor": 33, "tool": 32, "verifier": 34, "generator": 31}  # ANSI codes


@dataclass
class AskConfig(SystemConfig):
    question: str = setting("", "question; empty: lines from the terminal. It may also come first, alone", group="ask")
    planner: str = setting("tinyworld/backbone", "planner: model folder, run folder, hub name or server URL#NAME")
    compare: str = setting("", "second planner, which answers the same question after the first")
    frozen_model: str = setting("tinyworld/backbone", "model of the frozen modules: folder, hub name or URL#NAME")


def main(config: AskConfig) -> None:
    system = replace(open_system(config), solve=watched)
    system.frozen = open_engine(config, config.frozen_model)
    planners = {}
    for name in filter(None, (config.planner, config.compare)):
        path = planner_folder(name)
        planners[name] = system.frozen if path == config.frozen_model else open_engine(config, path)
    for question in [config.question] if config.question else typed_questions():
        for name, engine in planners.items():
            print(f"\n{name}\n{visible(question)}")
            system.planner = engine
            system.rollout([question], 1, (config.seed, "ask"), "thinking")


def typed_questions() -> Iterator[str]:
    prompt = "\nquestion> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        if question:
            yield question


async def watched(question: str, planner: Planner, env: ToolEnv, *limits: int) -> Trajectory:
    """`agent.solve`, with a line for everything that a module writes."""
    started, turn, read, written = time.perf_counter(), 0, 0, 0

    async def watched_planner(prompt: str) -> Completion:
        nonlocal turn, read, written
        turn += 1
        before = time.perf_counter()
        action = await planner(prompt)
        read, written = read + action.usage[0], written + action.usage[1]
        cost = f"{time.perf_counter() - before:.1f} s, {action.usage[0]} tokens read, {action.usage[1]} written"
        show("planner", action.text, f"turn {turn}: {cost}")
        return action

    async def ask(role: str, prompt: str) -> str:
        text = await env.ask(role, prompt)
        if role in COLOURS:  # the tools' own model speaks through the tool's result
            show(role, text)
        return text

    def watch(tool: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
        @functools.wraps(tool)  # the prompts show name, signature and docstring
        async def watched_tool(env: ToolEnv, *args, **kwargs) -> str:
            result = await tool(env, *args, **kwargs)
            show("tool", f"{tool.__name__}: {result}")
            return result

        return watched_tool

    tools = {name: watch(tool) for name, tool in env.tools.items()}
    trajectory = await solve(question, watched_planner, replace(env, ask=ask, tools=tools), *limits)
    total = f"{turn} turns, {time.perf_counter() - started:.1f} s, {read} planner tokens read, {written} written"
    print(f"answer: {visible(trajectory.answer) or '(none)'}    {total}")
    return trajectory


def show(role: str, text: str, note: str = "") -> None:
    """One module's text, below its name. A verdict and an answer are shown as they were read."""
    heard = {"verifier": parse_verdict, "generator": parse_answer}
    if role in heard:
        note = f"read as {heard[role](text) or 'nothing'}"
    lines = [f"{role}  {visible(note)}".rstrip(), *visible(text.strip()).splitlines()]
    print(coloured("\n  ".join(lines), COLOURS[role]), flush=True)


def coloured(text: str, code: int) -> str:
    """In colour if the output is a terminal and NO_COLOR (no-color.org) is not set."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def run() -> None:
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--question")
    run_main(main, AskConfig)


if __name__ == "__main__":
    run()
