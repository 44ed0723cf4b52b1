"""Intervals, tables, and evaluations on the bundled backbone."""

import json

import pytest

import eval as evaluation
from agent import AgentSystem
from eval import EvalConfig, behaviour, evaluate, table, wilson
from llm import TransformersEngine
from tasks import load_corpus, load_examples
from tinyworld.pretrain import BACKBONE, IdealPlanner
from tinyworld.world import World
from tools import Sandbox


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


def test_eval_side_by_side(tmp_path, capsys):
    output = tmp_path / "eval.json"
    evaluation.main(EvalConfig(planners=[str(BACKBONE), f"{BACKBONE}/"], questions=6, output=str(output)))
    out = capsys.readouterr().out
    assert "accuracy (n = 6)" in out and "Base_Generator" in out and out.count(str(BACKBONE)) >= 2
    figures = json.loads(output.read_text())["results"]
    assert len(figures) == 2 and {"accuracy", "interval", "by_family", "tool_shares"} <= set(figures[str(BACKBONE)])
