"""The benchmark's own arithmetic, and its path of random weights, on a shape that takes seconds."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agent import Turn
from lab import bench
from lab.bench import BenchConfig
from lab.pretrain import BACKBONE
from llm import TransformersEngine, load_model
from tools import UserError


@pytest.fixture
def tiny_shape(monkeypatch, tmp_path):
    monkeypatch.setitem(bench.SHAPES, "tiny", (2, 64, 128, 2, 1, True))
    monkeypatch.chdir(tmp_path)
    sizes = dict(in_flight=4, group_size=2, prompt_tokens=40, completion_tokens=4, turns=2)
    return BenchConfig(model=str(BACKBONE), shape="tiny", repeats=1, **sizes)


def test_a_shape(tiny_shape, capsys):
    bench.main(tiny_shape)
    written = json.loads(open("bench.json").read())
    figures = written["figures"]
    assert figures["gradient: share of padding"] == 0 and written["config"]["shape"] == "tiny"
    assert 0 < figures["gradient: share of that"] < 1 and figures["rollout: tokens/s, of all modules"] > 0
    assert 0 < figures["sync: share of a step"] < 1
    out = capsys.readouterr().out
    assert all(name in out for name in figures)


def test_the_bundled_model(tmp_path):
    output = tmp_path / "bench.json"
    sizes = dict(in_flight=4, group_size=2, alone=1, repeats=1, max_turns=1, output=str(output))
    bench.main(BenchConfig(model=str(BACKBONE), device="cpu", **sizes))
    figures = json.loads(output.read_text())["figures"]
    assert figures["rollout: trajectories/s, one at a time"] > 0 and figures["rollout: tokens/s, of all modules"] > 0
    assert 0 <= figures["gradient: share of padding"] < 0.1


def test_rollouts_of_a_shape_have_the_sizes_that_were_asked_for(tiny_shape):
    engine = TransformersEngine(bench.make_shape("tiny", tiny_shape.model))
    trajectories = bench.synthetic_rollout(engine, tiny_shape, count=2, group_size=6, seed=0)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    assert len(trajectories) == 12 and len(turns) == 24
    assert {len(turn.prompt_ids) for turn in turns} == {40} and {len(turn.completion_ids) for turn in turns} == {4}
    assert bench.tokens_written(trajectories) == 24 * 4
    first = [tuple(trajectory.turns[0].prompt_ids) for trajectory in trajectories]
    assert first[0] == first[5] != first[6] and len({str(turn.completion_ids) for turn in turns}) > 12


def test_padding():
    """Rows of 10 and 6 tokens in one batch: 4 of 20 places are padding."""
    turns = [Turn([5] * 7, [6] * 3, [0.0] * 3), Turn([5] * 4, [6] * 2, [0.0] * 2)]
    batch = bench.Batch(turns, torch.ones(2), torch.ones(2), torch.zeros(2, 3))
    assert bench.share_of_padding([batch]) == pytest.approx(0.2)


def test_work_equals_what_torch_counts():
    """Forward and backward through linear layers and head; rows so short that attention hardly counts."""
    model, _ = load_model(BACKBONE)
    rows = [Turn([300 + i] * 5, [310] * 4, []) for i in range(8)]
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids for row in rows]))
        hidden = states.last_hidden_state
        model.lm_head(hidden[:, 4:8]).sum().backward()
    assert bench.work_of(model, rows) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_an_unknown_shape():
    with pytest.raises(UserError, match="--shape nonsense: must be qwen2.5-0.5b"):
        bench.main(BenchConfig(shape="nonsense"))
