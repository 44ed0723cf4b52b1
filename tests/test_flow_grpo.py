"""The algorithm against numbers worked by hand and against loops that know no tensors. `pytest tests/test_flow_grpo.py`

The hand-worked example: one question, two trajectories, of 1 turn (won) and of 3 turns (lost).

    Eq. 7   mean 1/2, std sqrt(1/2) (divisor G - 1)          A = +0.707107 and -0.707107
    Eq. 4   each turn gets its trajectory's                   A = +, -, -, -
    Eq. 5   row weights 1/(P G T_i)                           1/2, 1/6, 1/6, 1/6

    row  ratio r      min(r A, clip(r, 0.8, 1.2) A)           mean over its tokens
    0    1.0, 1.5     0.707107, 1.2 A =  0.848528             0.777817    gains stop at 1.2
    1    0.5          0.8 A = -0.565685                      -0.565685    and at 0.8, when A < 0
    2    1.5, 1.0     1.5 A = -1.060660, -0.707107           -0.883883    what got worse counts in full
    3    0.9          0.9 A = -0.636396                      -0.636396

    KL: pi_ref / pi = 2 at the first token of row 2, k3 = 2 - log 2 - 1 = 0.306853, mean over the row 0.153426
    J = 0.777817/2 + (-0.565685 - 0.883883 - 0.636396)/6 - 0.1 * 0.153426/6 = 0.038691
"""

import math
import random

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from flow_grpo import (
    broadcast_to_turns,
    flow_grpo_loss,
    group_advantages,
    row_weights,
    token_logprobs,
    token_weights,
)
from tree import micro_batches, plant

VOCAB, EOS = 97, 1
nan, inf = float("nan"), float("inf")


@pytest.fixture(params=["tree", "sdpa"])
def model(request):
    """A random model with large weights, so that its predictions depend strongly on what each position sees."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # head size 32
        num_key_value_heads=1,
        initializer_range=0.15,
        eos_token_id=EOS,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.set_attn_implementation(request.param)
    return model


def ragged_rows(prompt_lengths=(5, 1, 9, 3, 12, 7), completion_lengths=(4, 7, 1, 12, 2, 5)):
    """Rows of random ids whose completions end with EOS; EOS also stands inside one prompt and one completion."""
    rng = random.Random(1)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(n)] for n in prompt_lengths]
    completions = [[rng.randrange(2, VOCAB) for _ in range(n - 1)] + [EOS] for n in completion_lengths]
    prompts[0][2] = completions[1][3] = EOS
    return prompts, completions


def hand_worked():
    advantages = broadcast_to_turns(group_advantages(torch.tensor([[1.0, 0.0]])), [1, 3])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]).bool()
    ratio = torch.tensor([[1.0, 1.5], [0.5, 1.0], [1.5, 1.0], [0.9, 1.0]], dtype=torch.float64)
    ref_over_new = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    logprobs = torch.full((4, 2), -3.0, dtype=torch.float64)
    return dict(
        logprobs=logprobs,
        old_logprobs=logprobs - ratio.log(),
        ref_logprobs=logprobs + ref_over_new.log(),
        advantages=advantages.double(),
        mask=mask,
        row_weights=row_weights([1, 3]).double(),
    )


def random_batch(seed=0, num_turns=(1, 3, 2, 4, 1, 2), max_tokens=6):
    """P=2, G=3, ragged turns and tokens, ratios from about 0.1 to 10, float64: (arguments of the loss, num_turns)."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(num_turns)
    lengths = torch.randint(1, max_tokens + 1, (rows,), generator=generator)
    lengths[0] = max_tokens

    def noise(scale):
        return torch.randn(rows, max_tokens, generator=generator, dtype=torch.float64) * scale

    logprobs = -2 + noise(0.5)
    batch = dict(
        logprobs=logprobs,
        old_logprobs=logprobs + noise(0.8),
        ref_logprobs=logprobs + noise(0.8),
        advantages=broadcast_to_turns(torch.tensor([[1.5, -0.5, -1.0], [-0.25, 0.75, -0.5]]), list(num_turns)).double(),
        mask=torch.arange(max_tokens) < lengths[:, None],
        row_weights=row_weights(list(num_turns)).double(),
    )
    return batch, list(num_turns)


def paper_loss(batch, num_turns, groups=2, clip_low=0.2, clip_high=0.2, kl_coef=0.0):
    """-J of Eq. 5 with nothing but loops and floats: no weights, no mask arithmetic, no clamp."""
    x = {name: value.tolist() for name, value in batch.items()}
    row, means, group_size = 0, [], len(num_turns) // groups
    for _ in range(groups):
        trajectories = []
        for _ in range(group_size):
            turns = []
            for _ in range(num_turns[len(means) * group_size + len(trajectories)]):
                tokens = []
                for j, real in enumerate(x["mask"][row]):
                    if not real:
                        continue
                    new, old, ref = (x[name][row][j] for name in ("logprobs", "old_logprobs", "ref_logprobs"))
                    advantage, ratio = x["advantages"][row], math.exp(new) / math.exp(old)
                    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
                    k3 = math.exp(ref) / math.exp(new) - (ref - new) - 1
                    tokens.append(min(ratio * advantage, bounded * advantage) - kl_coef * k3)
                turns.append(sum(tokens) / len(tokens))
                row += 1
            trajectories.append(sum(turns) / len(turns))
        means.append(sum(trajectories) / len(trajectories))
    return -sum(means) / len(means)


def gradient(batch, **options):
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, stats = flow_grpo_loss(**{**batch, "logprobs": logprobs}, **options)
    loss.backward()
    return loss.item(), logprobs.grad, stats


# --- Eq. 4 and 7: advantages ------------------------------------------------------------------------------------------


def test_hand_worked_example():
    loss, stats = flow_grpo_loss(**hand_worked(), kl_coef=0.1)
    assert group_advantages(torch.tensor([[1.0, 0.0]])).tolist() == [
        [pytest.approx(0.707107), pytest.approx(-0.707107)]
    ]
    assert row_weights([1, 3]).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert loss.item() == pytest.approx(-0.038691, abs=1e-6)
    assert stats["kl"].item() == pytest.approx(0.153426 / 6, abs=1e-6)
    assert stats["ratio"].item() == pytest.approx(1.25 / 2 + (0.5 + 1.25 + 0.9) / 6, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(0.5 / 2 + 1 / 6)  # 1.5 of row 0 and 0.5 of row 1


def test_advantages_are_those_of_numpy_and_sum_to_zero():
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    advantages = group_advantages(torch.tensor(rewards))
    assert advantages.shape == (5, 8) and advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages, centred / rewards.std(axis=1, ddof=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(group_advantages(torch.tensor(rewards), normalize_std=False), centred, rtol=1e-5)
    np.testing.assert_allclose(advantages.sum(dim=1), np.zeros(5), atol=1e-5)


def test_integer_rewards_and_rewards_that_hardly_differ():
    assert group_advantages(torch.tensor([[1, 0]])).tolist() == [[pytest.approx(0.707107), pytest.approx(-0.707107)]]
    tiny = group_advantages(torch.tensor([[0.0, 1e-30], [1.0, 1.00001]]))  # no epsilon swallows a real difference
    torch.testing.assert_close(tiny, torch.tensor([[-0.707107, 0.707107]] * 2))
    rounded = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3], [1e8 + 1e-8, 1e8, 1e8, 1e8]], dtype=torch.float64)
    assert (group_advantages(rounded) == 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e8])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_equal_rewards_gets_exactly_zero(value, normalize_std):
    for size in (2, 3, 6, 7, 8, 10):  # the mean of three 0.1 is not 0.1: the std would blow up the rest
        rewards = torch.tensor([[value] * size, [1.0] + [0.0] * (size - 1)], dtype=torch.float64)
        advantages = group_advantages(rewards, normalize_std)
        assert (advantages[0] == 0).all() and (advantages[1] != 0).all()


@pytest.mark.parametrize(
    "rewards, message",
    [
        (torch.tensor([[1.0, nan]]), "finite"),
        (torch.tensor([[1.0, inf]]), "finite"),
    ],
)
def test_bad_rewards_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards)


def test_turns_do_not_enter_the_group_statistics():
    """4 wins of 3 turns and 4 losses of 1 turn: +-0.935 over trajectories; pooling 16 turns gives +0.559, -1.677."""
    rewards, num_turns = torch.tensor([[1.0] * 4 + [0.0] * 4]), [3] * 4 + [1] * 4
    rows = broadcast_to_turns(group_advantages(rewards), num_turns)
    torch.testing.assert_close(rows, torch.tensor([0.935414] * 12 + [-0.935414] * 4))
    pooled = np.array([1.0] * 12 + [0.0] * 4)
    pooled = (pooled - pooled.mean()) / pooled.std(ddof=1)
    assert (pooled[0], pooled[-1]) == pytest.approx((0.559017, -1.677051), abs=1e-6)  # what it must not be

    longer = broadcast_to_turns(group_advantages(rewards), [4] + num_turns[1:])  # a turn of the first one, twice
    assert longer.tolist() == [rows[0].item(), *rows.tolist()]
    # and that trajectory as a whole weighs what it weighed before
    assert row_weights([4] + num_turns[1:])[:4].sum().item() == pytest.approx(row_weights(num_turns)[:3].sum().item())


def test_broadcast_follows_question_then_sample():
    advantages = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert broadcast_to_turns(advantages, [1, 2, 3, 1]).tolist() == [1, 2, 2, 3, 3, 3, 4]
    with pytest.raises(ValueError, match="1 turn counts for 4"):  # torch would repeat each one 3 times
        broadcast_to_turns(advantages, [3])


def test_row_weights():
    assert row_weights([2, 1]).tolist() == [0.25, 0.25, 0.5]
    assert row_weights([2, 1], num_tokens=[10, 30, 60], aggregation="token-mean").tolist() == pytest.approx(
        [0.1, 0.3, 0.6]
    )


def test_token_weights():
    """Each row spreads its weight evenly over its own tokens. A pad has none."""
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    weights = token_weights(torch.tensor([0.25, 0.5]), mask)
    assert weights.tolist() == [[0.125, 0.125, 0.0, 0.0], [0.125, 0.125, 0.125, 0.125]]


# --- Eq. 5: the loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.3), (0.05, 0.5)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0])
def test_loss_is_equation_5(clip, kl_coef):
    for seed in range(5):
        batch, num_turns = random_batch(seed)
        ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()[batch["mask"]]
        assert ratio.min() < 0.6 and ratio.max() > 2
        options = dict(clip_low=clip[0], clip_high=clip[1], kl_coef=kl_coef)
        loss, stats = flow_grpo_loss(**batch, **options)
        assert loss.item() == pytest.approx(paper_loss(batch, num_turns, **options), rel=1e-6)
        assert 0.2 < stats["clip_fraction"] < 0.8


def test_gradient_is_that_of_equation_5():
    """Against differences of the loops: the KL pulls, and what is clipped has no gradient."""
    batch, num_turns = random_batch(3)
    options = dict(clip_high=0.3, kl_coef=0.05)
    _, grad, _ = gradient(batch, **options)
    for row, column in batch["mask"].nonzero().tolist():
        losses = []
        for step in (1e-6, -1e-6):
            moved = batch["logprobs"].clone()
            moved[row, column] += step
            losses.append(paper_loss({**batch, "logprobs": moved}, num_turns, **options))
        assert grad[row, column].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-7)
    assert (grad[~batch["mask"]] == 0).all()


def test_token_mean_counts_every_token_once():
    batch, num_turns = random_batch(1)
    lengths = batch["mask"].sum(dim=1).tolist()
    batch["row_weights"] = row_weights(num_turns, lengths, "token-mean").double()
    loss, _ = flow_grpo_loss(**batch, kl_coef=0)
    advantages = batch["advantages"][:, None].numpy()
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp().numpy()
    terms = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    assert loss.item() == pytest.approx(-terms[batch["mask"].numpy()].mean(), rel=1e-6)


def test_clip_is_asymmetric_when_asked():
    """A > 0: the ratio may rise to 1 + clip_high. A < 0: it may fall to 1 - clip_low. Beyond, no gradient."""
    for advantage, ratio, clip_low, clip_high, has_gradient in [
        (1.0, 1.25, 0.2, 0.2, False),
        (1.0, 1.25, 0.2, 0.3, True),
        (1.0, 1.35, 0.2, 0.3, False),
        (1.0, 0.10, 0.2, 0.3, True),  # a good token that has become less likely is always pulled back
        (-1.0, 0.75, 0.2, 0.3, False),
        (-1.0, 0.75, 0.3, 0.2, True),
        (-1.0, 9.00, 0.2, 0.3, True),
    ]:
        batch = dict(
            logprobs=torch.tensor([[math.log(ratio)]]),
            old_logprobs=torch.zeros(1, 1),
            ref_logprobs=None,
            advantages=torch.tensor([advantage]),
            mask=torch.ones(1, 1).bool(),
            row_weights=torch.ones(1),
        )
        _, grad, stats = gradient(batch, clip_low=clip_low, clip_high=clip_high)
        assert grad.item() == pytest.approx(-advantage * ratio if has_gradient else 0.0)
        assert stats["clip_fraction"].item() == (0 if has_gradient else 1)


@pytest.mark.parametrize("advantage, log_ratio, held", [(-1.0, 59.0, True), (-1.0, 1.0, False), (1.0, 59.0, False)])
def test_dual_clip_bounds_the_loss_of_a_wrong_token(advantage, log_ratio, held):
    row = dict(old_logprobs=torch.zeros(1, 1), ref_logprobs=None, mask=torch.ones(1, 1).bool())
    row |= dict(logprobs=torch.tensor([[log_ratio]]), advantages=torch.tensor([advantage]), row_weights=torch.ones(1))
    unbounded, bounded = gradient(row), gradient(row, dual_clip=3.0)
    assert unbounded[1].abs().item() > 1e25 or not held
    assert (bounded[0], bounded[1].item()) == ((3.0, 0.0) if held else (unbounded[0], unbounded[1].item()))


def test_first_update_is_the_plain_policy_gradient():
    batch, _ = random_batch(2)
    batch["old_logprobs"] = batch["logprobs"].detach().clone()
    _, grad, stats = gradient(batch, kl_coef=0)
    assert stats["ratio"].item() == pytest.approx(1, abs=1e-7)
    assert stats["clip_fraction"] == 0 and stats["kl"] == 0
    tokens = batch["mask"].sum(dim=1)
    expected = batch["mask"] * (-batch["row_weights"] * batch["advantages"] / tokens)[:, None]
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_a_dead_group_is_moved_by_the_kl_term_alone():
    batch, _ = random_batch(4)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    assert (gradient(batch, kl_coef=0)[1] == 0).all()
    assert (gradient(batch, kl_coef=0.1)[1][batch["mask"]] != 0).all()


def test_kl_is_skipped_without_coefficient_or_reference():
    batch, _ = random_batch(5)
    without = flow_grpo_loss(**{**batch, "ref_logprobs": None}, kl_coef=0.1)
    zero = flow_grpo_loss(**{**batch, "ref_logprobs": batch["ref_logprobs"] * nan}, kl_coef=0)
    on = flow_grpo_loss(**batch, kl_coef=0.1)
    assert without[0] == zero[0] == pytest.approx((on[0] - 0.1 * on[1]["kl"]).item())
    assert without[1]["kl"] == zero[1]["kl"] == 0 < on[1]["kl"]


def test_masked_positions_may_hold_anything():
    clean, _ = random_batch(6)
    pads = ~clean["mask"]
    assert pads.sum() > 10
    clean["sampler_logprobs"] = clean["old_logprobs"] + 0.1
    options = dict(kl_coef=0.05, tis_cap=2.0)
    loss, grad, stats = gradient(clean, **options)
    for garbage in (inf, -inf, nan, 1e30):
        dirty = {
            name: x.masked_fill(pads, garbage) if x.shape == pads.shape and name != "mask" else x
            for name, x in clean.items()
        }
        dirty_loss, dirty_grad, dirty_stats = gradient(dirty, **options)
        assert dirty_loss == loss and dirty_stats == stats
        assert torch.equal(dirty_grad, grad) and (grad[pads] == 0).all() and grad.isfinite().all()


def test_truncated_importance_weights():
    batch, _ = random_batch(7)
    mask, options = batch["mask"], dict(kl_coef=0.05)
    plain = gradient(batch, **options)
    same = gradient({**batch, "sampler_logprobs": batch["old_logprobs"]}, tis_cap=2.0, **options)
    assert same[0] == plain[0] and torch.equal(same[1], plain[1])  # weight 1
    off = gradient({**batch, "sampler_logprobs": batch["old_logprobs"] - 5}, **options)
    assert off[0] == plain[0] and torch.equal(off[1], plain[1])  # no cap, no weight

    # pi_old / pi_sampler = 1.5 at even columns, 100 at odd ones: the cap of 2 holds the second, the KL is not weighed.
    gap = torch.where(torch.arange(mask.shape[1]) % 2 == 0, math.log(1.5), math.log(100.0)).double().expand(mask.shape)
    kl = gradient({**batch, "advantages": torch.zeros_like(batch["advantages"])}, **options)[1]
    _, capped, stats = gradient({**batch, "sampler_logprobs": batch["old_logprobs"] - gap}, tis_cap=2.0, **options)
    torch.testing.assert_close(capped - kl, (plain[1] - kl) * gap.exp().clamp(max=2.0))
    weights = batch["row_weights"][:, None] * mask / mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(stats["importance"], (weights * gap.exp().clamp(max=2.0)).sum())

    leaves = {name: batch["old_logprobs"].clone().requires_grad_() for name in ("old_logprobs", "sampler_logprobs")}
    leaves["ref_logprobs"] = batch["ref_logprobs"].clone().requires_grad_()
    logprobs = batch["logprobs"].clone().requires_grad_()
    flow_grpo_loss(**{**batch, **leaves, "logprobs": logprobs}, tis_cap=2.0, **options)[0].backward()
    assert logprobs.grad is not None and all(leaf.grad is None for leaf in leaves.values())


def test_loss_refuses_shapes_that_would_broadcast():
    batch, _ = random_batch(8)
    for name, wrong, message in [
        ("advantages", batch["advantages"][:, None], r"expected \(B,\)"),
        ("row_weights", batch["row_weights"][:-1], r"expected \(B,\)"),
        ("old_logprobs", batch["old_logprobs"][:1], r"must be \(B, T\)"),
        ("ref_logprobs", batch["ref_logprobs"][:, :1], r"must be \(B, T\)"),
        ("mask", batch["mask"][:, :1], r"must be \(B, T\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow_grpo_loss(**{**batch, name: wrong})


# --- a step in parts --------------------------------------------------------------------------------------------------


def test_splitting_into_micro_batches_changes_nothing(model):
    """Six rows of two groups through the model, whole and split: the same loss, stats and gradient."""
    num_turns = [2, 1, 1, 2]
    prompts, completions = ragged_rows()
    advantages = broadcast_to_turns(group_advantages(torch.tensor([[1.0, 0.0], [0.3, 0.9]])), num_turns)
    weights = row_weights(num_turns)
    torch.manual_seed(1)
    gap = torch.randn(2, len(prompts), 12) * 0.5

    def run(split):
        model.zero_grad()
        total = {}
        for rows in split:
            logprobs, mask, _ = token_logprobs(model, [prompts[i] for i in rows], [completions[i] for i in rows], 0.7)
            assert not total or logprobs.shape[0] < len(prompts)
            old, ref = logprobs.detach() + gap[:, rows, : logprobs.shape[1]]
            loss, stats = flow_grpo_loss(logprobs, old, ref, advantages[rows], mask, weights[rows], kl_coef=0.05)
            loss.backward()
            for name, value in {"loss": loss.detach(), **stats}.items():
                total[name] = total.get(name, 0.0) + value.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, grad = run([[0, 1, 2, 3, 4, 5]])
    assert 0 < whole["clip_fraction"] < 1 and whole["kl"] > 0 and grad.norm() > 0.1
    shuffled = random.Random(0).sample(range(6), 6)
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
    for split in (
        [[i] for i in range(6)],
        [[0, 1], [2, 3], [4, 5]],
        [[0, 1, 2], [3, 4, 5]],
        [shuffled[:1], shuffled[1:5], shuffled[5:]],
        micro_batches(lengths, max_tokens=30),
    ):
        part, part_grad = run(split)
        assert part == pytest.approx(whole, abs=1e-6)
        assert (part_grad - grad).abs().max() < 1e-6 * max(1.0, grad.abs().max().item())


# --- token log-probs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_one_row_at_a_time(model, temperature):
    prompts, completions = ragged_rows()
    logprobs, mask, entropy = token_logprobs(model, prompts, completions, temperature)
    assert logprobs.shape == mask.shape == entropy.shape == (6, 12)
    assert mask.sum(dim=1).tolist() == [len(c) for c in completions] and not entropy.requires_grad
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        table = (logits / temperature).log_softmax(dim=-1)
        expected = table[range(len(completion)), completion]
        assert mask[row].tolist() == [True] * len(completion) + [False] * (12 - len(completion))
        torch.testing.assert_close(logprobs[row][mask[row]], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy[row][mask[row]], -(table.exp() * table).sum(dim=-1), rtol=0, atol=1e-5)
    assert logprobs[mask].std() > 1  # far from uniform: the comparison means something
    assert (logprobs[~mask] == 0).all() and (entropy[~mask] == 0).all()


def loss_and_gradient(model, prompts, completions, **options):
    model.zero_grad()
    logprobs, mask, _ = token_logprobs(model, prompts, completions, 0.7, **options)
    torch.manual_seed(2)
    (logprobs * torch.randn(logprobs.shape)).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_chunk_size_changes_neither_values_nor_gradients(model):
    rows = ragged_rows()
    logprobs, grad = loss_and_gradient(model, *rows, chunk_size=1000)
    assert grad.norm() > 1
    for chunk_size in (1, 7, 31):
        other, other_grad = loss_and_gradient(model, *rows, chunk_size=chunk_size)
        torch.testing.assert_close(other, logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_full_logits(model):
    prompts, completions = ragged_rows()
    _, grad = loss_and_gradient(model, prompts, completions, chunk_size=7)
    torch.manual_seed(2)
    factors = torch.randn(6, 12)
    model.zero_grad()
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        table = (model(torch.tensor([prompt + completion])).logits[0] / 0.7).log_softmax(dim=-1)
        chosen = table[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]
        (chosen * factors[row, : len(completion)]).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_logits_exist_for_completion_tokens_only_and_a_chunk_at_a_time(model):
    prompts, completions = ragged_rows()
    total = sum(map(len, completions))
    seen, packed = [], []
    model.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits.numel() // VOCAB))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(tuple(x.shape)) or x, lambda x: x):
        logprobs, _, _ = token_logprobs(model, prompts, completions, chunk_size=8)
    assert sum(seen) == total and max(seen) == 8
    assert packed and not [shape for shape in packed if shape[-1:] == (VOCAB,)]  # none kept for the backward pass
    logprobs.sum().backward()
    assert sum(seen) == 2 * total and max(seen) == 8  # where each chunk is computed once more


def test_a_larger_vocabulary_takes_no_more_memory(model, monkeypatch):
    """C x V stays below the limit, so the logits of a chunk weigh the same for every vocabulary."""
    prompts, completions = ragged_rows()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("flow_grpo.MAX_LOGITS", 5 * VOCAB)
        hook = model.lm_head.register_forward_hook(lambda _, inputs, logits: seen.append(logits.numel()))
        token_logprobs(model, prompts, completions)
        hook.remove()
    assert max(seen) == 5 * VOCAB


def test_gradient_flows_through_completion_positions_only(model):
    prompts, completions = ragged_rows()
    kept = []
    model.model.register_forward_hook(lambda _, args, output: kept.append(output.last_hidden_state))
    logprobs, _, _ = token_logprobs(model, prompts, completions)
    kept[0].retain_grad()
    (-logprobs).sum().backward()
    reached = kept[0].grad.abs().sum(dim=-1).flatten() > 0
    reached = reached[plant([p + c for p, c in zip(prompts, completions)], model).nodes]
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        positions = list(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
        assert reached[row][: len(prompt + completion)].nonzero().flatten().tolist() == positions


def test_the_final_eos_is_trained_even_when_it_is_also_the_pad(model):
    prompts, completions = ragged_rows()
    logprobs, mask, _ = token_logprobs(model, prompts, completions)
    logprobs.retain_grad()
    advantages, weights = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5]), row_weights([2, 1, 1, 2])
    flow_grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, weights)[0].backward()
    for row, completion in enumerate(completions):
        assert completion[-1] == EOS
        expected = -weights[row] * advantages[row] / len(completion)
        assert logprobs.grad[row, len(completion) - 1].item() == pytest.approx(expected.item())
        assert (logprobs.grad[row, len(completion) :] == 0).all()


def test_a_step_down_the_gradient_favours_what_won(model):
    """One update on two completions of one prompt: the one with the positive advantage becomes more likely."""
    prompts, completions = [[5, 6, 7]] * 2, [[11, 12, EOS], [21, 22, 23, EOS]]
    advantages = broadcast_to_turns(group_advantages(torch.tensor([[1.0, 0.0]])), [1, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before, mask, _ = token_logprobs(model, prompts, completions)
    flow_grpo_loss(before, before.detach(), before.detach(), advantages, mask, row_weights([1, 1]))[0].backward()
    optimizer.step()
    change = (token_logprobs(model, prompts, completions)[0] - before).sum(dim=1)
    assert change[0] > 0 > change[1]


@pytest.mark.parametrize("prompts, completions", [([[1, 2]], [[]]), ([[]], [[1, 2]])])
def test_empty_rows_are_refused_before_the_model_is_touched(prompts, completions):
    with pytest.raises(ValueError, match="empty"):
        token_logprobs(None, prompts, completions)
