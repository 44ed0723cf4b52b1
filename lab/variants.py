"""Variants of Flow-GRPO, as other papers or the authors' code would have it: each is an edit of a few lines.

`PATCHES` maps a variant to the function that takes the place of one of train.py's during a run. `FLAGS` maps it to the
flags that it sets. `lab/paper.py` runs them beside the baseline and shows each edit next to its curve.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flow_grpo import broadcast_to_turns, flow_grpo_loss, token_weights
from judge import score


def last_turn(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """The last turn alone gets the outcome. (P, G) -> (B,)"""
    rows = torch.zeros(sum(num_turns))  # (B,)
    rows[torch.tensor(num_turns).cumsum(0) - 1] = advantages.flatten()
    return rows


def fading_credit(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """Turn-level credit: half as much for each turn further from the outcome. (P, G) -> (B,)"""
    to_the_end = torch.cat([torch.arange(turns).flip(0) for turns in num_turns])  # (B,)
    return broadcast_to_turns(advantages, num_turns) * 0.5**to_the_end


def turn_pooled(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """As the authors' code: mean and std over all turns of a group, so long trajectories count more. (P, G) -> (B,)

    To standardise Eq. 7's advantages once more gives the same as to standardise the rewards.
    """
    turns_of_group = torch.tensor(num_turns).view(advantages.shape).sum(dim=1)  # (P,)
    groups = broadcast_to_turns(advantages, num_turns).split(turns_of_group.tolist())
    return torch.cat([(rows - rows.mean()) / rows.std() if rows.any() else rows for rows in groups])


def same_turn(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """Turn-level credit: a turn is compared with the group's turns that have its number. (P, G) -> (B,)"""
    number = torch.cat([torch.arange(turns) for turns in num_turns])  # (B,)
    question = torch.arange(len(advantages)).repeat_interleave(advantages.shape[1])  # (P * G,)
    question = question.repeat_interleave(torch.tensor(num_turns))  # (B,)
    rows = broadcast_to_turns(advantages, num_turns)  # (B,)
    credit = torch.zeros_like(rows)
    for n in range(max(num_turns)):
        for p in range(len(advantages)):
            here = (number == n) & (question == p)
            if here.any() and rows[here].max() > rows[here].min():  # the std of equal numbers need not be 0
                credit[here] = (rows[here] - rows[here].mean()) / rows[here].std()
    return credit


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
    advantages: Tensor, mask: Tensor, row_weights: Tensor, **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """GSPO (arXiv 2507.18071): one ratio per turn, the geometric mean of its tokens' ratios; the KL is the same."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)  # (B, 1)
    loss, stats = flow_grpo_loss(old_logprobs + mean, old_logprobs, None, advantages, mask, row_weights, **settings)
    no_gain = torch.zeros_like(advantages)  # (B,)
    kl, kl_stats = flow_grpo_loss(logprobs, old_logprobs, ref_logprobs, no_gain, mask, row_weights, **settings)
    return loss + kl, stats | {"kl": kl_stats["kl"]}


def clipped_weight(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
    advantages: Tensor, mask: Tensor, row_weights: Tensor, *, clip_low: float, clip_high: float, **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """CISPO (arXiv 2506.13585): the ratio, clipped from above, is a constant weight on A log pi, so no token loses its
    gradient. Means and KL are those of Flow-GRPO."""
    no_gain = torch.zeros_like(advantages)  # (B,)
    kl, stats = flow_grpo_loss(logprobs, old_logprobs, ref_logprobs, no_gain, mask, row_weights, **settings)
    ratio = torch.where(mask, logprobs.detach() - old_logprobs, 0.0).exp()  # (B, T)
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    weights = token_weights(row_weights, mask)  # (B, T)
    gain = weights * weight * advantages[:, None] * torch.where(mask, logprobs, 0.0)  # (B, T)
    return kl - gain.sum(), stats | {"clip_fraction": (weights * (weight != ratio)).sum()}


def noisy_judge(examples: list, groups: list[list], reward: Callable, frozen: Any, share: float = 0.1) -> list[tuple]:
    """`judge.score`, but a tenth of the verdicts is wrong, in either direction."""
    pairs = score(examples, groups, reward, frozen)
    for place, (example, trajectory) in enumerate(pairs):
        if random.Random(f"{place} {example.question} {trajectory.answer}").random() < share:
            trajectory.reward = 1 - trajectory.reward
    return pairs


def noisier_judge(examples: list, groups: list[list], reward: Callable, frozen: Any) -> list[tuple]:
    """A fifth of the verdicts is wrong."""
    return noisy_judge(examples, groups, reward, frozen, share=0.2)


PATCHES: dict[str, tuple[str, Callable]] = {  # variant: (name in train.py, what stands there instead)
    "last-turn": ("broadcast_to_turns", last_turn),
    "fading-credit": ("broadcast_to_turns", fading_credit),
    "same-turn": ("broadcast_to_turns", same_turn),
    "turn-pooled": ("broadcast_to_turns", turn_pooled),
    "gspo": ("flow_grpo_loss", sequence_ratio),
    "cispo": ("flow_grpo_loss", clipped_weight),
    "noisy-10": ("score", noisy_judge),
    "noisy-20": ("score", noisier_judge),
}
FLAGS: dict[str, dict] = {  # variant: what differs from the baseline's flags
    "no-std": dict(normalize_std=False),
    "no-kl": dict(kl_coef=0.0),
    "more-kl": dict(kl_coef=0.01),
    "one-update": dict(updates_per_step=1),
    "wide-clip": dict(clip_high=0.3),
    "four-updates": dict(updates_per_step=4),
    "four-updates-wide-clip": dict(updates_per_step=4, clip_high=0.3),
    "token-mean": dict(aggregation="token-mean"),
    "cispo": dict(clip_low=1.0),  # no lower bound, as in its paper
    "gspo": dict(clip_low=0.03, clip_high=0.04),  # a mean over tokens moves less than one token does
}
# The variants that `lab/paper.py` compares with the baseline on the hard split.
ABLATIONS = (
    "baseline", "last-turn", "fading-credit", "same-turn", "turn-pooled", "no-std", "no-kl", "more-kl", "one-update",
    "wide-clip", "four-updates", "four-updates-wide-clip", "token-mean", "gspo", "cispo",
)  # fmt: skip
