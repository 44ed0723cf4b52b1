"""The benchmark's own arithmetic, and its path of random weights, on a shape that takes seconds."""

import json
import math
from dataclasses import replace

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
    assert 0 < figures["gradient: computed tokens, of those"] < 1  # the prompts of a group are equal
    assert written["config"]["shape"] == "tiny"
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
    assert figures["gradient: computed tokens, of those"] < 0.6


def test_rollouts_of_a_shape_have_the_sizes_that_were_asked_for(tiny_shape):
    engine = TransformersEngine(bench.make_shape("tiny", tiny_shape.model))
    trajectories = bench.synthetic_rollout(engine, tiny_shape, count=2, group_size=6, seed=0)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    assert len(trajectories) == 12 and len(turns) == 24
    assert {len(turn.prompt_ids) for turn in turns} == {40} and {len(turn.completion_ids) for turn in turns} == {4}
    assert bench.tokens_written(trajectories) == 24 * 4
    first = [tuple(trajectory.turns[0].prompt_ids) for trajectory in trajectories]
    assert first[0] == first[5] != first[6] and len({str(turn.completion_ids) for turn in turns}) > 12


def batch_of(turns):
    return bench.Batch(turns, torch.ones(len(turns)), torch.ones(len(turns)), torch.zeros(len(turns), 3))


def test_work_of_rows_that_share_a_beginning():
    """Rows of 10 and 6 tokens, of which 4 are common: a tree of 12 nodes, or 20 places with padding."""
    batch = batch_of([Turn([5] * 7, [6] * 3, [0.0] * 3), Turn([5] * 4, [6] * 2, [0.0] * 2)])
    model, _ = load_model(BACKBONE)
    shared = bench.work_of(model, [batch])
    model.set_attn_implementation("sdpa")
    padded = bench.work_of(model, [batch])
    assert padded[:2] == (16, 20) and shared[:2] == (16, 12) and shared[2] < padded[2]


def test_work_equals_what_torch_counts():
    """Forward and backward through linear layers and head; rows so short that attention hardly counts."""
    model, _ = load_model(BACKBONE)
    rows = [Turn([300 + i] * 5, [310] * 4, []) for i in range(8)]
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids for row in rows]))
        hidden = states.last_hidden_state
        model.lm_head(hidden[:, 4:8]).sum().backward()
    *_, work = bench.work_of(model, [batch_of(rows)])
    assert work == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_an_unknown_shape():
    with pytest.raises(UserError, match="--shape nonsense: must be qwen2.5-0.5b"):
        bench.main(BenchConfig(shape="nonsense"))


@pytest.mark.parametrize("field", ["in_flight", "repeats", "prompt_tokens", "completion_tokens", "turns"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_numbers_out_of_range(field, value):
    with pytest.raises(UserError, match=f"--{field} {value} is out of range: "):
        BenchConfig(**{field: value})


def test_wrong_places_show_before_anything_is_measured(tmp_path, tiny_shape):
    with pytest.raises(IsADirectoryError):
        bench.main(BenchConfig(output=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bench.main(replace(tiny_shape, model="nowhere"))
    assert not (tmp_path / "runs" / "shapes" / "tiny" / "model.safetensors").exists()
