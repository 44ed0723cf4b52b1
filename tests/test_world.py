"""The bundled world: seeded and pure, every question answerable by its ideal plan, no test fact in pretraining."""

import asyncio
import random
from collections import Counter
from itertools import islice

import pytest

from tasks import load_corpus
from tinyworld.pretrain import TEST_WORLD, row_stream, transcript
from tinyworld.world import FAMILIES, KINDS, NAMES, SPLITS, World, ideal_plan, relations_of
from tools import Sandbox, extract_code

MAX_TURNS = 4  # the default turn budget


@pytest.fixture(scope="module")
def world():
    return World(TEST_WORLD)


def test_size_and_purity(world):
    assert len(world.articles) == 300 and len(KINDS) == 4
    assert len({relation for kind in KINDS for relation in relations_of(kind)}) >= 10
    assert len(NAMES) == len(set(NAMES)) >= 300
    again = World(TEST_WORLD)
    assert again.articles == world.articles and again.questions("test") == world.questions("test")
    other = World(1)
    assert other.articles != world.articles and set(other.articles) != set(world.articles)


def test_articles_state_their_facts(world):
    for subject, facts in world.facts.items():
        assert all(fact.value in world.articles[subject] for fact in facts.values())
    for country in world.entities["country"]:
        capital = world.facts[country]["capital"].value
        assert world.facts[capital]["country"].value == country


def test_splits(world):
    questions = {split: world.questions(split) for split in SPLITS}
    assert {split: len(q) for split, q in questions.items()} == {"train": 4000, "dev": 200, "test": 500}
    assert len({q.question for split in questions.values() for q in split}) == 4700  # disjoint as questions
    for split in questions.values():
        counts = Counter(q.family for q in split)
        assert set(counts) == set(FAMILIES) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_ideal_plan_answers_every_question(world, split):
    """The ideal plan through the real loop and tools, within the turn budget, in every family."""
    corpus, programs, printed = load_corpus(), [], []
    for question in world.questions(split):
        assert 1 <= len(ideal_plan(question)) <= MAX_TURNS
        teacher, trajectory = transcript(question, world, corpus, random.Random(0), skill=1.0)
        assert trajectory.answer == question.answer, trajectory
        assert len(trajectory.turns) == len(ideal_plan(question))
        programs += [extract_code(completion) for role, _, completion in teacher.rows if role == "coder"]
        printed += [step.result for step in trajectory.memory.steps if step.tool == "Python_Coder"]
    # The teacher's sandbox is quick and knows one term. The real one prints the same; thousands of its processes would
    # take minutes, so the programs run in one, one after the other.
    real = asyncio.run(Sandbox(output_chars=100_000).run("\n".join(programs)))
    assert len(programs) >= len(world.questions(split)) // 2 - 2 and real.splitlines() == printed


def test_facts_never_reach_a_prompt(world):
    """Before the first search, the prompts hold the question alone."""
    for question in islice(world.questions("test"), 50):
        teacher, _ = transcript(question, world, load_corpus(), random.Random(0), skill=1.0)
        for role, prompt, _ in teacher.rows[:2]:
            assert role in ("analyst", "planner")
            assert not any(f"{fact.subject} is a" in prompt for fact in question.facts)


def test_pretraining_worlds_hold_no_test_fact(world):
    avoid = world.all_facts()
    for seed in range(1_000_000, 1_000_030):
        assert not World(seed, avoid).all_facts() & avoid
    assert any(World(seed).all_facts() & avoid for seed in range(1_000_000, 1_000_030))  # without care they would


def test_rows_are_the_agents_own_prompts():
    roles = Counter(role for role, _, _ in islice(row_stream(0), 2000))
    assert set(roles) == {"analyst", "planner", "executor", "coder", "base", "verifier", "generator"}
