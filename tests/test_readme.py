"""The README is true: its commands run, its names exist, its files are there, and its figures are those of the runs."""

import asyncio
import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import agent
import flow_grpo
import judge
import tools
from bench import BenchConfig
from eval import EvalConfig
from train import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
TINY_RUN = "--steps 1 --questions_per_step 2 --group_size 2 --dev_questions 2 --test_questions 2 --max_turns 2"
SMALLER = {  # the same command on less work
    "train.py": TINY_RUN,
    "eval.py": "--questions 2 --output ''",
    "bench.py": "--in_flight 8 --alone 1 --repeats 1 --max_turns 2 --output ''",
}
RUN_ELSEWHERE = {
    "make train",
    "make test",
    "pytest",
    "make gpu",
    "make test-gpu",
    "make paper",
    "make paper QUICK=1",
    "python -m tinyworld.pretrain --check",
    "python bench.py --shape qwen2.5-1.5b --engine vllm",
    "recipes/0.5b-24gb.sh",
}  # CI, and tests of their own; a shape takes minutes and a GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "tinyworld").symlink_to(ROOT / "tinyworld")
    (folder / "my_folder").mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(11, 15)]
        (folder / "my_folder" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "articles.jsonl").write_text(json.dumps({"title": "Zilath", "text": "Zilath is a city."}))
    return folder


def test_commands_run(folder, monkeypatch, capsys):
    """Each script, in the README's order, as the main program of this process, which has torch loaded already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # train.py takes Ctrl-C over: it stays pytest's
    for command in COMMANDS:
        if command in RUN_ELSEWHERE:
            continue
        words = shlex.split(command.replace("path/to/model", "tinyworld/backbone"))
        assert words[0] == "python" and (ROOT / words[1]).is_file(), command
        if "--help" not in words:
            words += shlex.split(SMALLER.get(words[1], ""))
        monkeypatch.setattr(sys, "argv", words[1:])
        try:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{command}: {capsys.readouterr().err[-2000:]}"


def test_the_snippets_work():
    """Each in the file where the README says it goes."""
    tool, reward, algorithm = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = dict(vars(tools))
    exec(tool, names)
    env = tools.ToolEnv(None, None, None, names["TOOLS"])
    for day, result in (("2026-11-20", ("Friday", True)), ("soon", ("Error: 'soon' is not a date", False))):
        command = tools.parse_command(f'Calendar(day="{day}")', names["TOOLS"])
        assert asyncio.run(tools.run_tool(env, command)) == result
    assert "Tells the weekday of a date." in agent.toolbox(names["TOOLS"])

    names = dict(vars(judge))
    exec(reward, names)
    assert names["shorter_is_better"]("How many?", "12", "12") == 1 - 0.002

    names = dict(vars(flow_grpo))
    exec("def group_advantages(rewards):\n" + textwrap.indent(algorithm, "    "), names)
    advantages = names["group_advantages"](torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]))


def test_make_commands_exist():
    for target in ("train", "test", "paper", "gpu", "test-gpu"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_names_and_files_exist():
    modules = {"agent": agent, "flow_grpo": flow_grpo, "judge": judge, "tools": tools}
    names = re.findall(r"`(agent|flow_grpo|judge|tools)\.(\w+)`", README)
    assert len(names) > 8
    for module, name in names:
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|jsonl|md))`", README) + re.findall(r"\]\((\w+/[\w.]+)\)", README):
        made_by_a_run = path in ("metrics.jsonl", "verdicts.jsonl", "train.jsonl", "dev.jsonl", "test.jsonl")
        assert made_by_a_run or (ROOT / path).exists(), path
    for flag in re.findall(r"`--(\w+)", README):
        configs = (Config, EvalConfig, BenchConfig)
        assert any(flag in config.__dataclass_fields__ for config in configs) or flag in ("check", "mirror"), flag


def test_sizes():
    """The loop and its algorithm stay small enough to read in an hour, and no file outgrows its one idea."""
    lines = {path.stem: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert lines["agent"] + lines["flow_grpo"] + lines["judge"] <= 1000 and max(lines.values()) <= 730
    backbone = ROOT / "tinyworld" / "backbone"
    assert sum(file.stat().st_size for file in backbone.iterdir()) <= 6e6


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
