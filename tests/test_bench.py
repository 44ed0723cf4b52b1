"""The benchmark's own arithmetic, and its path of random weights, on a shape that takes seconds."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from agent import Turn
from flow_grpo import token_logprobs
from llm import UserError, load_model
from tinyworld.pretrain import BACKBONE


@pytest.fixture
def tiny_shape(monkeypatch, tmp_path):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 64, 128, 2, 1, True))
    backbone = BACKBONE.resolve()
    monkeypatch.chdir(tmp_path)
    return dict(
        model=str(backbone), shape="tiny", in_flight=12, prompt_tokens=40, completion_tokens=6, turns=2, repeats=1
    )


def test_a_shape(tiny_shape, capsys):
    bench.main(bench.BenchConfig(**tiny_shape, packed=True, activation_checkpointing=True))
    written = json.loads(open("bench.json").read())
    figures = written["figures"]
    assert figures["gradient: share of padding"] == 0 and written["config"]["shape"] == "tiny"
    assert 0 < figures["gradient: share of that"] < 1 and figures["rollout: generated tokens/s"] > 0
    assert 0 < figures["sync: share of a step"] < 1
    out = capsys.readouterr().out
    assert all(name in out for name in figures)


def test_rollouts_of_a_shape_have_the_sizes_that_were_asked_for(tiny_shape):
    config = bench.BenchConfig(**tiny_shape)
    engine = bench.open_engine("transformers", bench.make_shape("tiny", config.model), "cpu")
    trajectories = bench.synthetic_rollout(engine, config, seed=0)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    assert len(trajectories) == 12 and len(turns) == 24
    assert {len(turn.prompt_ids) for turn in turns} == {40} and {len(turn.completion_ids) for turn in turns} == {6}
    first = [tuple(trajectory.turns[0].prompt_ids) for trajectory in trajectories]
    assert first[0] == first[7] != first[8] and len({str(turn.completion_ids) for turn in turns}) > 12


def test_work_equals_what_torch_counts():
    """Forward and backward through linear layers and head; rows so short that attention hardly counts."""
    model, _ = load_model(BACKBONE)
    rows = [Turn([300 + i] * 5, [310] * 4, []) for i in range(8)]
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids for row in rows]))
        hidden = states.last_hidden_state
        model.lm_head(hidden[:, 4:8]).sum().backward()
    assert bench.work_of(model, rows) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert token_logprobs(model, [rows[0].prompt_ids], [rows[0].completion_ids])[0].shape == (1, 4)


def test_an_unknown_shape():
    with pytest.raises(UserError, match="--shape nonsense: must be qwen2.5-0.5b"):
        bench.main(bench.BenchConfig(shape="nonsense"))
