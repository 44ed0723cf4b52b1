"""Imitation: each teacher succeeds by the means that it is said to have, and a way leaves its record."""

import re
from dataclasses import replace

import pytest
import torch

import train
from agent import PLANNER_PROMPT, AgentSystem, Trajectory, Turn, toolbox
from eval import evaluate
from flow_grpo import token_logprobs
from lab.imitation import WAYS, Informed, fine_tune, invented, kl, learn
from lab.pretrain import BACKBONE, encoder
from lab.teacher import TEST_WORLD, render_plan
from llm import TransformersEngine
from sandbox import Sandbox
from tasks import load_corpus, load_examples
from tinyworld.world import NAMES, World, find


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
    assert sum(t.reward for t in trajectories) > 0.5 * len(asked)
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


def test_a_way_leaves_a_record(monkeypatch):
    monkeypatch.setitem(WAYS, "few-traces", replace(WAYS["few-traces"], epochs=2))
    monkeypatch.setitem(WAYS, "own-successes", replace(WAYS["own-successes"], rounds=2))
    for name, rounds in (("few-traces", 1), ("own-successes", 2)):
        record = learn(name, 0, questions=12, test_questions=4)
        assert len(record["rounds"]) == rounds and all(r["rows"] > 0 for r in record["rounds"])
        assert record["hypothesis"] == WAYS[name].hypothesis and record["before"]["n"] == 4
        assert set(record["rounds"][-1]) >= {"accuracy", "kl", "invented", "paired"}


def test_imitation_learns_the_plans_it_is_shown():
    """One step on copies of a row makes its completion likely: the rows and the loss are what they should be."""
    config = train.Config(model=str(BACKBONE))
    policy, tokenizer, optimizer = train.build_trainer(config, train.choose_precision(config, "cpu"))
    plan = render_plan("the capital of Zilath is unknown", find("capital", "Zilath"))
    question, analysis = "What is the capital of Zilath?", "One fact has to be looked up."
    prompt = PLANNER_PROMPT.format(tools=toolbox(), question=question, analysis=analysis, memory="")
    ids, begin = encoder(tokenizer)(prompt, plan)
    row = Turn(ids[:begin], ids[begin:], [0.0] * len(ids[begin:]))

    def logprob() -> float:
        return token_logprobs(policy, [row.prompt_ids], [row.completion_ids])[0].sum().item()

    before = logprob()
    fine_tune(policy, optimizer, [row], 15, seed=0)
    assert before < -5 and logprob() > before / 2


def test_imitation_has_the_gradient_of_the_cross_entropy():
    """On rows of different lengths, in several micro-batches: the mean over all tokens of all rows."""
    config = train.Config(model=str(BACKBONE), kl_coef=0.0, aggregation="token-mean", micro_batch_tokens=16)
    precision = train.choose_precision(config, "cpu")
    policy, *_ = train.build_trainer(config, precision)
    rows = [Turn([300] * 4, [310 + n] * (n + 1), [0.0] * (n + 1)) for n in range(5)]
    losses = [token_logprobs(policy, [row.prompt_ids], [row.completion_ids])[0].sum() for row in rows]
    (-sum(losses) / 15).backward()
    expected = [parameter.grad for parameter in policy.parameters()]
    policy.zero_grad()

    class Keep(torch.optim.SGD):
        def step(self) -> None:
            self.seen = [parameter.grad.clone() for parameter in policy.parameters()]

    optimizer = Keep(policy.parameters(), lr=0.0)
    batches = train.make_batches([Trajectory("", rows, None, "")], torch.ones(1, 1), config, policy)
    stats = train.update_policy(policy, policy, optimizer, batches, config, precision, 1)
    scale = min(1.0, train.MAX_GRAD_NORM / stats["grad_norm"])
    assert len(batches) > 1
    for ours, theirs in zip(optimizer.seen, expected):
        assert torch.allclose(ours, scale * theirs, atol=1e-6)
