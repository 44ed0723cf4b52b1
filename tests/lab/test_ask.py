"""One question from the command line: every module's text as it comes, in colour only on a terminal."""

import io
import runpy
import sys
from pathlib import Path

import pytest

from agent import AgentSystem
from lab import ask
from lab.pretrain import BACKBONE
from lab.teacher import TEST_WORLD, IdealPlanner
from llm import TransformersEngine
from sandbox import Sandbox
from tasks import load_corpus
from tinyworld.world import World

ROOT = Path(__file__).parent.parent.parent
QUESTION = next(q for q in World(TEST_WORLD).questions("test") if q.family == "difference")


def test_the_trajectory_of_a_question(capsys):
    """An ideal planner's turns, to the right answer."""
    planner = IdealPlanner([QUESTION], World(TEST_WORLD))
    system = AgentSystem(planner, TransformersEngine(BACKBONE), load_corpus(), Sandbox(), solve=ask.watched)
    ((trajectory,),) = system.rollout([QUESTION.question], 1, (0,))
    out = capsys.readouterr().out
    assert trajectory.answer == QUESTION.answer and f"answer: {QUESTION.answer}    3 turns, " in out
    roles = [line.split()[0] for line in out.splitlines() if line[:1].isalpha()]
    turn = ["planner", "executor", "tool", "verifier"]
    assert roles == ["analyst", *turn * 3, "generator", "answer:"]
    assert [step.result in out for step in trajectory.memory.steps] == [True] * 3
    assert out.count("read as CONTINUE") == 2 and out.count("read as STOP") == 1
    assert "\x1b" not in out


def test_two_planners_and_questions_from_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION.question}\n\nWhat is 914 - 79?\n"))
    monkeypatch.setattr(sys, "argv", ["agent.py", "--compare", f"{BACKBONE}/../backbone", "--max_turns", "1"])
    ask.run()
    out = capsys.readouterr().out
    assert out.count(QUESTION.question) == 2 and out.count("\nanswer: ") == 4
    assert out.index("What is 914 - 79?") > out.rindex(QUESTION.question)


@pytest.mark.parametrize("terminal, no_color, expected", [(True, "", True), (True, "1", False), (False, "", False)])
def test_colours(monkeypatch, capsys, terminal, no_color, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    ask.show("planner", "Sub-Goal: \x1b[2J")
    out = capsys.readouterr().out
    assert out.startswith("\x1b[36mplanner") == expected and "\x1b[2J" not in out and "\\x1b[2J" in out


def test_the_command(monkeypatch, capsys):
    command = ["agent.py", "What is 914 - 79?", "--max_turns", "1"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "agent.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "What is 914 - 79?" in out and "planner  turn 1: " in out
    monkeypatch.setattr(sys, "argv", [*command, "--planer", "x"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "agent.py"), run_name="__main__")
    error = "agent.py: unknown: --planer x; --help lists every flag\n"
    assert (stopped.value.code, capsys.readouterr().err) == (2, error)
