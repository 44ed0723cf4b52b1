"""Rows as trees: the same numbers as one row at a time, each shared token once, and what falls back to plain rows."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tree
from flow_grpo import token_logprobs
from lab.pretrain import BACKBONE
from llm import load_model
from tree import micro_batches, plant, split_rows, use_trees

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def random_model(model_class=Qwen2ForCausalLM, config_class=Qwen2Config, **options):
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=97, initializer_range=0.15, **SIZES, **options)).eval()
    use_trees(model)
    return model


def growing_rows(questions=3, samples=4, turns=3, seed=0):
    """Prompts and completions as an agent makes them: all begin alike, then those of a question, then a memory grows.
    Some completions are equal, some have one token, and one row is a prefix of another."""
    rng = random.Random(seed)
    words = lambda n: [rng.randrange(2, 97) for _ in range(n)]  # noqa: E731
    prompts, completions, start = [], [], words(20)
    for _ in range(questions):
        question = words(rng.randint(1, 9))
        for sample in range(samples):
            memory = []
            for _ in range(rng.randint(1, turns)):
                completion = [5, 1] if sample < 2 else words(rng.randint(1, 12))
                prompts.append([*start, *question, *memory])
                completions.append(completion)
                memory += completion + words(rng.randint(0, 15))
    return [*prompts, start], [*completions, [*prompts[0][len(start) :], 7]]


def loss_and_gradient(model, prompts, completions):
    model.zero_grad()
    logprobs, mask, entropy = token_logprobs(model, prompts, completions, 0.7)
    torch.manual_seed(2)
    (logprobs * torch.randn(logprobs.shape)).sum().backward()
    return logprobs.detach(), entropy, torch.cat([p.grad.flatten() for p in model.parameters()])


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_the_tree_of_the_docstring():
    a, b, c, d, e, f = range(6)
    grown = plant([[f], [a, b, d, e], [a, b, c]], random_model())
    assert grown.inputs["input_ids"].tolist() == [[a, b, c, d, e, f]]
    assert grown.inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3, 0]]
    assert grown.nodes.tolist() == [[5, -1, -1, -1], [0, 1, 3, 4], [0, 1, 2, -1]]
    ((keys, sees),) = grown.inputs["tree"]
    assert keys.tolist() == [[0, 1, 2, 3, 4, 5]]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]
    assert [row.nonzero().flatten().tolist() for row in sees[0, 0, :6]] == seen


@pytest.mark.parametrize(("block", "at_once"), [(1, 1), (7, 1), (7, 4), (128, 1)])
@pytest.mark.parametrize("family", [(Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)])
def test_numbers_and_gradient_are_those_of_plain_rows(family, block, at_once, monkeypatch):
    monkeypatch.setattr(tree, "BLOCK", block)
    monkeypatch.setattr(tree, "AT_ONCE", {"cpu": at_once})  # several, with pads, as on a GPU
    model, rows = random_model(*family), growing_rows()
    shared = loss_and_gradient(model, *rows)
    assert plant([p + c for p, c in zip(*rows)], model).inputs["input_ids"].numel() < sum(map(len, rows[0])) / 2
    model.set_attn_implementation("sdpa")
    for one, other in zip(shared, loss_and_gradient(model, *rows)):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_flex_attention_agrees(monkeypatch):
    """The mask of a tree is one line for FlexAttention too; torch's own kernel gives the same states."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    model = random_model()
    rows = [p + c for p, c in zip(*growing_rows())]
    inputs = plant(rows, model).inputs
    n = inputs["input_ids"].numel()
    sees = torch.zeros(n, n, dtype=torch.bool)
    ((blocks_of_keys, parts),) = inputs["tree"]
    for keys, part, queries in zip(blocks_of_keys, parts, torch.arange(n).split(tree.BLOCK)):
        sees[queries[:, None], keys] = part[0, : len(queries)]
    end = n - sees.flip(0).int().argmax(dim=0)  # one past the last node that sees m

    def mask(batch, head, query, key):
        return (key <= query) & (query < end[key])

    block_mask = create_block_mask(mask, None, None, n, n, device="cpu")
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        flex = lambda module, q, k, v, _, scaling, **options: (  # noqa: E731
            flex_attention(q, k, v, block_mask=block_mask, scale=scaling, enable_gqa=True).transpose(1, 2), None
        )  # fmt: skip
        monkeypatch.setitem(tree.AttentionInterface._global_mapping, "tree", flex)
        torch.testing.assert_close(model.model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_cudnn_is_out_of_the_way():
    """It plans anew for each length, so each new token of a batch would cost a plan."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_equal_rows_cost_one_row_and_get_one_gradient():
    model = random_model()
    row = [3, 4, 5], [6, 7]
    _, _, once = loss_and_gradient(model, [row[0]], [row[1]])
    assert plant([[*row[0], *row[1]]] * 9, model).inputs["input_ids"].shape == (1, 5)
    model.zero_grad()
    logprobs, _, _ = token_logprobs(model, [row[0]] * 9, [row[1]] * 9, 0.7)
    torch.manual_seed(2)
    (logprobs * torch.randn(1, 2) / 9).sum().backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), once, rtol=1e-5, atol=1e-6)


# --- which models take trees ------------------------------------------------------------------------------------------


def test_a_model_with_another_attention_gets_plain_rows():
    model = random_model(MistralForCausalLM, MistralConfig, sliding_window=8)
    assert model.config._attn_implementation == "sdpa"
    assert set(plant([[1, 2], [1, 3]], model).inputs) == {"input_ids"}


def test_padded_rows_are_masked_as_ever():
    """Whoever gives the model a batch with a mask, as `generate` does, gets what each row alone gives."""
    model, row = random_model(), [5, 6, 7, 8]
    ids, mask = torch.tensor([[9, 9, *row], [1, 2, *row]]), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, 2:]
    torch.testing.assert_close(padded, model(input_ids=torch.tensor([row])).logits[0], rtol=1e-5, atol=1e-5)


def test_a_saved_model_does_not_remember_its_attention(tmp_path):
    model, tokenizer = load_model(BACKBONE)
    assert model.config._attn_implementation == "tree"
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text().replace("attention", "")


# --- which rows run together ------------------------------------------------------------------------------------------


def test_trees_hold_neighbours_and_fit():
    prompts, completions = growing_rows(questions=9, samples=6)
    rows = [p + c for p, c in zip(prompts, completions)]
    model = random_model()
    for limit in (60, 200, 10_000):
        split = split_rows(rows, limit, model)
        assert sorted(i for batch in split for i in batch) == list(range(len(rows)))
        sizes = [plant([rows[i] for i in batch], model).inputs["input_ids"].numel() for batch in split]
        assert all(size <= limit or len(batch) == 1 for size, batch in zip(sizes, split))
        assert len(split) < 1.5 * sum(sizes) / limit + 2
    assert len(split) == 1 and sizes[0] < sum(map(len, rows)) / 4
    assert split_rows([[1] * 50], 10, model) == [[0]]  # too long for the limit: alone


def test_micro_batches_fit_and_pad_little():
    assert micro_batches([3, 19, 4, 20, 3], max_tokens=40) == [[3, 1], [2], [0, 4]]  # 4 3 3 would be 1/6 padding
    assert micro_batches([5, 50, 5], max_tokens=10) == [[1], [0, 2]]  # too long for the limit: alone
    assert micro_batches([], max_tokens=10) == []
    rng = random.Random(0)
    lengths = [rng.randint(1, 200) for _ in range(300)]
    batches = micro_batches(lengths, max_tokens=1000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1000 for batch in batches)
    cost = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sum(lengths) <= cost <= sum(lengths) / (1 - 0.05)
    assert batches == micro_batches(lengths, max_tokens=1000)
