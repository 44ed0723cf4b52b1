"""How fast the phases of one training step are on this machine: rollouts, gradient, weights to the engine.

    python bench.py                                           # the bundled backbone and world, through the whole agent
    python bench.py --shape qwen2.5-1.5b --engine vllm        # random weights of a real model's shape: no download

With a model, rollouts are trajectories of the agent, in flight together and one at a time, on new questions each time.
With a shape, whose texts mean nothing, they are `turns` requests after each other for each trajectory, with prompts of
`prompt_tokens` random tokens, equal within a group of 8. The gradient step is forward, backward and optimizer over all
rows; train.py computes equal rows once, and adds a forward pass of the reference policy. One table, and bench.json.
"""

import asyncio
import itertools
import json
import platform
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from agent import AgentSystem, Trajectory, Turn
from eval import run_main, setting
from flow_grpo import flow_grpo_loss, micro_batches, row_weights, token_logprobs
from llm import Lockstep, Request, UserError, best_device, open_engine
from tasks import load_corpus, load_examples
from tools import Sandbox
from train import (
    Config,
    build_trainer,
    open_engines,
    peak_memory_mb,
    precision,
    questions_of_step,
    set_learning_rate,
    sync,
    used_gpu_memory_mb,
)

GROUP_SIZE = 8
SHAPES = {  # layers, hidden size, intermediate size, heads, key-value heads, embeddings tied; vocabulary 151,936
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, False),
}


@dataclass
class BenchConfig:
    model: str = setting("tinyworld/backbone", "model folder or hub name, for planner and frozen modules")
    shape: str = setting("", f"random weights instead of --model: {', '.join(SHAPES)}")
    task: str = setting("tinyworld", "where the questions come from")
    corpus: str = setting("", "file made by `python tools.py index`; empty: the articles of the bundled world")
    in_flight: int = setting(128, "trajectories at once, in groups of 8")
    alone: int = setting(16, "trajectories run one at a time, for comparison; 0: none")
    repeats: int = setting(3, "runs of each measurement; the median is shown")
    max_turns: int = setting(4, "turn budget of a question")
    prompt_tokens: int = setting(1000, "of a turn, with --shape")
    completion_tokens: int = setting(150, "of a turn, with --shape")
    turns: int = setting(3, "of a trajectory, with --shape")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    engine: str = setting("transformers", "transformers or vllm")
    engine_memory: float = setting(0.3, "share of the GPU's memory for each vLLM engine, weights and KV cache")
    dtype: str = setting("auto", "float32, mixed or bfloat16, as in train.py; auto: mixed on cuda, else float32")
    optimizer: str = setting("adamw", "adamw or adamw8bit")
    lora_rank: int = setting(0, "train a LoRA adapter of this rank; 0: all weights")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass")
    packed: bool = setting(False, "rows end to end instead of padded")
    attention: str = setting("sdpa", "attn_implementation of transformers in the trainer")
    micro_batch_tokens: int = setting(2048, "tokens of one forward and backward pass, padding included")
    output: str = setting("bench.json", "file for the figures; empty: none")


def main(config: BenchConfig) -> None:
    device = best_device(config.device)
    if config.shape and config.shape not in SHAPES:
        raise UserError(f"--shape {config.shape}: must be {', '.join(SHAPES)}")
    settings = {name: value for name, value in asdict(config).items() if name in Config.__dataclass_fields__}
    model = make_shape(config.shape, config.model) if config.shape else config.model
    trainer_config = Config(**settings | {"model": model})
    sandbox = Sandbox()
    figures = {}

    # --- rollouts, on new prompts each time: vLLM would know the old ones
    steps = itertools.count(1)
    if config.shape:  # one engine: the frozen modules' would be a second copy of the same
        dtype, vllm = precision(trainer_config, device)[1], dict(memory_share=config.engine_memory, can_sleep=True)
        planner = open_engine(config.engine, model, device, dtype, **vllm, lora_rank=config.lora_rank)
        engines = [planner]

        def together() -> list[Trajectory]:
            return synthetic_rollout(planner, config, next(steps))
    else:
        engines = [planner, frozen] = open_engines(trainer_config, device)
        system = AgentSystem(planner, frozen, load_corpus(config.corpus), sandbox, config.max_turns)
        train_set = load_examples(config.task, "train")

        def questions(count: int) -> list[str]:
            return [example.question for example in questions_of_step(train_set, next(steps), count, seed=0)]

        def together() -> list[Trajectory]:
            groups = system.rollout(questions(max(1, config.in_flight // GROUP_SIZE)), GROUP_SIZE, 1.0, ("bench",))
            return [trajectory for group in groups for trajectory in group]

    trajectories = together()
    before = sum(engine.tokens_generated for engine in engines)
    times = [seconds(together, device) for _ in range(config.repeats)]
    tokens = sum(engine.tokens_generated for engine in engines) - before
    t_rollout = statistics.median(times)
    figures[f"rollout: trajectories/s, {len(trajectories)} in flight"] = len(trajectories) / t_rollout
    figures["rollout: generated tokens/s"] = tokens / sum(times)
    if config.alone and not config.shape:

        def alone() -> None:
            for question in questions(config.alone):
                system.rollout([question], 1, 1.0, ("bench",))

        per_second_alone = config.alone / median(config.repeats, alone, device)
        figures["rollout: trajectories/s, one at a time"] = per_second_alone
        figures["rollout: speed-up by batching"] = len(trajectories) / t_rollout / per_second_alone
    planner.sleep()

    # --- the gradient step: forward, backward and optimizer over all turns of the trajectories
    policy, _, optimizer = build_trainer(trainer_config, device)
    policy.train()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what it keeps from here on is what the gradient step takes
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    work = work_of(policy, turns)

    def gradient() -> float:
        return gradient_step(policy, optimizer, trajectories, trainer_config, device)

    padding = gradient()
    t_gradient = median(config.repeats, gradient, device)
    memory = used_gpu_memory_mb() or peak_memory_mb()
    peak = measured_peak(device, precision(trainer_config, device)[1])
    row_tokens = sum(len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns)
    figures["gradient: tokens/s, forward, backward and optimizer"] = row_tokens / t_gradient
    figures["gradient: TFLOP/s, recomputation not counted"] = work / t_gradient / 1e12
    figures["machine: TFLOP/s of one large matrix product"] = peak / 1e12
    figures["gradient: share of that"] = work / t_gradient / peak
    figures["gradient: share of padding"] = padding
    figures["gradient: peak memory, sleeping engine included, MB"] = memory

    # --- new weights to the engine
    with TemporaryDirectory() as folder:  # for an adapter

        def hand_over() -> None:
            planner.sleep()
            sync(planner, policy, Path(folder))

        t_sync = median(config.repeats, hand_over, device)
    figures["sync: seconds, sleep and waking included"] = t_sync
    figures["sync: share of a step"] = t_sync / (t_rollout + t_gradient + t_sync)

    name = config.shape or config.model
    print(f"{name} on {device}, {config.engine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(sandbox.describe())
    for name, value in figures.items():
        print(f"{name:52s} {value:12,.3f}")
    if config.output:
        machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine["cpu"] = platform.processor()
        machine["gpu"] = torch.cuda.get_device_name() if device.startswith("cuda") else ""
        text = json.dumps({"config": asdict(config), "machine": machine, "figures": figures}, indent=2)
        Path(config.output).write_text(text)
        print(f"figures: {config.output}")


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
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
        for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
            shutil.copy(Path(tokenizer_of) / name, folder / name)
    return str(folder)


def synthetic_rollout(engine: Any, config: BenchConfig, seed: int) -> list[Trajectory]:
    """`in_flight` trajectories of `turns` requests after each other, through the scheduling of real rollouts."""
    lockstep, generator = Lockstep(), torch.Generator().manual_seed(seed)
    shape = (config.turns, -(-config.in_flight // GROUP_SIZE), config.prompt_tokens)
    prompts = torch.randint(1000, 150000, shape, generator=generator).tolist()

    async def trajectory(order: int) -> Trajectory:
        turns = []
        for turn in range(config.turns):
            prompt_ids = tuple(prompts[turn][order // GROUP_SIZE])
            request = Request(prompt_ids, config.completion_tokens, 1.0, seed=order + 1000 * turn)
            done = await lockstep.generate(engine, request, order)
            turns.append(Turn(done.prompt_ids, done.completion_ids, done.logprobs))
        return Trajectory("", turns, None, "")

    return asyncio.run(lockstep.gather(trajectory(order) for order in range(config.in_flight)))


def gradient_step(policy: Any, optimizer: Any, trajectories: list[Trajectory], config: Config, device: str) -> float:
    """One Flow-GRPO step over all turns, with advantages of 1 -> the share of the batches that is padding."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    weights = row_weights([len(trajectory.turns) for trajectory in trajectories]).to(device)
    lengths = [len(turn.prompt_ids) + len(turn.completion_ids) for turn in turns]
    padded, autocast = 0, precision(config, device)[2]
    for batch in micro_batches(lengths, config.micro_batch_tokens, config.packed):
        rows = [turns[i] for i in batch]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
            logprobs, mask, _ = token_logprobs(policy, prompts, completions, packed=config.packed)
        old, advantages = logprobs.detach(), torch.ones(len(batch), device=device)
        loss, _ = flow_grpo_loss(logprobs, old, old, advantages, mask, weights[batch])
        loss.backward()
        padded += sum(lengths[i] for i in batch) if config.packed else len(batch) * max(lengths[i] for i in batch)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    set_learning_rate(optimizer, 1e-9)  # the weights stay what they are
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return 1 - sum(lengths) / padded


def work_of(policy: Any, turns: list[Turn]) -> float:
    """FLOPs of forward and backward over real tokens: 6 a weight and token, the head's at completion tokens alone, and
    12 a layer, attention width and pair of tokens, half of the pairs being masked (as in PaLM, appendix B)."""
    config = policy.config
    head = config.vocab_size * config.hidden_size
    embedding = head if config.tie_word_embeddings else 2 * head
    body = sum(p.numel() for n, p in policy.named_parameters() if "lora_" not in n) - embedding
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    work = 0.0
    for turn in turns:
        length = len(turn.prompt_ids) + len(turn.completion_ids)
        work += 6 * (body * length + head * len(turn.completion_ids))
        work += 12 * config.num_hidden_layers * width * length * length / 2
    return work


# --- the clock --------------------------------------------------------------------------------------------------------


def seconds(run: Any, device: str) -> float:
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(repeats: int, run: Any, device: str) -> float:
    """Median seconds over the repeats, after one run that warms up."""
    run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def measured_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of five: what this machine can really do."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


if __name__ == "__main__":
    run_main(main, BenchConfig)
