"""Variants of Flow-GRPO, as the paper's own ablations or other papers would have it: each is an edit of a few lines.

`PATCHES` puts a function in the place of one of train.py's for the time of a run, and `FLAGS` sets flags of train.py.
`lab/paper.py` runs all of them beside the baseline and shows each edit next to its learning curve.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flow_grpo import broadcast_to_turns, flow_grpo_loss


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


PATCHES: dict[str, tuple[str, Callable]] = {  # variant: (name in train.py, what stands there instead)
    "last-turn": ("broadcast_to_turns", last_turn),
    "fading-credit": ("broadcast_to_turns", fading_credit),
    "turn-pooled": ("broadcast_to_turns", turn_pooled),
    "gspo": ("flow_grpo_loss", sequence_ratio),
}
TWO = dict(updates_per_step=2)  # with a single update the ratio is 1 and nothing is clipped: such variants need more
FLAGS: dict[str, dict] = {  # variant: what differs from train.py's defaults
    "no-std": dict(normalize_std=False),
    "no-kl": dict(kl_coef=0.0),
    "two-updates": TWO,
    "dapo": TWO | dict(clip_high=0.28, aggregation="token-mean"),
    "gspo": TWO | dict(clip_low=0.03, clip_high=0.04),  # a mean over tokens moves less than one token does
}
COMPARED = ("baseline", "last-turn", "fading-credit", "turn-pooled", "no-std", "no-kl", "two-updates", "dapo", "gspo")
