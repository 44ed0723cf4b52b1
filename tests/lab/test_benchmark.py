"""Several planners on several tasks: answers that are kept, trials and their interval, the table."""

import gc
import importlib
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
from test_eval import BACKBONE, PLANNER, Scripted
from test_http import serve

import eval as evaluation
from agent import AgentSystem
from lab import benchmark
from lab.benchmark import BARE_PROMPT, BenchmarkConfig, depends_on, interval, table_of_tasks
from llm import EngineError, open_engine
from tools import TOOLS, UserError
from train import Config


def run(output, **changes):
    """The figures of `python -m lab.benchmark`, {planner: {task: ...}}."""
    benchmark.main(BenchmarkConfig(**({"planners": [PLANNER], "questions": 6, "output": str(output)} | changes)))
    return json.loads(output.read_text())["results"]


@pytest.fixture
def asked(monkeypatch):
    """The (question, seed) of each job that is really worked on."""
    jobs, run_one = [], AgentSystem.run

    def counted(self, question, seed, *where):
        jobs.append((question, seed))
        return run_one(self, question, seed, *where)

    monkeypatch.setattr(AgentSystem, "run", counted)
    return jobs


@pytest.fixture
def sums(tmp_path):
    """Two small tasks, of 4 and 2 questions."""
    folders = []
    for name, count in (("sums", 4), ("more", 2)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(1, count + 1)]
        (folders[-1] / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return list(map(str, folders))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def doubles(prompt):
    """Right in the first three sums."""
    number = int(re.search(r"What is (\d+)", prompt)[1])
    return f"It doubles.\n<answer>{2 * number if number < 4 else 'many'}</answer>"


# --- trials and their interval ----------------------------------------------------------------------------------------


def test_interval_worked_example():
    """Means 1, 1/2, 0, 1 of 4 questions: p = 5/8, their variance 11/64, that of p 11/256. One answer has 15/64, so the
    8 are worth 15/64 * 256/11 = 60/11 of them, more than 4."""
    n = 60 / 11
    low, high = interval([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    for end in (low, high):  # the Wilson interval ends where |p - end| is 1.96 standard errors of that end
        assert (5 / 8 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n)
    assert low < 5 / 8 < high


def test_interval_is_wilsons_with_one_trial_and_between_n_and_nt():
    for hits in range(11):
        assert interval([[1.0]] * hits + [[0.0]] * (10 - hits)) == pytest.approx(evaluation.wilson(hits, 10))
    assert interval([[1.0] * 3] * 5 + [[0.0] * 3] * 5) == pytest.approx(evaluation.wilson(5, 10))  # nothing new
    assert interval([[1.0, 0.0]] * 10) == pytest.approx(evaluation.wilson(10, 20))  # questions that are all alike
    assert interval([[1.0] * 3] * 10) == pytest.approx(evaluation.wilson(10, 10))  # which of both is it?
    assert interval([[1.0, 0.0]]) == pytest.approx(evaluation.wilson(0.5, 1))  # one question does not tell either


def test_interval_covers():
    """95 % of the intervals hold the accuracy that 40 questions of any difficulty are drawn from; not so if 3 trials
    of a question counted as 3 questions."""
    draw, right, naive = random.Random(0), 0, 0
    for _ in range(1000):
        rewards = []
        for _ in range(40):
            difficulty = draw.betavariate(0.4, 0.6)
            rewards.append([float(draw.random() < difficulty) for _ in range(3)])
        low, high = interval(rewards)
        right += low <= 0.4 <= high
        low, high = evaluation.wilson(sum(map(sum, rewards)), 120)
        naive += low <= 0.4 <= high
    assert 0.93 <= right / 1000 <= 0.97 and naive / 1000 < 0.88


def test_trials_differ_and_repeat(tmp_path):
    """The first is the answer of eval.py, and the batches do not matter."""
    evaluation.main(evaluation.EvalConfig(questions=6, max_turns=2, output=str(tmp_path / "eval.json")))
    plain = json.loads((tmp_path / "eval.json").read_text())["results"][PLANNER]
    one = run(tmp_path / "one.json", max_turns=2)[PLANNER]["tinyworld"]
    assert one["interval"] == pytest.approx(plain["interval"])
    assert [one[name] == plain[name] for name in ("accuracy", "n", "turns", "tool_shares", "tokens")] == [True] * 5
    three, again = (run(tmp_path / f"{name}.json", trials=3, in_flight=5, max_turns=2) for name in ("three", "again"))
    assert three == again and three[PLANNER]["tinyworld"]["trials"] == 3
    texts = {}
    for name in ("one", "three"):
        for row in rows_of(tmp_path / f"{name}.answers.jsonl"):
            texts.setdefault((name, row["trial"]), {})[row["number"]] = (row["answer"], row["steps"])
    first, second, third = (texts["three", trial] for trial in range(3))
    assert texts["one", 0] == first != second != third != first


# --- an evaluation that was stopped -----------------------------------------------------------------------------------


def test_resume_after_a_kill(tmp_path, asked, capsys):
    """Killed while it works, and the file cut off within a line: the same figures, and no finished question again."""
    flags = {"questions": 6, "in_flight": 3, "trials": 2, "max_turns": 2}
    output = tmp_path / "eval.json"
    answers = output.with_suffix(".answers.jsonl")
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "lab.benchmark", "--planners", PLANNER, "--output", str(output), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not answers.exists() or answers.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    answers.write_bytes(answers.read_bytes()[:-20])
    before = answers.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    kept = {(row["number"], row["trial"]) for row in map(json.loads, whole.splitlines())}
    assert 3 <= len(kept) < 12 and not output.exists()
    resumed = run(output, **flags)
    assert answers.read_bytes().startswith(whole)
    assert {seed[2:] for _, seed in asked} == {(n, t) for n in range(6) for t in range(2)} - kept
    assert f"{len(kept)} of 12 answers are in" in capsys.readouterr().out
    assert resumed == run(tmp_path / "whole.json", **flags)
    asked.clear()
    assert run(output, **flags) == resumed and not asked


def test_a_fault_of_the_machine_stops_and_the_rest_is_asked_later(tmp_path, sums, asked):
    with serve(Scripted(doubles), faults=[None, None, 404]) as (url, _):
        flags = dict(planners=[f"bare:{url}#backbone"], tasks=sums[:1], in_flight=1)
        with pytest.raises(EngineError):
            run(tmp_path / "eval.json", **flags)
        assert len(rows_of(tmp_path / "eval.answers.jsonl")) == 2 and not (tmp_path / "eval.json").exists()
        asked.clear()
        results = run(tmp_path / "eval.json", **flags)
    assert results[flags["planners"][0]][sums[0]]["accuracy"] == 3 / 4 and len(asked) == 2


def test_only_what_is_missing_is_asked(tmp_path, asked):
    """Another trial or question is added; what changes the answers asks all again."""
    output = tmp_path / "eval.json"

    def count(**changes):
        asked.clear()
        run(output, **{"max_turns": 1} | changes)
        return len(asked)

    assert count(questions=3) == 3 and count(questions=4) == 1 and count(questions=4, trials=2) == 4
    assert count(questions=4, temperature=0.5) == 4 and count(questions=4, max_turns=2) == 4
    model = tmp_path / "model"
    shutil.copytree(BACKBONE, model)
    assert count(planners=[str(model)]) == 6 and count(planners=[str(model)]) == 0
    os.utime(model / "model.safetensors", (1, 1))  # trained again
    assert count(planners=[str(model)]) == 6
    assert count(planners=[f"bare:{model}"]) == 6
    output.unlink()
    assert count(questions=4) == 0


def test_answers_depend_on_code_but_not_on_comments(tmp_path, monkeypatch):
    source = 'async def Echo(env, query: str) -> str:\n    """Echoes."""\n    return query\n'
    file = tmp_path / "echo_tool.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def digest(text):
        file.write_text(text)
        module = importlib.reload(importlib.import_module("echo_tool"))
        system = AgentSystem(None, None, None, None, tools={"Echo": module.Echo})
        return depends_on(BenchmarkConfig(), system, PLANNER, "tinyworld")

    assert digest(source) == digest(f"# a comment\n{source}") != digest(source.replace("Echoes", "Repeats"))
    assert digest(source) != depends_on(BenchmarkConfig(), AgentSystem(*[None] * 4, tools=TOOLS), PLANNER, "tinyworld")
    modules = {inspect.getmodule(part).__name__ for part in benchmark.CODE}
    assert modules == {"agent", "llm", "tools", "sandbox", "tasks", "tinyworld.world"}


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "eval.answers.jsonl"
    path.write_text("notes\nwithout an end")
    with pytest.raises(UserError, match="eval.answers.jsonl is no file of answers"):
        run(tmp_path / "eval.json")
    assert path.read_text() == "notes\nwithout an end"


# --- planners ---------------------------------------------------------------------------------------------------------


def test_equal_weights_are_loaded_once_and_the_last_planner_is_freed(tmp_path, monkeypatch):
    opened, alive = [], []

    def tracked(kind, model, *where, **options):
        alive.append([path for path, model in opened if model() is not None])
        engine = open_engine(kind, model, *where, **options)
        opened.append((model, weakref.ref(engine.model)))
        return engine

    monkeypatch.setattr(benchmark, "open_engine", tracked)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    for copy in (one, two):
        shutil.copytree(BACKBONE, copy)
    gc.disable()  # so that nothing is freed by chance
    try:
        run(tmp_path / "eval.json", planners=[f"bare:{PLANNER}", PLANNER, f"bare:{one}", one, two], questions=1)
    finally:
        gc.enable()
    assert [path for path, _ in opened] == [PLANNER, one, two]
    assert alive == [[], [PLANNER], [PLANNER]]
    opened.clear()
    run(tmp_path / "alone.json", planners=[f"bare:{one}"], questions=1)  # no frozen modules
    assert [path for path, _ in opened] == [one]


def test_a_run_that_was_trained_otherwise_is_named(tmp_path, capsys):
    shutil.copytree(BACKBONE, tmp_path / "run" / "checkpoint")
    trained = asdict(
        Config(model="Qwen/Qwen2.5-0.5B-Instruct", max_turns=3, temperature=0.5, tools=["Search", "Python_Coder"])
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps(trained))
    run(tmp_path / "eval.json", planners=[str(tmp_path / "run")], questions=1)
    flags = "--frozen_model Qwen/Qwen2.5-0.5B-Instruct --tools Search Python_Coder --temperature 0.5 --max_turns 3"
    assert f"was trained with {flags}; here" in capsys.readouterr().out
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is damaged"):
        run(tmp_path / "eval.json", planners=[str(tmp_path / "run")], questions=1)
    run(tmp_path / "eval.json", questions=1)
    assert "was trained" not in capsys.readouterr().out


def test_several_tasks_and_the_bare_model(tmp_path, sums, capsys, asked):
    with serve(Scripted(doubles)) as (url, seen):
        planners = [f"bare:{url}#backbone", f"bare:{PLANNER}", PLANNER]
        tools = ["Base_Generator", "Python_Coder"]  # these tasks have no articles
        results = run(tmp_path / "eval.json", planners=planners, tasks=sums, tools=tools, max_turns=2)
        assert sorted(body["messages"][0]["content"] for _, body, _ in seen) == sorted(
            BARE_PROMPT.format(question=question) for question, _ in asked[:6]
        )
    bare = results[planners[0]]
    assert [bare[task]["accuracy"] for task in sums] == [3 / 4, 1.0]
    assert bare[sums[0]]["turns"] == 0 and bare[sums[0]]["tokens"] == {
        "planner_read": 3, "planner_written": 2, "frozen_read": 0, "frozen_written": 0
    }  # fmt: skip
    turns = [results[PLANNER][task]["turns"] for task in sums]
    assert all(1 <= mean <= 2 for mean in turns) and results[PLANNER][sums[0]]["tokens"]["frozen_read"] > 0
    assert all(row["analysis"].startswith("It doubles.") for row in rows_of(tmp_path / "eval.answers.jsonl")[:6])
    lines = capsys.readouterr().out.splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("accuracy"))
    assert re.split(r"\s{2,}", lines[top]) == ["accuracy", "sums (n = 4)", "more (n = 2)", "average"]
    assert lines[top + 1].split() == [planners[0], *"75.0 % [30.1, 95.4] 100.0 % [34.2, 100.0] 87.5 %".split()]
    assert lines[top + 4] == "turns per question" and lines[top + 5].split() == [planners[0], "-", "-", "-"]
    assert lines[top + 7].split() == [PLANNER, *(f"{mean:.2f}" for mean in (*turns, sum(turns) / 2))]
    assert "tokens per question, frozen_read" in lines


def test_tasks_are_named_by_what_tells_them_apart():
    figures = {"accuracy": 0.5, "interval": (0.1, 0.9), "n": 4, "trials": 3, "turns": 1.0, "tool_shares": {}}
    figures |= {"tool_error_rate": 0.0, "tokens": {}}
    names = ["a/x", "b/x", "data/y"]
    first, *_ = table_of_tasks({"planner": dict.fromkeys(names, figures)}).splitlines()
    assert re.split(r"\s{2,}", first)[1:4] == [f"{name} (n = 4, 3 trials)" for name in ("a/x", "b/x", "y")]


# --- another judge ----------------------------------------------------------------------------------------------------


def verdict(prompt):
    case = json.loads(prompt.split("\n\n")[1])
    return json.dumps({"analysis": "read", "correct": case["prediction"] == "many"})


def test_a_judge_is_named_by_reward_and_a_dead_one_loses_no_answer(tmp_path, sums, asked, monkeypatch):
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path / "verdicts.jsonl"))
    output = tmp_path / "eval.json"
    with serve(Scripted(doubles)) as (planner, _):
        flags = dict(planners=[f"bare:{planner}#backbone"], tasks=sums[:1], tools=["Base_Generator"])
        (rules,) = run(output, **flags)[flags["planners"][0]].values()
        asked.clear()
        flags["reward"] = "lab.judge_llm.reward"
        with serve(Scripted(verdict), always=404) as (url, _):
            monkeypatch.setenv("JUDGE_MODEL", f"{url}#backbone")
            with pytest.raises(EngineError):
                run(output, **flags)
        with serve(Scripted(verdict)) as (url, seen):
            monkeypatch.setenv("JUDGE_MODEL", f"{url}#backbone")
            (judged,) = run(output, **flags)[flags["planners"][0]].values()
    assert rules["accuracy"] == 3 / 4 and judged["accuracy"] == 1.0
    assert not asked and len(seen) == 1  # the answers are those of before; one is no sum by the rules


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, line",
    [
        ("--trials 0", "--trials 0 is out of range: "),
        ("--in_flight 0", "--in_flight 0 is out of range: "),
        ("--engine_memory nan", "--engine_memory nan is out of range: "),
        ("--questions -1", "--questions -1 is out of range: "),
        ("--trials 3 --temperature 0", "--trials 3 at --temperature 0 are all the same: sample, or take one trial"),
        ("--tasks tinyworld nonsense", "--task nonsense: there is no nonsense/test.jsonl"),
        ("--planners bare:./nonsense", "cannot load a model from ./nonsense"),
        ("--reward nonsense", "there is no nonsense "),
        ("--output file/eval.json", "[Errno 17] File exists: 'file'"),
        ("--output .", "--output . is a folder: name a file"),
        ("--output taken.json", "[Errno 21] Is a directory: 'taken.answers.jsonl'"),
        ("--output full.json --questions 1", "[Errno 28] No space left on device"),
        ("--tasks empty", "empty/test.jsonl holds no questions"),
        ("--tasks file", "--task file: there is no file/test.jsonl"),
        ("--planners run", "run/config.json is damaged (JSONDecodeError("),
        ("--nonsense 1", "unknown: --nonsense 1; --help lists every flag"),
    ],
)
def test_bad_input_is_one_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("taken.answers.jsonl", "empty", "run/checkpoint"):
        Path(folder).mkdir(parents=True)
    for file in ("file", "empty/test.jsonl", "run/config.json"):
        Path(file).write_text("")
    Path("full.json").symlink_to("/dev/full")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--planners", f"bare:{BACKBONE}", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        evaluation.run_main(benchmark.main, BenchmarkConfig)
    assert stopped.value.code == 2
    (last,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "it/s" not in line]  # bars
    assert last.startswith(f"benchmark.py: {line}")
