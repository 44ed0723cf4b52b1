"""Intervals, tables, and evaluations on the bundled backbone."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_http import serve

import eval as evaluation
from agent import BARE_PROMPT, AgentSystem, Memory, Trajectory
from eval import EvalConfig, accuracy, behaviour, evaluate, interval, table, wilson
from judge_llm import open_judge, score
from llm import Completion, EngineError, TransformersEngine, UserError, open_engine
from tasks import Example, load_corpus, load_examples
from tinyworld.pretrain import BACKBONE, IdealPlanner
from tinyworld.world import World
from tools import Sandbox
from train import Config

PLANNER = str(BACKBONE)


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (90, 100, 0.8256, 0.9448)],
)
def test_wilson(hits, n, low, high):
    """Values of the Wilson score interval as printed in textbooks."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(BACKBONE)


def spread(examples, count):
    return examples[:: len(examples) // count][:count]


def test_the_frozen_modules_are_not_the_ceiling(engine):
    """With ideal plans they answer nearly everything (the README has the figure on the whole test split)."""
    examples = spread(load_examples("tinyworld", "test"), 72)
    planner = IdealPlanner(World(0).questions("test"), World(0))
    result = evaluate(AgentSystem(planner, engine, load_corpus(), Sandbox()), examples, 0.0, ("test",))
    assert result["accuracy"] >= 0.95 and result["tool_error_rate"] <= 0.02


def test_the_untrained_planner_is_well_formed_and_clumsy(engine):
    examples = spread(load_examples("tinyworld", "test"), 72)
    system = AgentSystem(engine, engine, load_corpus(), Sandbox())
    sampled, greedy = evaluate(system, examples, 1.0, ("test",)), evaluate(system, examples, 0.0, ("test",))
    assert 0.02 <= sampled["accuracy"] <= 0.33 and greedy["accuracy"] <= sampled["accuracy"]
    assert sampled["format_error_rate"] <= 0.05 and sampled["tool_error_rate"] <= 0.1


def test_a_plan_that_reaches_the_token_limit_is_marked(engine):
    for limit, truncated in ((3, True), (64, False)):
        system = AgentSystem(engine, engine, load_corpus(), Sandbox(), max_turns=1, max_planner_tokens=limit)
        [[trajectory]] = system.rollout([load_examples("tinyworld", "dev")[0].question], 1, 1.0, ("test",))
        assert [turn.truncated for turn in trajectory.turns] == [truncated]


def test_crashed_questions_are_counted(engine):
    examples = load_examples("tinyworld", "dev")[:6]

    class BrokenCorpus:
        def search(self, query, k=1):
            raise OSError("disk on fire")

    planner = IdealPlanner(World(0).questions("dev"), World(0))
    result = evaluate(AgentSystem(planner, engine, BrokenCorpus(), Sandbox()), examples, 0.0, ("test",))
    searches = sum(example.family != "arithmetic" for example in examples)
    assert result["n"] == 6 and result["crashed"] == searches > 0
    assert round(6 * result["accuracy"]) <= 6 - searches
    assert "crashed questions" in table({"broken": result})


def test_training_does_not_hide_a_crash(engine):
    class BrokenCorpus:
        def search(self, query, k=1):
            raise OSError("disk on fire")

    system = AgentSystem(IdealPlanner(World(0).questions("dev"), World(0)), engine, BrokenCorpus(), Sandbox())
    with pytest.raises(OSError, match="disk on fire"):
        system.rollout([e.question for e in load_examples("tinyworld", "dev")[:6]], 1, 1.0, ("test",))


def test_rollouts_repeat_and_differ_within_a_group(engine):
    system = AgentSystem(engine, engine, load_corpus(), Sandbox())
    questions = [e.question for e in load_examples("tinyworld", "dev")[:3]]
    first, second = (system.rollout(questions, 4, 1.0, (0, 1)) for _ in range(2))
    assert first == second
    assert len({str(t.turns[0].completion_ids) for t in first[0]}) > 1
    assert system.rollout(questions, 4, 1.0, (0, 2)) != first
    assert behaviour(first[0])["turns"] <= 4


def run(output, **changes):
    """The figures of `python eval.py`, {planner: {task: ...}}."""
    evaluation.main(EvalConfig(**({"planners": [PLANNER], "questions": 6, "output": str(output)} | changes)))
    return json.loads(output.read_text())["results"]


@pytest.fixture
def asked(monkeypatch):
    """The (question, seed) of each job that is really worked on."""
    jobs, solve_all = [], AgentSystem.solve_all
    monkeypatch.setattr(
        AgentSystem, "solve_all", lambda self, new, *a, **k: jobs.extend(new) or solve_all(self, new, *a, **k)
    )
    return jobs


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_side_by_side(tmp_path, capsys):
    figures = run(tmp_path / "eval.json", planners=[PLANNER, f"{PLANNER}/"])
    out = capsys.readouterr().out
    assert "accuracy (n = 6)" in out and "Base_Generator" in out and out.count(PLANNER) >= 2
    keys = {"accuracy", "interval", "by_family", "tool_shares"}
    assert len(figures) == 2 and keys <= set(figures[PLANNER]["tinyworld"])


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
    with pytest.raises(UserError, match="config.json is damaged or missing"):
        run(tmp_path / "eval.json", planners=[str(tmp_path / "run")], questions=1)
    run(tmp_path / "eval.json", questions=1)
    assert "was trained" not in capsys.readouterr().out


def test_equal_weights_are_loaded_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(evaluation, "open_engine", lambda *a, **k: opened.append(a[1]) or open_engine(*a, **k))
    figures = run(tmp_path / "eval.json", planners=[f"bare:{PLANNER}", PLANNER], frozen_model=PLANNER, questions=1)
    assert len(figures) == 2 and opened == [PLANNER]


# --- trials and their interval ----------------------------------------------------------------------------------------


def test_interval_worked_example():
    """Means 1, 1/2, 0, 1 of 4 questions: p = 5/8, their variance 11/64, that of p 11/256. One answer has 15/64, so the
    8 are worth 15/64 * 256/11 = 60/11 of them, more than 4."""
    rewards = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    n = 60 / 11
    low, high = interval(rewards)
    for end in (low, high):  # the Wilson interval ends where |p - end| is 1.96 standard errors of that end
        assert (5 / 8 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n)
    assert low < 5 / 8 < high and accuracy(rewards) == {"accuracy": 5 / 8, "interval": (low, high), "n": 4}


def test_interval_is_wilsons_with_one_trial_and_between_n_and_nt():
    for hits in range(11):
        assert interval([[1.0]] * hits + [[0.0]] * (10 - hits)) == wilson(hits, 10)
    assert interval([[1.0] * 3] * 5 + [[0.0] * 3] * 5) == pytest.approx(wilson(5, 10))  # trials that say nothing new
    assert interval([[1.0, 0.0]] * 10) == pytest.approx(wilson(10, 20))  # questions that are all alike
    assert interval([[1.0] * 3] * 10) == pytest.approx(wilson(10, 10))  # which of both is it?


def test_interval_covers():
    """95 % of the intervals hold the accuracy that 40 questions of any difficulty are drawn from; not so if 3 trials
    of a question counted as 3 questions."""
    draw, right, naive = random.Random(0), 0, 0
    for _ in range(2000):
        rewards = []
        for _ in range(40):
            difficulty = draw.betavariate(0.4, 0.6)
            rewards.append([float(draw.random() < difficulty) for _ in range(3)])
        low, high = interval(rewards)
        right += low <= 0.4 <= high
        low, high = wilson(sum(map(sum, rewards)), 120)
        naive += low <= 0.4 <= high
    assert 0.93 <= right / 2000 <= 0.97 and naive / 2000 < 0.88


def test_trials_differ_and_repeat(tmp_path):
    one = run(tmp_path / "one.json", max_turns=2)
    three, again = (run(tmp_path / f"{name}.json", trials=3, in_flight=5, max_turns=2) for name in ("three", "again"))
    assert three == again
    first, *others = ([r for r in rows_of(tmp_path / "three.answers.jsonl") if r["trial"] == n] for n in range(3))
    texts = [
        [(row["answer"], row["steps"]) for row in sorted(rows, key=lambda r: r["number"])] for rows in (first, *others)
    ]
    assert texts[0] == [
        (r["answer"], r["steps"]) for r in sorted(rows_of(tmp_path / "one.answers.jsonl"), key=lambda r: r["number"])
    ]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    figures = three[PLANNER]["tinyworld"]
    assert figures["n"] == 6 and figures["trials"] == 3 and one[PLANNER]["tinyworld"]["trials"] == 1
    assert "accuracy (n = 6, 3 trials)" in table({"x": figures})


# --- an evaluation that was stopped -----------------------------------------------------------------------------------


def test_resume_after_a_kill(tmp_path, asked, capsys):
    """Killed while it works, and the file cut off within a line: the same figures, and no finished question again."""
    flags = {"questions": 10, "in_flight": 4, "trials": 2, "max_turns": 2}
    output = tmp_path / "eval.json"
    answers = output.with_suffix(".answers.jsonl")
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "eval.py", "--planners", PLANNER, "--output", str(output), *words]
    process = subprocess.Popen(command, cwd=BACKBONE.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not answers.exists() or answers.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    answers.write_bytes(answers.read_bytes()[:-20])
    kept = {(row["number"], row["trial"]) for row in map(json.loads, answers.read_text().splitlines()[:-1])}
    assert 5 <= len(kept) < 20 and not output.exists()
    resumed = run(output, **flags)
    assert {seed[2:] for _, seed in asked} == {(n, t) for n in range(10) for t in range(2)} - kept
    assert f"{len(kept)} of 20 answers are in" in capsys.readouterr().out
    assert resumed == run(tmp_path / "whole.json", **flags)
    asked.clear()
    assert run(output, **flags) == resumed and not asked


def test_only_what_is_missing_is_asked(tmp_path, asked):
    """Another trial or question is added; what changes the answers asks all again, and what judges them asks none."""
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
    (tmp_path / "eval.json").unlink()
    assert count(questions=4) == 0


def test_crashed_questions_are_asked_again(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr("tools.Corpus.search", broken)
        crashed = run(tmp_path / "eval.json", max_turns=2)[PLANNER]["tinyworld"]
    assert crashed["crashed"] > 0 and crashed["n"] == 6
    assert any("disk on fire" in row["crash"] for row in rows_of(tmp_path / "eval.answers.jsonl"))
    assert run(tmp_path / "eval.json", max_turns=2) == run(tmp_path / "other.json", max_turns=2)


# --- several tasks, several systems -----------------------------------------------------------------------------------


class Scripted:
    """A model behind a server: `answer(prompt)` is what it writes."""

    def __init__(self, answer):
        self.encode, self.answer = str, answer

    def generate_batch(self, requests):
        return [Completion([1, 2, 3], [4, 5], [], self.answer(request.prompt_ids), "stop") for request in requests]


@pytest.fixture
def sums(tmp_path):
    """Two small benchmark files, of 4 and 2 questions."""
    paths = []
    for name, count in (("sums", 4), ("more", 2)):
        rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(1, count + 1)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    return list(map(str, paths))


def doubles(prompt):
    """Right in the first three sums."""
    number = int(re.search(r"What is (\d+)", prompt)[1])
    return f"It doubles.\n<answer>{2 * number if number < 4 else 'many'}</answer>"


def test_several_tasks_and_the_bare_model(tmp_path, sums, capsys, asked):
    with serve(Scripted(doubles)) as (url, seen):
        planners = [f"bare:{url}#backbone", f"bare:{PLANNER}", PLANNER]
        results = run(tmp_path / "eval.json", planners=planners, task=sums, max_turns=2)
        assert sorted(body["messages"][0]["content"] for _, body, _ in seen) == sorted(
            BARE_PROMPT.format(question=question) for question, _ in asked[:6]
        )
    bare = results[planners[0]]
    assert [bare[task]["accuracy"] for task in sums] == [3 / 4, 1.0]
    assert bare[sums[0]]["turns"] == 0 and bare[sums[0]]["tokens"] == {
        "planner_read": 3, "planner_written": 2, "frozen_read": 0, "frozen_written": 0
    }  # fmt: skip
    assert results[PLANNER][sums[0]]["turns"] == 2 and results[PLANNER][sums[0]]["tokens"]["frozen_read"] > 0
    assert all(row["analysis"].startswith("It doubles.") for row in rows_of(tmp_path / "eval.answers.jsonl")[:6])
    lines = capsys.readouterr().out.splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("accuracy"))
    titles = [f"{Path(task).stem} (n = {n})" for task, n in zip(sums, (4, 2))]
    assert re.split(r"\s{2,}", lines[top]) == ["accuracy", *titles, "average"]
    assert lines[top + 1].split() == [planners[0], *"75.0 % [30.1, 95.4] 100.0 % [34.2, 100.0] 87.5 %".split()]
    assert lines[top + 4] == "turns a question" and lines[top + 5].split() == [planners[0], "-", "-", "-"]
    assert lines[top + 7].split() == [PLANNER, "2.00", "2.00", "2.00"]


def test_a_planner_from_another_engine(tmp_path):
    with serve(TransformersEngine(BACKBONE)) as (url, seen):
        through = run(tmp_path / "eval.json", planners=[f"{url}#backbone"], questions=3)
        assert seen and all(path.endswith("/chat/completions") for path, *_ in seen)
    (through,), (direct,) = through.values(), run(tmp_path / "direct.json", questions=3).values()
    assert through == direct  # a server of the same weights that takes the same seeds


def test_tokens(engine):
    system = AgentSystem(engine, engine, load_corpus(), Sandbox())
    pairs, examples = [], load_examples("tinyworld", "dev")[:4]
    before = engine.tokens_generated
    tokens = evaluate(system, examples, 1.0, ("test",), keep=pairs)["tokens"]
    turns = [turn for _, trajectory in pairs for turn in trajectory.turns]
    assert tokens["planner_read"] == sum(len(turn.prompt_ids) for turn in turns) / 4
    assert tokens["planner_written"] == sum(len(turn.completion_ids) for turn in turns) / 4
    assert 4 * (tokens["planner_written"] + tokens["frozen_written"]) >= engine.tokens_generated - before > 0


# --- a language model as the judge ------------------------------------------------------------------------------------


def verdict(prompt):
    case = json.loads(prompt.split("\n\n")[1])
    return json.dumps({"analysis": "read", "correct": case["prediction"] == "many"})


def judged_by(url, **changes):
    return dict(judge="llm", judge_model=f"{url}#backbone", **changes)


def test_judge_llm(tmp_path, sums, capsys, asked):
    with serve(Scripted(doubles)) as (planner, _), serve(Scripted(verdict)) as (url, seen):
        flags = dict(planners=[f"bare:{planner}#backbone"], task=sums[:1])
        (rules,), (judged,) = (run(tmp_path / "eval.json", **flags, **more).values() for more in ({}, judged_by(url)))
        assert len(asked) == 4 and len(seen) == 1  # the answers are those of before; one is no sum by the rules
        assert seen[0][1]["max_tokens"] == 256 and seen[0][1]["temperature"] == 0.0
        (again,) = run(tmp_path / "eval.json", **flags, **judged_by(url)).values()
        assert len(seen) == 1  # the verdict is in the cache
        (compared,) = run(tmp_path / "eval.json", **flags, **judged_by(url, judge_compare=True)).values()
        assert len(seen) == 4
    rules, judged, again, compared = (figures[sums[0]] for figures in (rules, judged, again, compared))
    assert rules["accuracy"] == 3 / 4 and "judge_decided" not in rules
    assert judged["accuracy"] == 1.0 and judged["judge_decided"] == {"math": 3, "model": 1}
    assert judged["judge_agreement"] == 0.0 and judged["judge_requests"] == 1 and again["judge_requests"] == 0
    assert compared["accuracy"] == 1.0 and compared["judge_only_rules_accept"] == 3
    assert re.search(r"^judged by the model +25.0 %$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows_of(tmp_path / "verdicts.jsonl")) == 4


def test_a_dead_judge_loses_nothing(tmp_path, sums, asked):
    output = tmp_path / "eval.json"
    flags = ["--task", sums[0], "--output", str(output), "--max_turns", "1", "--judge", "llm"]
    command = [sys.executable, "eval.py", *flags]
    with serve(Scripted(doubles)) as (planner, _):
        command += ["--planners", f"bare:{planner}#backbone"]
        with serve(Scripted(verdict), always=500) as (url, _):
            flags = ["--judge_model", f"{url}#backbone"]
            done = subprocess.run([*command, *flags], cwd=BACKBONE.parent.parent, capture_output=True, text=True)
        assert done.returncode == 2 and not output.exists()
        lines = [line for line in done.stderr.splitlines() if line.strip() and "question/s]" not in line]
        assert len(lines) == 1 and lines[0].startswith(f"eval.py: the judge {url}#backbone does not answer: ")
        assert len(rows_of(tmp_path / "eval.answers.jsonl")) == 4
        with serve(Scripted(verdict)) as (url, _):
            flags = judged_by(url, planners=[f"bare:{planner}#backbone"], task=sums[:1], max_turns=1, questions=0)
            (figures,) = run(output, **flags).values()
    assert figures[sums[0]]["accuracy"] == 1.0 and not asked


def test_a_judge_that_takes_batches_gets_one(tmp_path):
    """And the frozen model can be the judge, without being loaded twice; the bundled one gives no verdict."""
    batches = []

    class Engine(Scripted):
        def generate_batch(self, requests):
            batches.append(len(requests))
            return super().generate_batch(requests)

    engine = Engine(lambda prompt: verdict(prompt) if "Attempt" in prompt or '"7"' in prompt else "Well")
    config = EvalConfig(judge="llm", judge_model="m")
    judge = open_judge(config, tmp_path / "verdicts.jsonl", "cpu", torch.float32, {"m": engine})
    example = Example("How many?", "12")
    pairs = [(example, Trajectory("q", [], Memory("q"), answer)) for answer in ("many", "7", "8", "12", "7", "")]
    pairs.append((example, Trajectory("q", [], Memory("q"), "12", crash="OSError")))
    score(pairs, judge)
    assert [trajectory.reward for _, trajectory in pairs] == [1, 0, 0, 1, 0, 0, 0]
    assert batches == [3, 2]
    with pytest.raises(EngineError, match=f"the judge {PLANNER} gave no verdict"):
        run(tmp_path / "eval.json", judge="llm", judge_model=PLANNER, judge_tokens=16)
    engine.answer = 1 / 2  # a fault of the machine: nobody waits for ever
    with pytest.raises(EngineError, match="the judge m does not answer: TypeError"):
        score([(example, Trajectory("q", [], Memory("q"), "9"))], judge)


@pytest.mark.parametrize(
    "flags, line",
    [
        (dict(trials=0), "--trials 0: must be at least 1"),
        (dict(in_flight=0), "--in_flight 0: must be at least 1"),
        (dict(trials=3, temperature=0.0), "--trials 3 at --temperature 0 are all the same"),
        (dict(judge="gpt"), "--judge gpt: must be rules or llm"),
        (dict(judge="llm"), "give both or none"),
        (dict(judge_model="m"), "give both or none"),
        (dict(judge="llm", judge_model="m", judge_tokens=0), "--judge_tokens 0: must be at least 1"),
        (dict(judge="llm", judge_model="m", output=""), "name a file with --output"),
        (dict(task=["tinyworld", "bamboogle"]), "bamboogle is not prepared: python tasks.py prepare bamboogle"),
        (dict(task=["nonsense"]), "no task nonsense"),
        (dict(planners=["bare:nonsense"]), "nonsense is not a whole model folder"),
        (dict(judge="llm", judge_model="nonsense"), "nonsense is not a whole model folder"),
    ],
)
def test_bad_input(flags, line, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.DATA", tmp_path)
    with pytest.raises(UserError, match=re.escape(line)):
        evaluation.main(EvalConfig(**({"output": str(tmp_path / "eval.json"), "planners": [PLANNER]} | flags)))


def test_answers_that_cannot_be_kept_stop_at_the_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*answers.jsonl|is not one of our files"):
        run(tmp_path / "file" / "eval.json")
    (tmp_path / "eval.answers.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="eval.answers.jsonl is not one of our files"):
        run(tmp_path / "eval.json")
