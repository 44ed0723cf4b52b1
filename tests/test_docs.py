"""The README and the pages it sends to are true: their commands run, their names exist, their files are there."""

import json
import re
import runpy
import shlex
import shutil
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
from eval import EvalConfig
from lab.bench import BenchConfig
from lab.benchmark import BenchmarkConfig
from lab.paired import PairedConfig
from lab.torchrun import ScaleConfig
from tasks import load_examples
from train import Config

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/course.md",
    "docs/fork.md",
    "docs/imitation.md",
    "docs/metrics.md",
    "docs/paper.md",
    "docs/scale.md",
    "docs/speedrun.md",
    "recipes/README.md",
    "tinyworld/README.md",
]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
FORK = TEXTS["docs/fork.md"]
SMALLER = {  # the same command on less work
    "train.py": "--steps 1 --questions_per_step 2 --group_size 2 --dev_questions 2 --test_questions 2 --max_turns 2",
    "eval.py": "--questions 2 --output ''",
    "lab.bench": "--in_flight 8 --alone 1 --repeats 1 --max_turns 2 --output ''",
    "lab.benchmark": "--questions 2",
}
RUN_ELSEWHERE = [  # by tests of their own, or they need a GPU, the network or minutes
    "python -m lab.course",
    "python -m lab.worlds",
    "python train.py --model models/",
    "python -m lab.exam",
    "python -m lab.pretrain",
    "python -m lab.paper",
    "python -m lab.prepare",
    "python -m lab.speedrun",
    "python -m lab.torchrun",
    "python -m lab.watch",
    "python train.py --engine vllm",
    "python -m lab.bench --shape",
    "python eval.py --task data/",
    "python eval.py --task tinyworld-hard",
]


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXTS[page].replace("\\\n", " "), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("python ")]  # not make, which CI runs, nor the recipes
    lines = [line for line in lines if "--serve" not in line]  # it would never end
    return [line for line in lines if not any(line.startswith(start) for start in RUN_ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "tinyworld").symlink_to(ROOT / "tinyworld")
    (folder / "MODEL").symlink_to(ROOT / "tinyworld" / "backbone")
    (folder / "my_folder").mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(11, 15)]
        (folder / "my_folder" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "articles.jsonl").write_text(json.dumps({"title": "Zilath", "text": "Zilath is a city."}))
    snippets = re.findall(r"```python\n(.*?)```", FORK, re.DOTALL)
    (folder / "my_tools.py").write_text(snippets[0])
    (folder / "my_reward.py").write_text(snippets[1] + snippets[2])
    return folder


def run(command: str, monkeypatch) -> None:
    """A script as the main program of this process, which has torch loaded already."""
    words = shlex.split(command.replace("path/to/model", "tinyworld/backbone"))
    assert words.pop(0) == "python", command
    module = words.pop(0) == "-m" and words[0]
    if not module:
        words.insert(0, command.split()[1])
    smaller = [] if "--help" in words else shlex.split(SMALLER.get(words[0], ""))
    monkeypatch.setattr(sys, "argv", words + smaller)
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        assert not end.code, command


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, folder, monkeypatch):
    """In the order of the page, each page in a folder without runs."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # train.py takes Ctrl-C over: it stays pytest's
    for command in commands(page):
        run(command, monkeypatch)


def test_the_snippets_of_the_forker(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    offered = tools.find_tools(["Search", "my_tools.Calendar"])
    assert "Tells the weekday of a date." in agent.toolbox(offered)
    row = re.search(r"```json\n(.*?)\n```", FORK)[1]
    (folder / "my_folder" / "test.jsonl").write_text(row)
    (example,) = load_examples("my_folder", "test")
    assert judge.rules([example] * 3, ["330", "165", "about 3 m"], None) == [1.0, 0.5, 0.0]
    short = tools.find("my_reward.short", {})
    assert short([example], ["330"], None) == [1.0 - 0.003]

    algorithm = re.findall(r"```python\n(.*?)```", FORK, re.DOTALL)[3]
    names = dict(vars(flow_grpo))
    exec("def group_advantages(rewards):\n" + textwrap.indent(algorithm, "    "), names)
    advantages = names["group_advantages"](torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]))


def test_make_commands_exist():
    for target in ("train", "test", "paper", "gpu", "test-gpu"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("page", PAGES)
def test_names_and_files_exist(page):
    text, modules = TEXTS[page], {"agent": agent, "flow_grpo": flow_grpo, "judge": judge, "tools": tools}
    for module, name in re.findall(r"`(agent|flow_grpo|judge|tools)\.(\w+)`", text):
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"
    links = [ROOT / page / ".." / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    for path in links:
        assert path.resolve().exists(), path
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|html|sh))`", text):
        made = ("report.html", "index.html", "findings.md")  # by a command
        made_by_users = Path(name).name.startswith("my_") or name in made
        assert made_by_users or (ROOT / name).exists() or (ROOT / page).with_name(name).exists(), name
    flags = set()
    for config in (Config, EvalConfig, BenchConfig, BenchmarkConfig, PairedConfig, ScaleConfig):
        flags |= set(config.__dataclass_fields__)
    for flag in re.findall(r"`[^`]*--(\w+)", text):
        others = "check first words layers share out help split plan figures index serve compare processes seeds"
        torchrun = ("nproc", "shutdown")
        assert flag in flags.union(others.split(), torchrun), flag


def test_nothing_is_left_to_fill_in():
    assert not [page for page, text in TEXTS.items() if "@@" in text]
