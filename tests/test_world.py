"""The bundled world: seeded and pure, its facts stated, its splits disjoint, each question within the turn budget."""

from collections import Counter

import pytest

from tinyworld.world import FAMILIES, HARD_FAMILIES, HARD_TURNS, KINDS, NAMES, SPLITS, World, ideal_plan, relations_of

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


def test_the_hard_split(world):
    """Longer chains, a name that leads astray, two chains to join, all within a budget of their own."""
    questions = {split: world.questions(split, HARD_FAMILIES) for split in SPLITS}
    every = [q for split in questions.values() for q in split]
    assert len({q.question for q in every}) == len(every) > 3000
    assert not {q.question for q in every} & {q.question for split in SPLITS for q in world.questions(split)}
    turns = {family: {len(ideal_plan(q)) for q in every if q.family == family} for family in HARD_FAMILIES}
    assert max(max(of_family) for of_family in turns.values()) + 2 == HARD_TURNS  # two turns may be wasted
    assert turns == {"four-hop": {4}, "five-hop": {5}, "distractor": {3}, "joined": {5}}
    for q in every:
        assert len({fact.subject for fact in q.facts}) == len(q.facts) and q.facts[-1].relation in q.question
        if q.family == "distractor":
            start, other = q.question.removesuffix("?").split(" rather than of ")
            assert start.endswith(f" of {q.facts[0].subject}") and world.follow(other, q.facts) != q.answer
        elif q.family == "joined":
            one, two = q.facts[:2], q.facts[2:]
            assert one[0].value == one[1].subject and two[0].value == two[1].subject
            assert int(q.answer) == int(one[1].value) - int(two[1].value) > 0
            assert one[1].relation == two[1].relation
        else:
            assert all(a.value == b.subject for a, b in zip(q.facts, q.facts[1:])) and q.facts[-1].value == q.answer


def test_facts_to_avoid(world):
    avoid = world.all_facts()
    for seed in range(1_000_000, 1_000_030):
        assert not World(seed, avoid).all_facts() & avoid
    assert any(World(seed).all_facts() & avoid for seed in range(1_000_000, 1_000_030))  # without care they would occur
