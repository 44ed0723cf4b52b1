"""Imitation: each teacher succeeds by the means that it is said to have, and a way leaves its record."""

import json
import re
from dataclasses import replace

import pytest

from agent import AgentSystem
from eval import evaluate
from lab.imitation import WAYS, ImitationConfig, Informed, invented, kl, main
from lab.pretrain import BACKBONE
from lab.teacher import TEST_WORLD
from llm import TransformersEngine
from sandbox import Sandbox
from tasks import load_corpus, load_examples
from tinyworld.world import NAMES, World
from tools import UserError


@pytest.fixture(scope="module")
def system():
    engine = TransformersEngine(BACKBONE)
    return AgentSystem(engine, engine, load_corpus(), Sandbox())


@pytest.fixture(scope="module")
def asked():
    return [example for example in load_examples("tinyworld", "train") if example.family != "arithmetic"][:24]


def traces(system, way, asked):
    world = World(TEST_WORLD)
    teacher = WAYS[way].teacher(world.questions("train"), world)
    teaching = replace(system, planner=teacher, frozen=Informed(system.frozen, teacher))
    return teacher, [t for _, t in evaluate(teaching, asked, (0, way))[1]]


def test_a_privileged_tool_knows_what_the_students_does_not(system, asked):
    _, trajectories = traces(system, "privileged-tool", asked)
    steps = [step for t in trajectories for step in t.memory.steps]
    assert sum(t.reward for t in trajectories) > 0.8 * len(asked)
    assert {step.tool for step in steps} <= {"Base_Generator", "Python_Coder", "none"}  # none: nothing is left to do
    assert all(" is a " in step.result for step in steps if step.tool == "Base_Generator" and not step.error)


def test_privileged_facts_skip_the_first_searches(system, asked):
    teacher, trajectories = traces(system, "privileged-facts", asked)
    chains = [t for t in trajectories if teacher.teachers[t.question].question.family in ("two-hop", "three-hop")]
    assert sum(t.reward for t in chains) > 0.8 * len(chains) > 0
    for t in chains:
        last = teacher.teachers[t.question].question.facts[-1]
        assert t.memory.steps[0].tool == "Search" and f"of {last.subject}" in t.memory.steps[0].command


@pytest.mark.parametrize(("way", "begins"), [("bare-style", "none."), ("wordy-style", "Let us think step by step")])
def test_a_style_changes_the_justification_alone(system, asked, way, begins):
    _, trajectories = traces(system, way, asked)
    plans = [turn.completion_ids[0] for t in trajectories for turn in t.turns]
    assert all(plan.startswith(f"Justification: {begins}") for plan in plans)
    assert way == "bare-style" or any("is unknown.\n" in plan for plan in plans)
    assert sum(t.reward for t in trajectories) > 0.5 * len(asked)


def test_behaviour_of_a_planner(system, asked):
    """The untouched planner has no KL, and a name from nowhere is seen."""
    _, pairs = evaluate(system, asked[:6], (0,))
    trajectories = [t for _, t in pairs]
    assert kl(trajectories) == pytest.approx(0, abs=1e-5)
    encode, turn = system.planner.tokenizer, trajectories[0].turns[0]
    known = sorted(set(re.findall(r"[A-Z][a-z]+", trajectories[0].question)) & set(NAMES))[0]
    unknown = next(name for name in NAMES if name not in trajectories[0].question)
    for name, share in ((known, 0), (unknown, 1)):
        turn.completion_ids = encode(f"Justification: .\nContext: {name}\nSub-Goal: Find")["input_ids"]
        assert invented([replace(trajectories[0], turns=[turn])], encode) == share


def test_a_way_leaves_a_record_and_is_not_run_again(tmp_path, capsys, monkeypatch):
    options = dict(ways=["few-traces", "own-successes"], seeds=[0], test_questions=4, out=str(tmp_path))
    config = ImitationConfig(questions=24, **options)
    main(config)
    for name, rounds in (("few-traces", 1), ("own-successes", 4)):
        record = json.loads((tmp_path / f"{name}-seed0.json").read_text())
        assert len(record["rounds"]) == rounds and all(r["rows"] > 0 for r in record["rounds"])
        assert record["hypothesis"] == WAYS[name].hypothesis
    monkeypatch.setattr("lab.imitation.learn", None)
    main(config)
    assert "| few-traces |" in capsys.readouterr().out
    with pytest.raises(UserError, match="other numbers of questions"):
        main(ImitationConfig(questions=25, **options))


def test_an_unknown_way(tmp_path):
    with pytest.raises(UserError, match="--ways magic"):
        main(ImitationConfig(ways=["magic"], out=str(tmp_path)))
