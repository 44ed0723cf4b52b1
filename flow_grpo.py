"""Flow-GRPO (arXiv 2510.05592, Eq. 4-7): advantages, token log-probs and the clipped loss, as pure functions.

The planner answers each question G times. Turn t of trajectory i is one completion a of |a| tokens, sampled from pi_old
given its own prompt s (question, analysis, memory so far): a turn is a training row of its own. J is for one question;
a step takes its mean over P questions. The trainer computes log pi_old anew. The sampler's own log-probs, equal up to
rounding, serve `sampler_gap` and `tis_cap` alone.

  R_i  in {0, 1}, one outcome for the whole trajectory, broadcast to each of its turns                          (Eq. 4)
  J  = 1/G sum_i  1/T_i sum_t  1/|a| sum_j  min(r A, clip(r, 1 - eps, 1 + eps) A)  -  beta KL(pi || pi_ref)     (Eq. 5)
  r  = pi(a_j | s, a_<j) / pi_old(a_j | s, a_<j), for token j of turn t of trajectory i                         (Eq. 6)
  A  = (R_i - mean_k R_k) / std_k R_k, over the G trajectories; the same for all turns and tokens of i          (Eq. 7)

Shapes: P questions, G trajectories per question (a group), T_i turns in trajectory i, B rows (turns) per batch or
micro-batch; T tokens in its longest completion, S in its longest prompt + completion, N in all its completions, K
different ones of these, C per chunk of them; D hidden size, V vocabulary.

Same as the paper
  three nested means, over trajectories, turns and tokens: a long trajectory weighs no more than a short one    (Eq. 5)
  mean and std of the G trajectories, never pooled over turns: more turns do not shift the baseline             (Eq. 7)
  the ratio of each token is clipped to 1 +- eps; KL to the initial policy with beta = 0.001                    (Eq. 5)
  (in the first update on a batch of rollouts r = 1 and no clip acts; train.py makes two, and in the second it does)
Where the paper gives no value, we take
  eps = 0.2; KL by the k3 estimator, under the same means; std with G - 1; a group of equal rewards gets A = 0
Departs, and why; all off by default
  clip_high=0.3        as the authors ran it: an unlikely token can rise further before it is clipped           (Eq. 5)
  "token-mean"         as the authors ran it: every token counts the same, so long rows count more              (Eq. 5)
  normalize_std=False  Dr. GRPO: dividing by std favours questions that are nearly always solved or failed      (Eq. 7)
  dual_clip=3          as the authors ran it: for A < 0, r A has no lower bound, so take max(., 3 A)             (Eq. 5)
  tis_cap              sampler and trainer differ in rounding: weigh tokens by min(pi_old / pi_sampler, cap)    (Eq. 5)
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tree import plant

MAX_LOGITS = 2**26  # per chunk, 256 MiB in float32: a larger vocabulary gets smaller chunks, not more memory


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """Eq. 7: rewards (P, G) -> advantages (P, G). One number per trajectory, so turns cannot enter the statistics."""
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite, got nan or inf")
    rewards = rewards.double()  # in float32, the std of rewards that differ could round to 0
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if normalize_std:
        advantages = advantages / rewards.std(dim=1, keepdim=True)  # (P, G), sample std: divisor G - 1
    # If all rewards are equal, Eq. 7 is 0/0 and there is nothing to learn. Equal means to six digits: the last ones may
    # differ by rounding. An epsilon in the divisor would hide this case, and would shrink every other advantage.
    no_signal = torch.isclose(rewards, rewards[:, :1], rtol=1e-6, atol=0).all(dim=1, keepdim=True)  # (P, 1)
    return torch.where(no_signal, 0.0, advantages).float()


def broadcast_to_turns(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """Eq. 4: advantages (P, G) -> (B,). Each turn gets its trajectory's advantage; T_i = num_turns[p * G + i]."""
    if len(num_turns) != advantages.numel():  # torch would use a single count for all trajectories
        raise ValueError(f"{len(num_turns)} turn counts for {advantages.numel()} trajectories")
    return advantages.flatten().repeat_interleave(torch.tensor(num_turns, device=advantages.device))


def row_weights(num_turns: list[int], num_tokens: list[int] | None = None, aggregation: str = "paper") -> Tensor:
    """(B,) weights of the rows, in the order of `broadcast_to_turns`; they sum to 1 over the batch.

    "paper": 1 / (P G T_i), the two outer means of Eq. 5. "token-mean": |a| / total tokens; the loss then takes the mean
    over a row's |a| tokens, so each token carries 1 / total. Weigh the whole batch before you split it.
    """
    if aggregation == "token-mean":
        return torch.tensor([tokens / sum(num_tokens) for tokens in num_tokens])  # (B,)
    return torch.tensor([1 / (len(num_turns) * turns) for turns in num_turns for _ in range(turns)])  # (B,)


def token_weights(row_weights: Tensor, mask: Tensor) -> Tensor:
    """(B,), (B, T) -> (B, T): weight / |a| on each token of a row, 0 on pads. The innermost mean of Eq. 5."""
    return mask * (row_weights / mask.sum(dim=1))[:, None]


def token_logprobs(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(a_j | s, a_<j) of each completion token: logprobs (B, T), mask (B, T), entropy (B, T, without gradient).

    The policy is the softmax of logits / temperature, as in the sampler. The model must be a causal one of transformers
    whose logits are `lm_head` of the last hidden state (Qwen, Llama, Mistral; `load_model` refuses others).

    Rows that begin alike run as a tree (tree.py). A token takes the log-prob of its node, which the state of the parent
    node predicts. Rows that share the node share this number.
    """
    if not all(prompt_ids) or not all(completion_ids):
        raise ValueError("a row has an empty prompt or an empty completion")
    tree = plant([[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids)], model)
    start = torch.tensor([[len(prompt)] for prompt in prompt_ids], device=model.device)  # (B, 1)
    length = torch.tensor([[len(completion)] for completion in completion_ids], device=model.device)  # (B, 1)
    mask = torch.arange(int(length.max()), device=model.device) < length  # (B, T), True on the tokens of a
    position = torch.arange(tree.nodes.shape[1], device=model.device)  # (S,)
    sampled = (start <= position) & (position < start + length)  # (B, S), the same tokens

    # N tokens have K different nodes: compute these, then give each token the number of its node.
    nodes, node_of_token = tree.nodes[sampled].unique(return_inverse=True)  # (K,), (N,)
    parents = torch.empty_like(nodes)  # (K,)
    parents[node_of_token] = tree.nodes.roll(1, dims=1)[sampled]
    targets = tree.inputs["input_ids"].flatten()[nodes]  # (K,)
    states = model.model(**tree.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[parents]  # (K, D)

    logprobs, entropy = (x[node_of_token] for x in predict(model, states, targets, temperature, chunk_size))  # (N,)
    blank = logprobs.new_zeros(mask.shape)  # (B, T)
    return blank.masked_scatter(mask, logprobs), mask, blank.masked_scatter(mask, entropy)  # pads hold 0


def predict(
    model: torch.nn.Module, states: Tensor, targets: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """States (K, D), the token that follows each (K,) -> its log-prob (K,), and the entropy of the prediction (K,)."""

    def head(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.lm_head(states).float() / temperature  # (C, V)
        log_z = logits.logsumexp(dim=-1)  # (C,)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_z  # (C,)
        with torch.no_grad():  # last, as recomputation ends with what backward needs: H = log Z - sum_v pi_v logit_v
            entropy = log_z - (logits.softmax(dim=-1) * logits).sum(dim=-1)  # (C,)
        return logprobs, entropy

    # All logits, (K, V), would be the largest tensor by far: for 8,192 tokens and a vocabulary of 152k each copy takes
    # 5 GB. So the forward pass works chunk by chunk, and the backward pass computes the logits of each chunk again.
    chunk_size = min(chunk_size, max(1, MAX_LOGITS // model.lm_head.weight.shape[0]))
    pairs = zip(states.split(chunk_size), targets.split(chunk_size))
    chunks = [checkpoint(head, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return tuple(map(torch.cat, zip(*chunks)))


def flow_grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    row_weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.001,
    dual_clip: float = 0.0,
    sampler_logprobs: Tensor | None = None,
    tis_cap: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-J of Eq. 5 for some rows of a batch: log-probs and mask (B, T), advantages and weights (B,) -> (loss, stats).

    Loss and stats are weighted SUMS, with weights from the whole batch. So their sums over micro-batches are the nested
    means of the batch, however it is split, and gradients add up in the same way.
    """
    for x in (old_logprobs, ref_logprobs, sampler_logprobs, mask):
        if x is not None and x.shape != logprobs.shape:
            raise ValueError(f"all must be (B, T) = {tuple(logprobs.shape)}, got {tuple(x.shape)}")
    if not advantages.shape == row_weights.shape == logprobs.shape[:1]:
        raise ValueError(f"expected (B,), got advantages {tuple(advantages.shape)}, weights {tuple(row_weights.shape)}")

    def clean(x: Tensor) -> Tensor:  # a pad may hold inf, and 0 * inf is nan, in gradients too: so replace it
        return torch.where(mask, x, 0.0)  # (B, T)

    logprobs, old_logprobs = clean(logprobs), clean(old_logprobs.detach())
    weights = token_weights(row_weights, mask)  # (B, T), 1/(P G T_i) * 1/|a|: the three means of Eq. 5
    advantages = advantages[:, None]  # (B, 1), the same for each token of the turn: Eq. 7
    ratio = (logprobs - old_logprobs).exp()  # (B, T), Eq. 6; 1 in the first update
    surrogate = ratio * advantages  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages  # (B, T)
    objective = torch.min(surrogate, clipped)  # (B, T), Eq. 5: a move beyond the clip range gains nothing
    if dual_clip:  # a token that is far likelier now and was wrong must not outweigh all others
        objective = torch.where(advantages < 0, objective.clamp(min=dual_clip * advantages), objective)  # (B, T)
    importance = torch.ones_like(ratio)  # (B, T)
    if tis_cap:  # pi_old / pi_sampler; the cap trades some bias for far less variance
        importance = (old_logprobs - clean(sampler_logprobs.detach())).exp().clamp(max=tis_cap)  # (B, T)
        objective = objective * importance  # (B, T)

    k3 = torch.zeros_like(ratio)  # (B, T)
    if kl_coef and ref_logprobs is not None:
        log_ref = clean(ref_logprobs.detach()) - logprobs  # (B, T), log pi_ref / pi
        # E_pi[pi_ref / pi - 1] = 0, so k3 and -log pi_ref / pi have one mean, KL(pi || pi_ref). No k3 is negative.
        k3 = log_ref.exp() - log_ref - 1  # (B, T)
        objective = objective - kl_coef * k3  # (B, T)
    loss = -(weights * objective).sum()  # ()

    with torch.no_grad():
        stats = {
            "kl": (weights * k3).sum(),  # to pi_ref; 0 when it is not computed
            "ratio": (weights * ratio).sum(),
            "clip_fraction": (weights * (clipped < surrogate)).sum(),  # weight of the tokens that the clip holds
            "importance": (weights * importance).sum(),  # mean of the truncated weights; 1 without tis_cap
        }
    return loss, stats
