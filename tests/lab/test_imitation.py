"""Imitation: each teacher succeeds by the means that it is said to have, and a way leaves its record."""

import json
from dataclasses import replace

import pytest

from agent import AgentSystem
from eval import evaluate
from lab.imitation import WAYS, ImitationConfig, Informed, main
from lab.pretrain import BACKBONE
from lab.teacher import TEST_WORLD
from llm import TransformersEngine
from sandbox import Sandbox
from tasks import load_corpus, load_examples
from tinyworld.world import World
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
    assert {step.tool for step in steps} <= {"Base_Generator", "Python_Coder"}
    assert all(" is a " in step.result for step in steps if step.tool == "Base_Generator" and not step.error)


def test_privileged_facts_skip_the_first_searches(system, asked):
    teacher, trajectories = traces(system, "privileged-facts", asked)
    chains = [t for t in trajectories if teacher.teachers[t.question].question.family in ("two-hop", "three-hop")]
    assert sum(t.reward for t in chains) > 0.8 * len(chains) > 0
    for t in chains:
        last = teacher.teachers[t.question].question.facts[-1]
        assert t.memory.steps[0].tool == "Search" and last.subject in t.memory.steps[0].command
        assert last.subject not in t.question


@pytest.mark.parametrize(("way", "begins"), [("bare-style", "none."), ("wordy-style", "Let us think step by step")])
def test_a_style_changes_the_justification_alone(system, asked, way, begins):
    _, trajectories = traces(system, way, asked)
    plans = [turn.completion_ids[0] for t in trajectories for turn in t.turns]
    assert all(plan.startswith(f"Justification: {begins}") or "\n" not in plan for plan in plans)
    assert sum(t.reward for t in trajectories) > 0.5 * len(asked)


def test_a_way_leaves_a_record_and_is_not_run_again(tmp_path, capsys, monkeypatch):
    config = ImitationConfig(ways=["few-traces"], seeds=[0], questions=8, test_questions=4, out=str(tmp_path))
    main(config)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["rounds"][0]["rows"] > 0 and record["rounds"][0]["kl"] > 0
    assert record["hypothesis"].startswith("A loss")
    monkeypatch.setattr("lab.imitation.learn", None)
    main(config)
    assert "| few-traces |" in capsys.readouterr().out


def test_an_unknown_way(tmp_path):
    with pytest.raises(UserError, match="--ways magic"):
        main(ImitationConfig(ways=["magic"], out=str(tmp_path)))
