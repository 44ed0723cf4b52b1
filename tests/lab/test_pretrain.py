"""The teacher: right in every question, through the agent's own prompts; and the backbone that is made of its rows."""

import asyncio
import json
import math
import random
import shutil
from collections import Counter
from itertools import islice

import pytest
import torch

from agent import AgentSystem
from eval import evaluate
from lab import pretrain
from lab.pretrain import BACKBONE, PretrainConfig, build_tokenizer, make_backbone
from lab.teacher import TEST_WORLD, IdealPlanner, row_stream, transcript
from llm import TransformersEngine, load_model
from sandbox import Sandbox, extract_code
from tasks import load_corpus, load_examples
from tinyworld.world import FAMILIES, HARD_FAMILIES, SPLITS, World, ideal_plan
from tools import UserError


@pytest.fixture(scope="module")
def world():
    return World(TEST_WORLD)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("families", [FAMILIES, HARD_FAMILIES], ids=["tinyworld", "tinyworld-hard"])
def test_ideal_plan_answers_every_question(world, families, split):
    """The ideal plan through the real loop and tools, in every family, within the turn budget. Of the train split, a
    quarter of the questions."""
    corpus, programs, printed, computed = load_corpus("tinyworld"), [], [], 0
    for question in world.questions(split, families)[:: 4 if split == "train" else 1]:
        computed += ideal_plan(question)[-1].tool == "Python_Coder"
        teacher, trajectory = transcript(question, world, corpus, random.Random(0), skill=1.0)
        assert trajectory.answer == question.answer, trajectory
        assert len(trajectory.turns) == len(ideal_plan(question))
        programs += [extract_code(completion) for role, _, completion in teacher.rows if role == "coder"]
        printed += [step.result for step in trajectory.memory.steps if step.tool == "Python_Coder"]
    # The teacher's sandbox is quick and knows one term. The real one prints the same. Thousands of its processes would
    # take minutes, so the programs run in one, one after the other.
    real = asyncio.run(Sandbox(output_chars=100_000).run("\n".join(programs)))
    assert len(programs) == computed > 0 and real.splitlines() == printed


def test_search_finds_the_article_of_each_fact(world):
    corpus = load_corpus("tinyworld")
    for fact in world.all_facts():
        assert corpus.search(f"{fact.relation} of {fact.subject}")[0][0] == fact.subject


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
    """The fixed text of each prompt is a token: after a change of its words, `lab.pretrain --words` is enough; a new
    placeholder takes a new training."""
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


# --- a model that exists ----------------------------------------------------------------------------------------------


def taught(out, **changes):
    small = dict(model=str(BACKBONE), steps=3, questions_per_step=1, plans=2, save_every=1, questions=4)
    return PretrainConfig(out=str(out), **(small | changes))


def test_a_stopped_cold_start_goes_on(tmp_path, monkeypatch, capsys):
    """The folder that it writes is the same, stopped in between or not; until the end it is no model."""
    pretrain.main(taught(tmp_path / "whole"))
    assert "readable plans: " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "listen_for_stop", lambda: [15])
        with pytest.raises(UserError, match="stopped after step 1 and saved"):
            pretrain.main(taught(tmp_path / "parts"))
    assert not (tmp_path / "parts" / "config.json").exists()
    pretrain.main(taught(tmp_path / "parts"))
    one, other = (load_model(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], load_model(BACKBONE)[0].state_dict()["lm_head.weight"])
    with pytest.raises(UserError, match="holds a model already"):
        pretrain.main(taught(tmp_path / "parts"))


def test_what_is_taught():
    """Planner rows alone, or those of all roles. Ideal plans among them make the planner better, not perfect."""
    engine = TransformersEngine(BACKBONE)
    texts = {}
    for name, options in {"clumsy": {"skill": 0.0}, "ideal": {"skill": 1.0}, "all": {"roles": "all"}}.items():
        rows = next(pretrain.lessons(engine, taught("", questions_per_step=8, **options)))
        assert all(completion[-1] == engine.tokenizer.eos_token_id for _, completion in rows)
        texts[name] = [engine.tokenizer.decode(completion) for _, completion in rows]
    assert all(text.startswith("Justification: ") for text in texts["clumsy"] + texts["ideal"])
    assert any("</answer>" in text for text in texts["all"]) and any("STOP" in text for text in texts["all"])
    searches = {name: sum("Tool Name: Search" in text for text in rows) for name, rows in texts.items()}
    assert searches["ideal"] > 1.5 * searches["clumsy"]


def test_an_adapter_is_merged(tmp_path):
    pytest.importorskip("peft")
    pretrain.main(taught(tmp_path / "lora", lora_rank=4, learning_rate=1e-2))
    one, base = load_model(tmp_path / "lora")[0].state_dict(), load_model(BACKBONE)[0].state_dict()
    assert one.keys() == base.keys()
    changed = [name for name in one if not torch.equal(one[name], base[name])]
    assert len(changed) == 3 * 7 and not [name for name in changed if "embed" in name]


def test_only_the_words_of_a_prompt(tmp_path):
    """`--words` writes the tokenizer anew: the ids stay, and so do the weights."""
    shutil.copytree(BACKBONE, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    pretrain.main(PretrainConfig(out=str(tmp_path / "model"), words=True))
    assert (tmp_path / "model" / "tokenizer.json").read_text() == (BACKBONE / "tokenizer.json").read_text()
