"""The bundled world: seeded and pure, its facts stated, its splits disjoint, each question within the turn budget."""

from collections import Counter

import pytest

from tinyworld.world import FAMILIES, KINDS, NAMES, SPLITS, World, ideal_plan, relations_of

MAX_TURNS = 4  # the default turn budget


@pytest.fixture(scope="module")
def world():
    return World(0)


def test_size_and_purity(world):
    assert len(world.articles) == 300 and len(KINDS) == 4
    assert len({relation for kind in KINDS for relation in relations_of(kind)}) >= 10
    assert len(NAMES) == len(set(NAMES)) >= 300
    again = World(0)
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
        assert all(1 <= len(ideal_plan(question)) <= MAX_TURNS for question in split)


def test_facts_to_avoid(world):
    avoid = world.all_facts()
    for seed in range(1_000_000, 1_000_030):
        assert not World(seed, avoid).all_facts() & avoid
    assert any(World(seed).all_facts() & avoid for seed in range(1_000_000, 1_000_030))  # without care they would occur
