"""Tasks of other worlds and other families: nothing shared with the bundled one, and the same each time."""

import json
from collections import Counter

import pytest

from lab.teacher import TEST_WORLD
from lab.worlds import WorldConfig, main
from tasks import load_corpus, load_examples
from tinyworld.world import World
from tools import UserError


def test_another_world_is_a_task_like_any_other(tmp_path):
    folder = str(tmp_path / "world1")
    main(WorldConfig(folder=folder, seed=1))
    test_set, corpus = load_examples(folder, "test"), load_corpus(folder)
    assert len(test_set) == 500 and len(corpus) == 300
    world = World(1, avoid=World(TEST_WORLD).all_facts())
    articles = [json.loads(line) for line in (tmp_path / "world1" / "articles.jsonl").read_text().splitlines()]
    assert {article["title"]: article["text"] for article in articles} == world.articles
    assert not world.all_facts() & World(TEST_WORLD).all_facts()
    fact = min(world.all_facts())
    assert fact.value in corpus.search(f"the {fact.relation} of {fact.subject}")[0][1]
    files = {path.name: path.read_bytes() for path in (tmp_path / "world1").glob("*.jsonl")}
    main(WorldConfig(folder=folder, seed=1))
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "world1").glob("*.jsonl")}


def test_other_families_of_the_same_world(tmp_path):
    main(WorldConfig(folder=str(tmp_path), families=["lookup", "five-hop", "lookup"]))
    test_set = load_examples(str(tmp_path), "test")
    assert Counter(example.family for example in test_set) == {"lookup": 84, "five-hop": 84}
    hops = [e.question.count("the ") for e in test_set if e.family == "five-hop"]
    assert set(hops) == {5}
    assert len(load_corpus(str(tmp_path))) == 300


@pytest.mark.parametrize(
    "options", [dict(folder=""), dict(folder="x", families=["riddle"]), dict(folder="x", families=[])]
)
def test_mistakes(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--f"):
        main(WorldConfig(**options))
    assert not list(tmp_path.iterdir())
