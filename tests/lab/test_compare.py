"""The ratios against others: the others' numbers are ours, and the figures are there."""

import pytest
import torch

from agent import Turn
from flow_grpo import token_logprobs
from lab import compare
from lab.pretrain import BACKBONE
from llm import TransformersEngine


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(BACKBONE)


def turns_of(engine, count=6):
    start = engine.encode("Who is the mayor of Vibel?")
    return [Turn([*start, 300 + n % 3], [310 + n % 2, 256], [0.0, 0.0]) for n in range(count)]


def test_figures(engine):
    figures = compare.compare(engine.model, engine, turns_of(engine), max_tokens=60, repeats=1, device="cpu")
    assert figures["gradient_tokens"] > 2 * figures["gradient_tokens_as_trees"]
    assert figures["prefill_tokens"] > 2 * figures["prefill_tokens_as_trees"]
    for name in ("gradient_vs_padded", "prefill_vs_padded", "prefill_vs_generate", "decode_vs_generate"):
        assert name in figures
    assert engine.model.config._attn_implementation == "tree"


def test_rows_as_they_come():
    assert compare.consecutive([3, 5, 1, 9, 2], 10) == [[0, 1], [2], [3], [4]]


def test_trl_computes_the_same_log_probs(engine):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    turns = turns_of(engine)
    turns[0].prompt_ids = turns[0].prompt_ids[:-1]
    theirs = compare.trl_logprobs(engine.model, turns)
    ours, _, _ = token_logprobs(engine.model, [t.prompt_ids for t in turns], [t.completion_ids for t in turns])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
