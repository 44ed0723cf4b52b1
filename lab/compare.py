"""The same work done by others, in one process, turn by turn: what trees save in the gradient step and in the sampler.

`lab.bench` prints these ratios. Each figure is a median of runs that alternate, so that a busy machine slows all alike.

    gradient, tree      this project: rows as trees (tree.py)
    gradient, padded    the same code with rows apart, padded on the right, in order of their lengths
    gradient, TRL       with the functions of TRL (pip install trl): rows as they come, prompts padded on the left and
                        completions on the right, `logits_to_keep`, selective log-softmax, entropy
    generate            `model.generate` of transformers on the same prompts, padded on the left
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agent import Turn
from flow_grpo import token_logprobs
from llm import Request, TransformersEngine
from tree import has_trees, plant, split_rows


def seconds_of(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(repeats: int, device: str, jobs: dict[str, Callable]) -> dict[str, float]:
    """Seconds of each job: medians of runs in turn, after one that does not count."""
    times = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            times[name].append(seconds_of(job, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


# --- the gradient step ------------------------------------------------------------------------------------------------


def compare_gradients(policy: Any, turns: list[Turn], max_tokens: int, repeats: int, device: str) -> dict[str, float]:
    """Ratios of the forward and backward passes of these turns; a pass has at most max_tokens tokens."""
    rows = [[*turn.prompt_ids, *turn.completion_ids] for turn in turns]
    trees = [[turns[i] for i in part] for part in split_rows(rows, max_tokens, policy)]
    nodes = sum(
        plant([[*t.prompt_ids, *t.completion_ids] for t in part], policy).inputs["input_ids"].numel() for part in trees
    )

    def ours(attention: str) -> None:
        policy.set_attn_implementation(attention)
        for part in split_rows(rows, max_tokens, policy):
            prompts, completions = [turns[i].prompt_ids for i in part], [turns[i].completion_ids for i in part]
            token_logprobs(policy, prompts, completions)[0].sum().backward()

    def trl() -> None:
        policy.set_attn_implementation("sdpa")
        for part in consecutive([len(row) for row in rows], max_tokens):
            trl_logprobs(policy, [turns[i] for i in part]).sum().backward()

    jobs = {"tree": lambda: ours("tree"), "padded": lambda: ours("sdpa")}
    if importlib.util.find_spec("trl"):
        jobs["trl"] = trl
    seconds = medians(repeats, device, jobs)
    policy.set_attn_implementation("tree")
    policy.zero_grad(set_to_none=True)
    figures = {f"gradient_vs_{name}": seconds[name] / seconds["tree"] for name in jobs if name != "tree"}
    return {"gradient_tokens": sum(map(len, rows)), "gradient_tokens_as_trees": nodes, **figures}


def consecutive(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row indices as they come, in passes of rows * longest <= max_tokens."""
    parts = [[]]
    for i in range(len(lengths)):
        part = [*parts[-1], i]
        if parts[-1] and len(part) * max(lengths[j] for j in part) > max_tokens:
            parts.append([i])
        else:
            parts[-1] = part
    return parts


def trl_logprobs(model: Any, turns: list[Turn]) -> Tensor:
    """log-probs (B, T) by the functions of TRL."""
    from trl.trainer.utils import entropy_from_logits, pad, selective_log_softmax

    sides = {"left": [turn.prompt_ids for turn in turns], "right": [turn.completion_ids for turn in turns]}
    padded = {s: pad([torch.tensor(ids) for ids in rows], padding_side=s) for s, rows in sides.items()}
    masks = {s: pad([torch.ones(len(ids), dtype=torch.long) for ids in rows], 0, s) for s, rows in sides.items()}
    ids, mask = (torch.cat([*parts.values()], dim=1).to(model.device) for parts in (padded, masks))
    keep = padded["right"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
    logprobs = selective_log_softmax(logits, ids[:, -keep:])
    with torch.no_grad():
        entropy_from_logits(logits)
    return logprobs * mask[:, -keep:]


# --- the sampler ------------------------------------------------------------------------------------------------------


def compare_sampler(engine: TransformersEngine, prompts: list[tuple], repeats: int, device: str) -> dict[str, float]:
    """Ratios of reading the prompts and of writing 16 more tokens, greedily, to `model.generate`."""
    model = engine.model
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(prompt)) for prompt in prompts], batch_first=True, padding_side="left").long()
    ids, mask = ids.to(model.device), mask.to(model.device)

    def sample(attention: str, count: int) -> None:
        model.set_attn_implementation(attention)
        engine.forget()
        engine.generate_batch([Request(prompt, count, 1.0, seed) for seed, prompt in enumerate(prompts)])

    def generate(count: int) -> None:
        model.set_attn_implementation("sdpa")
        options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=True, top_k=0, pad_token_id=0)
        model.generate(input_ids=ids, attention_mask=mask, **options)

    read = {"tree": lambda: sample("tree", 1), "padded": lambda: sample("sdpa", 1), "generate": lambda: generate(1)}
    write = {"write": lambda: sample("tree", 17), "generate_write": lambda: generate(17)}
    seconds = medians(repeats, device, read | write)
    model.set_attn_implementation("tree")
    tree = plant(list(dict.fromkeys(prompts)), model)
    return {
        "prefill_tokens": sum(map(len, prompts)),
        "prefill_tokens_as_trees": tree.inputs["input_ids"].numel(),
        "prefill_vs_padded": seconds["padded"] / seconds["tree"],
        "prefill_vs_generate": seconds["generate"] / seconds["tree"],
        "decode_vs_generate": (seconds["generate_write"] - seconds["generate"]) / (seconds["write"] - seconds["tree"]),
    }


def compare(
    policy: Any, engine: Any, turns: list[Turn], max_tokens: int, repeats: int, device: str
) -> dict[str, float]:
    """All ratios; {} for a model without trees, or for an engine that is not transformers'."""
    if not has_trees(policy) or not isinstance(engine, TransformersEngine):
        return {}
    prompts = [tuple(turn.prompt_ids) for turn in turns[:64]]
    figures = compare_gradients(policy, turns, max_tokens, repeats, device)
    return figures | compare_sampler(engine, prompts, repeats, device)
