"""How fast the phases of one training step are on this machine: rollouts, gradient, weights to the engine.

    python -m lab.bench                                       # the bundled backbone and world, through the whole agent
    python -m lab.bench --shape qwen2.5-1.5b --engine vllm    # random weights of a real model's shape: no download

With a model, rollouts are trajectories of the agent: in flight together, then one at a time, on new questions each
time. With a shape, whose texts mean nothing, a trajectory is `turns` requests one after the other. Their prompts are
`prompt_tokens` random tokens, equal within a group. The gradient step is train.py's own, without the forward pass of
the reference policy. The figures are printed as one table and written to bench.json.
"""

import asyncio
import itertools
import json
import platform
import resource
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from agent import Trajectory, Turn
from eval import open_system, run_main, setting
from lab.compare import compare, medians, seconds_of
from llm import Lockstep, Request, best_device, open_engine
from sandbox import Sandbox
from tasks import load_examples, questions_of_step
from tools import UserError
from train import (
    Batch,
    Config,
    Precision,
    build_trainer,
    choose_precision,
    make_batches,
    open_engines,
    sync,
    update_policy,
)
from tree import plant

SHAPES = {  # layers, hidden size, intermediate size, heads, key-value heads, embeddings tied; vocabulary 151,936
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, False),
}


@dataclass
class BenchConfig(Config):
    shape: str = setting("", f"random weights instead of --model: {', '.join(SHAPES)}", group="the benchmark")
    in_flight: int = setting(128, "trajectories at once, in whole groups of --group_size", low=1)
    alone: int = setting(16, "trajectories run one at a time, for comparison; 0: none")
    repeats: int = setting(3, "runs of each measurement; the median is shown", low=1)
    prompt_tokens: int = setting(1000, "tokens of a prompt, with --shape", low=1)
    completion_tokens: int = setting(150, "tokens of a completion, with --shape", low=1)
    turns: int = setting(3, "turns of a trajectory, with --shape", low=1)
    output: str = setting("bench.json", "file for the figures; empty: none")


def main(config: BenchConfig) -> None:
    if config.shape and config.shape not in SHAPES:
        raise UserError(f"--shape {config.shape}: must be {', '.join(SHAPES)}")
    if config.output:
        open(config.output, "a").close()  # a place that cannot be written to shows now
    name = config.shape or config.model
    if config.shape:
        config = replace(config, model=make_shape(config.shape, config.model))
    precision = choose_precision(config, best_device(config.device))
    device = precision.device
    planner, roll_out = open_rollouts(config, precision)
    figures, trajectories, t_rollout = measure_rollouts(config, roll_out, device)
    planner.sleep()
    policy, _, optimizer = build_trainer(config, precision)
    gradient_figures, t_gradient = measure_gradient(config, precision, policy, optimizer, trajectories)
    t_sync = measure_sync(config, planner, policy, device)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    figures |= gradient_figures | compare(policy, planner, turns, config.micro_batch_tokens, config.repeats, device)
    figures["sync: seconds, sleep and waking included"] = t_sync
    figures["sync: share of a step"] = t_sync / (t_rollout + t_gradient + t_sync)

    print(f"{name} on {device}, {config.engine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(Sandbox().describe())
    for label, value in figures.items():
        print(f"{label:52s} {value:12,.3f}")
    if config.output:
        machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine["cpu"] = platform.processor()
        machine["gpu"] = torch.cuda.get_device_name() if device == "cuda" else ""
        text = json.dumps({"config": asdict(config), "machine": machine, "figures": figures}, indent=2)
        Path(config.output).write_text(text)
        print(f"figures: {config.output}")


# --- the three phases -------------------------------------------------------------------------------------------------

Rollout = Callable[[int, int], list[Trajectory]]  # (questions, group size) -> trajectories


def open_rollouts(config: BenchConfig, precision: Precision) -> tuple[Any, Rollout]:
    """(the planner's engine, a function that rolls out). Prompts are new each time: vLLM would remember old ones."""
    steps = itertools.count(1)
    if config.shape:  # one engine: the frozen modules' would be a second copy of the same
        planner = open_engine(config, config.model, precision.engine, config.lora_rank, can_sleep=True)
        return planner, lambda count, group_size: synthetic_rollout(planner, config, count, group_size, next(steps))
    system, train_set = open_system(config), load_examples(config.task, "train")
    system.planner, system.frozen = open_engines(config, precision)

    def roll_out(count: int, group_size: int) -> list[Trajectory]:
        examples = questions_of_step(train_set, next(steps), count, config.seed)
        groups = system.rollout([example.question for example in examples], group_size, ("bench",))
        return [trajectory for group in groups for trajectory in group]

    return system.planner, roll_out


def measure_rollouts(config: BenchConfig, roll_out: Rollout, device: str) -> tuple[dict, list[Trajectory], float]:
    """(figures, the last trajectories, seconds of a rollout with all in flight together)."""
    rolled_out, times = [], []

    def together() -> None:
        rolled_out.append(roll_out(max(1, config.in_flight // config.group_size), config.group_size))

    def alone() -> None:
        for _ in range(config.alone):
            roll_out(1, 1)

    together()  # warms up
    for _ in range(config.repeats):
        times.append(seconds_of(together, device))
    trajectories, t_rollout = rolled_out[-1], statistics.median(times)
    written = sum(tokens_written(trajectories) for trajectories in rolled_out[1:])
    per_second = len(trajectories) / t_rollout
    figures = {f"rollout: trajectories/s, {len(trajectories)} in flight": per_second}
    figures["rollout: tokens/s, of all modules"] = written / sum(times)
    if config.alone and not config.shape:
        per_second_alone = config.alone / median(config.repeats, alone, device)
        figures["rollout: trajectories/s, one at a time"] = per_second_alone
        figures["rollout: speed-up by batching"] = per_second / per_second_alone
    return figures, trajectories, t_rollout


def measure_gradient(
    config: BenchConfig, precision: Precision, policy: Any, optimizer: Any, trajectories: list[Trajectory]
) -> tuple[dict, float]:
    """(figures, seconds) of forward, backward and optimizer over all turns of the trajectories."""
    device = precision.device
    if device == "cuda":
        torch.cuda.empty_cache()  # what it keeps from here on is what the gradient step takes
    still = replace(config, kl_coef=0.0, updates_per_step=1, learning_rate=0.0)  # the weights stay what they are
    advantages = torch.ones(1, len(trajectories))  # (P, G)

    def gradient() -> None:
        batches = make_batches(trajectories, advantages, still, policy)
        update_policy(policy, policy, optimizer, batches, still, precision, step=1)

    t_gradient = median(config.repeats, gradient, device)
    memory = used_gpu_memory_mb() or peak_memory_mb()
    batches = make_batches(trajectories, advantages, still, policy)
    tokens, computed, work = work_of(policy, batches)
    peak = measured_peak(device, precision.engine)
    figures = {
        "gradient: tokens/s, forward, backward and optimizer": tokens / t_gradient,
        "gradient: computed tokens, of those": computed / tokens,
        "gradient: TFLOP/s, recomputation not counted": work / t_gradient / 1e12,
        "machine: TFLOP/s of one large matrix product": peak / 1e12,
        "gradient: share of that": work / t_gradient / peak,
        "gradient: peak memory, sleeping engine included, MB": memory,
    }
    return figures, t_gradient


def measure_sync(config: BenchConfig, planner: Any, policy: Any, device: str) -> float:
    """Seconds until the planner's engine has the policy's weights, its sleep included."""
    with TemporaryDirectory() as folder:  # for an adapter

        def hand_over() -> None:
            planner.sleep()
            sync(planner, policy, Path(folder))

        return median(config.repeats, hand_over, device)


# --- the work ---------------------------------------------------------------------------------------------------------


def make_shape(shape: str, tokenizer_of: str) -> str:
    """A model folder with random weights of the shape, in bfloat16, made once; the tokenizer is another model's."""
    folder = Path("runs") / "shapes" / shape
    if not (folder / "tokenizer.json").exists():
        layers, hidden, intermediate, heads, kv_heads, tied = SHAPES[shape]
        config = Qwen2Config(
            vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
            max_position_embeddings=32768, eos_token_id=151645, pad_token_id=151643, dtype="bfloat16",
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer_config.json", "chat_template.jinja"):  # first: a wrong --model shows at once
            shutil.copy(Path(tokenizer_of) / name, folder / name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
        shutil.copy(Path(tokenizer_of) / "tokenizer.json", folder)  # last: a folder that has it is whole
    return str(folder)


def synthetic_rollout(engine: Any, config: BenchConfig, count: int, group_size: int, seed: int) -> list[Trajectory]:
    """Trajectories of `turns` requests after each other, through the scheduling of real rollouts: `count` groups, of
    which each has prompts of its own."""
    lockstep, generator = Lockstep(engine), torch.Generator().manual_seed(seed)
    size = (config.turns, count, config.prompt_tokens)
    prompts = torch.randint(1000, 150000, size, generator=generator).tolist()

    async def trajectory(order: int) -> Trajectory:
        turns, tokens = [], Counter()
        for turn in range(config.turns):
            prompt_ids = tuple(prompts[turn][order // group_size])
            request = Request(prompt_ids, config.completion_tokens, temperature=1.0, seed=order + 1000 * turn)
            done = await lockstep.generate(engine, request, order)
            turns.append(Turn(done.prompt_ids, done.completion_ids, done.logprobs))
            tokens["planner_written"] += len(done.completion_ids)
        return Trajectory("", turns, None, "", tokens=tokens)

    return asyncio.run(lockstep.gather(trajectory(order) for order in range(count * group_size)))


def tokens_written(trajectories: list[Trajectory]) -> int:
    """Tokens that planner and frozen modules have written."""
    total = sum((trajectory.tokens for trajectory in trajectories), Counter())
    return sum(count for kind, count in total.items() if kind.endswith("_written"))


def work_of(policy: Any, batches: list[Batch]) -> tuple[int, int, float]:
    """(tokens of all rows; tokens that are computed, with padding, those that rows share once; FLOPs of forward and
    backward).

    FLOPs are counted as in PaLM, appendix B, without padding: 6 per weight and token, at completion tokens alone for
    the head; and 12 per layer, attention width and pair of tokens of which one sees the other.
    """
    config = policy.config
    head = config.vocab_size * config.hidden_size
    embedding = head if config.tie_word_embeddings else 2 * head
    body = sum(p.numel() for name, p in policy.named_parameters() if "lora_" not in name) - embedding
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    tokens, computed, work = 0, 0, 0.0
    for batch in batches:
        rows = [[*turn.prompt_ids, *turn.completion_ids] for turn in batch.turns]
        tree = plant(rows, policy)
        seen, written = {}, set()  # node -> tokens that it sees; nodes of completions
        for turn, row, nodes in zip(batch.turns, rows, tree.nodes.tolist()):
            seen |= {node: place for place, node in enumerate(nodes[: len(row)], start=1)}
            written |= set(nodes[len(turn.prompt_ids) : len(row)])
        tokens += sum(map(len, rows))
        computed += tree.inputs["input_ids"].numel()
        work += 6 * (body * len(seen) + head * len(written))
        work += 12 * config.num_hidden_layers * width * sum(seen.values())
    return tokens, computed, work


# --- clock and memory -------------------------------------------------------------------------------------------------


def median(repeats: int, run: Callable[[], Any], device: str) -> float:
    """Median seconds over the repeats, after one run that warms up."""
    return medians(repeats, device, {"run": run})["run"]


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of five: what this machine can really do."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5))


def peak_memory_mb() -> float:
    """The most memory that this process has had, without the GPU's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def used_gpu_memory_mb() -> float:
    """Memory in use on the whole GPU, 0 without one. After a phase this is the phase's peak, as torch keeps what it has
    once taken. Torch's own count of the peak would include the memory of a sleeping engine."""
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return (total - free) / 2**20


if __name__ == "__main__":
    run_main(main, BenchConfig)
