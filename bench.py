"""How fast one step's phases are on this machine: rollouts in flight, one at a time, and the gradient step.

python bench.py                     # the bundled backbone and world; a table, and bench.json beside it
"""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from agent import AgentSystem, Trajectory
from eval import run_main, setting
from flow_grpo import flow_grpo_loss, micro_batches, row_weights, token_logprobs
from llm import TransformersEngine, best_device, load_model
from tasks import load_corpus, load_examples
from tools import Sandbox


@dataclass
class BenchConfig:
    model: str = setting("tinyworld/backbone", "model folder or hub name, for planner and frozen modules")
    task: str = setting("tinyworld", "where the questions come from")
    corpus: str = setting("", "file made by `python tools.py index`; empty: the articles of the bundled world")
    in_flight: int = setting(128, "trajectories at once, in groups of 8")
    alone: int = setting(16, "trajectories run one at a time, for comparison")
    repeats: int = setting(3, "runs of each measurement; the median is shown")
    max_turns: int = setting(4, "turn budget of a question")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    micro_batch_tokens: int = setting(2048, "tokens of one forward and backward pass, padding included")
    output: str = setting("bench.json", "file for the figures; empty: none")


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(repeats: int, run) -> float:
    """Median seconds over the repeats, after one run that warms up."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


def gradient_pass(policy, trajectories: list[Trajectory], max_tokens: int) -> tuple[int, float]:
    """One forward and backward over all turns -> (real tokens, share of the batches that is padding)."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    weights = row_weights([len(trajectory.turns) for trajectory in trajectories])
    lengths = [len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns]
    padded = 0
    for batch in micro_batches(lengths, max_tokens):
        rows = [turns[i] for i in batch]
        logprobs, mask, _ = token_logprobs(policy, [r.prompt_ids for r in rows], [r.completion_ids for r in rows])
        advantages = torch.ones(len(batch), device=logprobs.device)
        loss, _ = flow_grpo_loss(
            logprobs, logprobs.detach(), logprobs.detach(), advantages, mask, weights[batch].to(mask.device)
        )
        loss.backward()
        padded += len(batch) * max(lengths[i] for i in batch)
    policy.zero_grad(set_to_none=True)
    return sum(lengths), 1 - sum(lengths) / padded


def main(config: BenchConfig) -> None:
    device = best_device(config.device)
    planner, frozen = TransformersEngine(config.model, device), TransformersEngine(config.model, device)
    policy, _ = load_model(config.model, device)
    sandbox = Sandbox()
    system = AgentSystem(planner, frozen, load_corpus(config.corpus), sandbox, config.max_turns)
    questions = [example.question for example in load_examples(config.task, "dev")][: max(1, config.in_flight // 8)]

    def together() -> list[Trajectory]:
        return [t for group in system.rollout(questions, 8, 1.0, ("bench",)) for t in group]

    def alone() -> None:
        for i in range(config.alone):
            system.rollout([questions[i % len(questions)]], 1, 1.0, ("bench", i))

    trajectories = together()
    before = planner.tokens_generated + frozen.tokens_generated
    together()
    tokens = planner.tokens_generated + frozen.tokens_generated - before
    t_together = median(config.repeats, together)
    t_alone = median(config.repeats, alone)
    policy.train()
    row_tokens, padding = gradient_pass(policy, trajectories, config.micro_batch_tokens)
    t_gradient = median(config.repeats, lambda: gradient_pass(policy, trajectories, config.micro_batch_tokens))
    t_sync = median(config.repeats, lambda: planner.load_weights(policy.state_dict()))
    per_second, per_second_alone = len(trajectories) / t_together, config.alone / t_alone
    figures = {
        f"trajectories/s, {len(trajectories)} in flight": per_second,
        "trajectories/s, one at a time": per_second_alone,
        "batching speed-up": per_second / per_second_alone,
        "rollout: generated tokens/s": tokens / t_together,
        "gradient: tokens/s, forward and backward": row_tokens / t_gradient,
        "gradient: share of padding": padding,
        "weights to the engine: s": t_sync,
    }
    print(f"{config.model} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(sandbox.describe())
    for name, value in figures.items():
        print(f"{name:44s} {value:12,.3f}")
    if config.output:
        machine = {
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu": platform.processor(),
        }
        Path(config.output).write_text(
            json.dumps({"config": asdict(config), "machine": machine, "figures": figures}, indent=2)
        )
        print(f"figures: {config.output}")


if __name__ == "__main__":
    run_main(main, BenchConfig)
