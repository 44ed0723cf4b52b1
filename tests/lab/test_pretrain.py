"""The teacher: right in every question, through the agent's own prompts; and the backbone that is made of its rows."""

import asyncio
import json
import math
import random
from collections import Counter
from itertools import islice

import pytest

from agent import AgentSystem
from eval import evaluate
from lab.pretrain import (
    BACKBONE,
    TEST_WORLD,
    IdealPlanner,
    PretrainConfig,
    build_tokenizer,
    make_backbone,
    row_stream,
    transcript,
)
from llm import TransformersEngine
from sandbox import Sandbox, extract_code
from tasks import load_corpus, load_examples
from tinyworld.world import SPLITS, World, ideal_plan
from tools import UserError


@pytest.fixture(scope="module")
def world():
    return World(TEST_WORLD)


@pytest.mark.parametrize("split", SPLITS)
def test_ideal_plan_answers_every_question(world, split):
    """The ideal plan through the real loop and tools, in every family."""
    corpus, programs, printed = load_corpus("tinyworld"), [], []
    for question in world.questions(split):
        teacher, trajectory = transcript(question, world, corpus, random.Random(0), skill=1.0)
        assert trajectory.answer == question.answer, trajectory
        assert len(trajectory.turns) == len(ideal_plan(question))
        programs += [extract_code(completion) for role, _, completion in teacher.rows if role == "coder"]
        printed += [step.result for step in trajectory.memory.steps if step.tool == "Python_Coder"]
    # The teacher's sandbox is quick and knows one term. The real one prints the same. Thousands of its processes would
    # take minutes, so the programs run in one, one after the other.
    real = asyncio.run(Sandbox(output_chars=100_000).run("\n".join(programs)))
    assert len(programs) >= len(world.questions(split)) // 2 - 2 and real.splitlines() == printed


def test_facts_never_reach_a_prompt(world):
    """Before the first search, the prompts hold the question alone."""
    for question in islice(world.questions("test"), 50):
        teacher, _ = transcript(question, world, load_corpus("tinyworld"), random.Random(0), skill=1.0)
        for role, prompt, _ in teacher.rows[:2]:
            assert role in ("analyst", "planner")
            assert not any(f"{fact.subject} is a" in prompt for fact in question.facts)


def test_rows_are_the_agents_own_prompts():
    roles = Counter(role for role, _, _ in islice(row_stream(0), 2000))
    assert set(roles) == {"analyst", "planner", "executor", "coder", "base", "verifier", "generator"}


def test_the_backbone_knows_the_prompts(tmp_path):
    """The fixed text of each prompt is a token: after a change of a prompt, the backbone has to be trained again."""
    build_tokenizer(tmp_path)
    made, bundled = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, BACKBONE))
    assert made == bundled


def test_the_frozen_modules_hardly_answer_with_clumsy_plans(world):
    """With ideal ones they do: tests/test_eval.py."""
    planner = IdealPlanner(world.questions("test"), world, skill=0.0)
    system = AgentSystem(planner, TransformersEngine(BACKBONE), load_corpus("tinyworld"), Sandbox())
    figures, _ = evaluate(system, load_examples("tinyworld", "test")[:24], ("test",))
    assert figures["accuracy"] <= 0.5


def test_a_backbone_of_two_layers(tmp_path):
    """All stages, a few steps each; the engine loads and runs what they leave."""
    make_backbone(PretrainConfig(out=str(tmp_path), layers=2, share=0.001, rows_per_step=8))
    engine = TransformersEngine(tmp_path)
    assert engine.model.config.num_hidden_layers == 2
    assert engine.tokenizer.decode(engine.encode("What is the capital of Zilath?")).startswith("<|user|>What is")


@pytest.mark.parametrize(
    "field, values",
    [
        ("from_stage", (0, 3)),
        ("layers", (1, math.inf)),
        ("share", (0, -1, math.nan, math.inf)),
        ("rows_per_step", (0, 3)),
        ("lr", (-1, math.nan, math.inf)),
        ("muon_lr", (-1, math.nan, math.inf)),
        ("seed", (-1,)),
    ],
)
def test_numbers_out_of_range(field, values):
    for value in values:
        with pytest.raises(UserError, match=f"--{field} {value} is out of range: "):
            PretrainConfig(**{field: value})


def test_wrong_places_show_before_the_training(tmp_path):
    """A file in the place of the folder; a folder without a model to continue."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_backbone(PretrainConfig(out=str(tmp_path / "file")))
    with pytest.raises(UserError, match="cannot load a model from"):
        make_backbone(PretrainConfig(out=str(tmp_path), from_stage=2))
