"""Intervals, tables, the command line, and evaluations on the bundled backbone."""

import json
import random
import re
import shutil
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_http import serve

import eval as evaluation
from agent import AgentSystem, Memory, Step, Trajectory, Turn
from eval import EvalConfig, accuracy, behaviour, evaluate, run_main, setting, summary, table, wilson
from lab.teacher import IdealPlanner
from llm import Completion, EngineError, TransformersEngine, open_engine
from sandbox import Sandbox
from tasks import Example, load_corpus, load_examples
from tinyworld.world import World
from tools import UserError

BACKBONE = Path(__file__).parent.parent / "tinyworld" / "backbone"
PLANNER = "tinyworld/backbone"


class Scripted:
    """A model behind a server: `answer(prompt)` is what it writes."""

    def __init__(self, answer):
        self.encode, self.answer = str, answer

    def generate_batch(self, requests):
        texts = [self.answer(request.prompt_ids) for request in requests]
        return [Completion([1, 2, 3], [4, 5], [], text, "stop", (3, 2)) for text in texts]


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(BACKBONE)


def system_of(planner, frozen, **changes):
    return AgentSystem(planner, frozen, load_corpus("tinyworld"), Sandbox(), **changes)


def spread(examples, count):
    return examples[:: len(examples) // count][:count]


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (90, 100, 0.8256, 0.9448)],
)
def test_wilson(hits, n, low, high):
    """Values of the Wilson score interval as printed in textbooks."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def trajectory(reward=0.0, steps=(), truncated=False, **tokens):
    turns = [Turn([1], [2], [0.0], truncated) for _ in steps]
    return Trajectory("q", turns, Memory("q", steps=list(steps)), "", reward, tokens=evaluation.Counter(tokens))


def test_accuracy_is_over_questions():
    """Trials of a question resemble each other: 4 questions stay 4, however often they are asked."""
    groups = [[trajectory(r) for r in rewards] for rewards in ([1, 1], [1, 0], [0, 0], [1, 1])]
    assert accuracy(groups) == {"accuracy": 5 / 8, "interval": wilson(2.5, 4), "n": 4}


def test_accuracy_covers():
    """At least 95 % of the intervals hold the accuracy that questions of any difficulty are drawn from."""
    draw, right = random.Random(0), 0
    for _ in range(500):
        groups = []
        for _ in range(40):
            difficulty = draw.betavariate(0.4, 0.6)
            groups.append([trajectory(float(draw.random() < difficulty)) for _ in range(3)])
        low, high = accuracy(groups)["interval"]
        right += low <= 0.4 <= high
    assert right / 500 >= 0.95


def test_summary_and_table():
    """Two questions of two families, two trials each; all figures counted by hand."""
    search, error = Step("g", "Search", "", ""), Step("g", "Search", "", "", error="run")
    nonsense = Step("none", "none", "none", "", error="format")
    easy = [trajectory(1.0, [search], planner_read=10)] * 2
    hard = [trajectory(1.0, [search], planner_read=10, frozen_read=4)]
    hard.append(trajectory(0.0, [error, nonsense], planner_read=20))
    examples = [Example("q", "a", "hard"), Example("q", "a", "easy")]
    figures = summary(examples, [hard, easy], ["Search", "Python_Coder"])
    assert figures["accuracy"] == 3 / 4 and figures["n"] == 2 and figures["trials"] == 2
    assert {family: f["accuracy"] for family, f in figures["by_family"].items()} == {"easy": 1.0, "hard": 0.5}
    assert figures["turns"] == 5 / 4 and figures["tool_shares"] == {"Search": 4 / 5, "Python_Coder": 0.0}
    assert figures["tool_error_rate"] == 2 / 5 and figures["format_error_rate"] == 1 / 5
    assert figures["tokens"] == {"planner_read": 50 / 4, "frozen_read": 1.0}
    other = summary(examples, [[trajectory(0.0, [search])]] * 2, ["Search", "Python_Coder"])
    lines = table({"one": figures, "two": other}).splitlines()
    cells = {line.split("  ")[0] or line.strip().split("  ")[0]: re.split(r"\s{2,}", line.strip()) for line in lines}
    assert lines[0].split() == ["one", "two"]
    assert cells["accuracy (n = 2)"][1::2] == ["75.0 %", "0.0 %"]
    assert cells["easy (n = 1)"][1::2] == ["100.0 %", "0.0 %"]
    assert cells["turns per question"][1:] == ["1.25", "1.00"] and cells["Search"][1:] == ["80.0 %", "100.0 %"]
    assert cells["turns with an error"][1:] == ["40.0 %", "0.0 %"]
    assert cells["tokens per question, planner_read"][1:] == ["12", "-"]


def test_truncated_turns():
    steps = [Step("g", "Search", "", "")] * 2
    assert behaviour([trajectory(0.0, steps, truncated=True), trajectory(0.0, steps)], [])["truncated_turns"] == 1 / 2


# --- evaluations ------------------------------------------------------------------------------------------------------


def test_the_frozen_modules_are_not_the_ceiling(engine):
    """With ideal plans they answer nearly everything (the README has the figure on the whole test split)."""
    examples = spread(load_examples("tinyworld", "test"), 72)
    planner = IdealPlanner(World(0).questions("test"), World(0))
    result, _ = evaluate(system_of(planner, engine, temperature=0.0), examples, ("test",))
    assert result["accuracy"] >= 0.95 and result["tool_error_rate"] <= 0.02


def test_the_untrained_planner_is_well_formed_and_clumsy(engine):
    examples = spread(load_examples("tinyworld", "test"), 48)
    sampled, _ = evaluate(system_of(engine, engine), examples, ("test",))
    greedy, _ = evaluate(system_of(engine, engine, temperature=0.0), examples, ("test",))
    assert 0.02 <= sampled["accuracy"] <= 0.33 and greedy["accuracy"] <= sampled["accuracy"]
    assert sampled["format_error_rate"] <= 0.05 and sampled["tool_error_rate"] <= 0.1


def test_a_plan_that_reaches_the_token_limit_is_marked(engine):
    for limit, truncated in ((3, True), (64, False)):
        system = system_of(engine, engine, max_turns=1, max_tokens=limit)
        [[found]] = system.rollout([load_examples("tinyworld", "dev")[0].question], 1, ("test",))
        assert [turn.truncated for turn in found.turns] == [truncated]


def test_a_fault_of_the_machine_stops_the_evaluation(engine):
    system = system_of(IdealPlanner(World(0).questions("dev"), World(0)), engine)
    system.corpus.connection.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        evaluate(system, load_examples("tinyworld", "dev")[:8], ("test",))


def test_rollouts_repeat_and_differ_within_a_group(engine):
    system = system_of(engine, engine, max_turns=2)
    questions = [e.question for e in load_examples("tinyworld", "dev")[:3]]
    first, second = (system.rollout(questions, 4, (0, 1)) for _ in range(2))
    results = [
        [step.result for group in groups for t in group for step in t.memory.steps] for groups in (first, second)
    ]
    assert results[0] == results[1]  # a program that ran into its time limit shows here
    assert first == second
    assert len({str(t.turns[0].completion_ids) for t in first[0]}) > 1
    assert system.rollout(questions, 4, (0, 2)) != first


def test_trials_and_tokens(engine):
    examples = load_examples("tinyworld", "dev")[:4]
    figures, pairs = evaluate(system_of(engine, engine), examples, ("test",), trials=2)
    assert [example for example, _ in pairs] == [example for example in examples for _ in range(2)]
    assert figures["n"] == 4 and figures["trials"] == 2
    assert figures["accuracy"] == sum(t.reward for _, t in pairs) / 8
    turns, tokens = [turn for _, t in pairs for turn in t.turns], figures["tokens"]
    assert tokens["planner_read"] == sum(len(turn.prompt_ids) for turn in turns) / 8
    assert tokens["planner_written"] == sum(len(turn.completion_ids) for turn in turns) / 8
    assert tokens["frozen_read"] > tokens["frozen_written"] > 0


# --- the command ------------------------------------------------------------------------------------------------------


def run(output, **changes):
    """The figures of `python eval.py`, {planner: ...}."""
    evaluation.main(EvalConfig(**({"questions": 6, "output": str(output)} | changes)))
    return json.loads(output.read_text())["results"]


def test_eval_side_by_side(tmp_path, capsys):
    figures = run(tmp_path / "eval.json", planners=[PLANNER, f"{PLANNER}/"])
    out = capsys.readouterr().out
    assert "accuracy (n = 6)" in out and "Base_Generator" in out and out.count(PLANNER) >= 2
    assert out.endswith(f"figures: {tmp_path / 'eval.json'}\n") and "sandbox: " in out
    keys = {"accuracy", "interval", "by_family", "tool_shares"}
    assert len(figures) == 2 and keys <= set(figures[PLANNER]) and figures[PLANNER] == figures[f"{PLANNER}/"]
    assert json.loads((tmp_path / "eval.json").read_text())["config"]["questions"] == 6


def test_without_output_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation.main(EvalConfig(planners=[str(BACKBONE)], frozen_model=str(BACKBONE), questions=1, output=""))
    assert not list(tmp_path.iterdir())


def test_equal_weights_are_loaded_once(tmp_path, monkeypatch):
    """A run folder stands for its checkpoint."""
    opened = []
    monkeypatch.setattr(evaluation, "open_engine", lambda *a, **k: opened.append(a[1]) or open_engine(*a, **k))
    shutil.copytree(BACKBONE, tmp_path / "run" / "checkpoint")
    figures = run(tmp_path / "eval.json", planners=[PLANNER, str(tmp_path / "run")], questions=1)
    assert len(figures) == 2 and opened == [PLANNER, str(tmp_path / "run" / "checkpoint")]


def test_a_planner_behind_a_url(tmp_path):
    with serve(TransformersEngine(BACKBONE)) as (url, seen):
        (through,) = run(tmp_path / "eval.json", planners=[f"{url}#backbone"], questions=3).values()
        assert seen and all(path.endswith("/chat/completions") for path, *_ in seen)
    (direct,) = run(tmp_path / "direct.json", questions=3).values()
    assert through == direct  # a server of the same weights that takes the same seeds


def brief(examples, predictions, frozen):
    return [1 / (1 + len(prediction)) for prediction in predictions]


def test_a_reward_of_ones_own(tmp_path):
    figures = run(tmp_path / "eval.json", questions=2, reward="test_eval.brief", tools=["Base_Generator"])[PLANNER]
    assert 0 < figures["accuracy"] <= 1 and list(figures["tool_shares"]) == ["Base_Generator"]


# --- the command line of every script ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """`run_main` with these words on the command line -> (exit code, the lines it wrote to stderr)."""

    def call(words, main=evaluation.main):
        monkeypatch.setattr(sys, "argv", ["eval.py", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            run_main(main, EvalConfig)
        return stopped.value.code, capsys.readouterr().err.splitlines()

    return call


@pytest.mark.parametrize(
    "words, line",
    [
        ("--nonsense 1 --foo", "unknown: --nonsense 1 --foo; --help lists every flag"),
        ("--trials 0", "--trials 0 is out of range: answers per question (at least 1)"),
        ("--temperature nan", "--temperature nan is out of range"),
        ("--questions -1", "--questions -1 is out of range"),
        ("--task nonsense --tools Base_Generator", "--task nonsense: there is no nonsense/test.jsonl"),
        ("--planners ./nonsense", "cannot load a model from ./nonsense"),
        ("--planners http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 names no model"),
        ("--reward nonsense", "there is no nonsense"),
        ("--tools Search nonsense.Tool", "there is no nonsense.Tool"),
    ],
)
def test_bad_input_is_one_line(words, line, command):
    code, lines = command(f"--output= {words}")
    assert code == 2 and len(lines) == 1 and lines[0].startswith("eval.py: ") and line in lines[0]


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("try this"), 2, "eval.py: try this"),
        (OSError(28, "No space left on device"), 2, "eval.py: [Errno 28] No space left on device"),
        (ModuleNotFoundError("No module named 'vllm'"), 2, "eval.py: No module named 'vllm'; pip install -r "),
    ],
)
def test_what_goes_wrong_is_one_line(error, code, line, command):
    def main(config):
        raise error

    found, lines = command("", main)
    assert found == code and len(lines) == 1 and lines[0].startswith(line)


def test_ctrl_c_ends_a_script_without_a_traceback(command):
    def main(config):
        raise KeyboardInterrupt

    assert command("", main) == (130, [])


def test_a_fault_is_one_line_and_a_traceback_in_a_file(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def main(config):
        raise EngineError("the server is down")

    code, lines = command("", main)
    assert code == 1 and lines == ["eval.py: EngineError: the server is down; traceback.log says where"]
    assert "in main\n" in Path("traceback.log").read_text()


def test_settings_become_flags_in_groups(monkeypatch, capsys):
    @dataclass
    class Small:
        names: list[str] = setting(["a"], "names of things", group="first")
        count: int = setting(1, "number of things", low=1)
        share: float = setting(0.5, "part of things", group="second")

    seen = []
    monkeypatch.setattr(sys, "argv", "x.py --names b c --count 2".split())
    run_main(seen.append, Small)
    run_main(seen.append, Small)
    assert seen == [Small(["b", "c"], 2, 0.5)] * 2 and Small().names is not Small().names
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit):
        run_main(seen.append, Small)
    text = capsys.readouterr().out
    assert re.search(r"first:\n +--names.*--count.*second:\n +--share", text, re.DOTALL)
