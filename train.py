"""Train the planner in the flow: rollouts of the whole system, a Flow-GRPO step, new weights to the engine; again.

    python train.py                                   # the bundled world and backbone: minutes on a laptop
    python train.py --seed 1 --run_dir runs/other     # every flag: python train.py --help

A run leaves a folder: config.json, metrics.jsonl (a line a step), rollouts.jsonl, test_before.jsonl, test_after.jsonl,
curves.png, result.json, and checkpoint/, a plain Hugging Face folder (with --lora_rank, of the adapter) plus the
optimizer; `report.py` makes a page of it. The same command continues a run that was stopped, bit for bit on a CPU: each
request's seed is derived from the run's seed, the step, the question, the sample and the turn, so there is no other
random state to keep.
"""

import errno
import json
import math
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from agent import AgentSystem, Trajectory
from eval import behaviour, evaluate, read_json, run_main, setting, table
from flow_grpo import (
    broadcast_to_turns,
    flow_grpo_loss,
    group_advantages,
    micro_batches,
    row_weights,
    token_logprobs,
    token_weights,
)
from judge_llm import ModelJudge, check_judge, open_judge, score
from llm import (
    EngineError,
    TransformersEngine,
    UserError,
    adapter_base,
    add_adapter,
    best_device,
    derive_seed,
    load_model,
    open_engine,
    plain_weights,
)
from tasks import Example, load_corpus, load_examples
from tools import TOOLS, Sandbox
from web import WEB_TOOLS, Web, select_tools


@dataclass
class Config:
    # the run
    run_dir: str = setting("", "folder of the run; empty: runs/TASK-seedSEED")
    seed: int = setting(0, "seed of everything random")
    steps: int = setting(36, "rollout batches, each followed by a policy update")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    # the system
    model: str = setting("tinyworld/backbone", "model folder or hub name; starts the planner, is the frozen modules")
    frozen_model: str = setting("", "of the frozen modules: folder, hub name or a server's URL#NAME; empty: --model")
    engine: str = setting("transformers", "transformers or vllm: what samples the planner")
    frozen_engine: str = setting("", "transformers, vllm or http: what runs the frozen modules; empty: --engine")
    engine_memory: float = setting(0.3, "share of the GPU's memory for each vLLM engine, weights and KV cache")
    task: str = setting("tinyworld", "tinyworld, or a folder with train.jsonl, dev.jsonl and test.jsonl")
    corpus: str = setting("", "file made by `python tools.py index`; empty: the articles of the bundled world")
    max_turns: int = setting(4, "turn budget of a question")
    max_planner_tokens: int = setting(64, "tokens of one planner completion, at most")
    max_frozen_tokens: int = setting(64, "tokens of one completion of a frozen module, at most")
    result_chars: int = setting(400, "characters of a tool result in the memory; longer ones are cut in the middle")
    tools: list[str] = setting(list(TOOLS), f"tools on offer, in this order; there are also {', '.join(WEB_TOOLS)}")
    web_cache: str = setting("web_cache", "folder where the web tools store what they fetched; empty: nowhere")
    web_frozen: bool = setting(False, "the web tools answer from web_cache alone; what it lacks stops the run")
    web_summary: bool = setting(False, "a frozen module sums up the passages that the web tools find")
    web_private: bool = setting(False, "Web_Search may open private and loopback addresses")
    judge: str = setting("rules", "rules; llm: rules, then a language model about what they do not accept")
    judge_model: str = setting("", "of --judge llm: folder, hub name or a server's URL#NAME")
    judge_tokens: int = setting(256, "tokens of one reply of the judge, at most")
    judge_compare: bool = setting(False, "ask the judge about what the rules accept too, to log their agreement")
    # Flow-GRPO
    questions_per_step: int = setting(16, "P, questions of one step")
    group_size: int = setting(8, "G, trajectories of each question, at least 2")
    temperature: float = setting(1.0, "sampling temperature of the planner, in rollouts, loss and evaluation")
    learning_rate: float = setting(6e-4, "of AdamW, after the warm-up")
    warmup_steps: int = setting(3, "optimizer steps over which the learning rate rises linearly")
    decay: bool = setting(True, "after the warm-up the learning rate falls linearly, to 0 at the end of the run")
    weight_decay: float = setting(0.0, "of AdamW")
    max_grad_norm: float = setting(1.0, "the gradient is scaled down to this norm")
    updates_per_step: int = setting(1, "optimizer steps on each rollout batch; from the second on the ratio is clipped")
    clip_low: float = setting(0.2, "epsilon below 1 (Eq. 5)")
    clip_high: float = setting(0.2, "epsilon above 1 (Eq. 5); the authors ran 0.3")
    kl_coef: float = setting(0.001, "beta, weight of the KL to the initial policy (Eq. 5)")
    aggregation: str = setting("paper", "paper: mean of trajectories, turns, tokens; token-mean: as the authors ran it")
    normalize_std: bool = setting(True, "divide the advantages by the group's standard deviation (Eq. 7)")
    tis_cap: float = setting(0.0, "cap of the importance weights trainer / sampler; 0: no such weights")
    skip_zero_variance: bool = setting(False, "leave out groups whose rewards are all equal: less work, no KL pull")
    micro_batch_tokens: int = setting(2048, "tokens of one forward and backward pass, padding included")
    # the trainer at real size
    dtype: str = setting("auto", "float32; mixed: float32 weights, bfloat16 arithmetic; bfloat16; auto: mixed on cuda")
    optimizer: str = setting("adamw", "adamw; adamw8bit: moments in 8 bits, stochastic rounding of bfloat16 weights")
    lora_rank: int = setting(0, "train a LoRA adapter of this rank on all linear layers; 0: train all weights")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass: less memory, more time")
    packed: bool = setting(False, "rows end to end instead of padded; pays with flash attention")
    attention: str = setting("sdpa", "attn_implementation of transformers in the trainer")
    max_sampler_gap: float = setting(
        0.0, "mean |sampler - trainer| log-prob that stops the run; 0: 0.001 in float32, else 0.1"
    )
    # what you see
    eval_every: int = setting(12, "steps between evaluations on the dev questions")
    dev_questions: int = setting(100, "questions of an evaluation on dev; 0: the whole split")
    test_questions: int = setting(0, "questions of the test before and after; 0: the whole split")
    save_every: int = setting(12, "steps between checkpoints")
    print_every: int = setting(20, "steps between printed trajectories; 0: none")


def main(config: Config) -> None:
    check(config)
    web = Web(config.web_cache, config.web_frozen, config.web_summary, config.web_private)
    tools = select_tools(config.tools, web, bool(config.corpus) or config.task == "tinyworld")
    run = Path(config.run_dir or f"runs/{Path(config.task).name}-seed{config.seed}")
    start_run(run, config)
    if (run / "result.json").exists():
        print(f"{run} is finished; for another run, remove it or name another folder with --run_dir")
        return report(run)
    device = best_device(config.device)

    # Four parts: the policy that is trained, the engine that samples it, the frozen engine that plays every other
    # module, and the tools. The initial weights are the reference policy: the adapter switched off, the model of a
    # frozen transformers engine, or one more copy.
    train_set, dev_set, test_set = (load_examples(config.task, split) for split in ("train", "dev", "test"))
    dev_set, test_set = dev_set[: config.dev_questions or None], test_set[: config.test_questions or None]
    planner_engine, frozen_engine = open_engines(config, device)
    policy, tokenizer, optimizer = build_trainer(config, device)
    ref_policy = reference(config, device, policy, frozen_engine)
    _, engine_dtype, autocast = precision(config, device)
    max_gap = config.max_sampler_gap or (1e-3 if engine_dtype == torch.float32 else 0.1)
    loaded = {config.frozen_model or config.model: frozen_engine}
    judge = open_judge(config, run / "verdicts.jsonl", device, engine_dtype, loaded)
    sandbox = Sandbox()
    system = AgentSystem(
        planner=planner_engine, frozen=frozen_engine, corpus=load_corpus(config.corpus), sandbox=sandbox,
        max_turns=config.max_turns, max_planner_tokens=config.max_planner_tokens,
        max_frozen_tokens=config.max_frozen_tokens, result_chars=config.result_chars, tools=tools, web=web,
    )  # fmt: skip
    print(f"{run}: {budget(policy, config, device)} on {device}; {sandbox.describe()}")

    # Resume: weights, optimizer and step of the last checkpoint; log lines of later steps are dropped and made again.
    first_step, result = resume(run, policy, optimizer, config)
    if first_step > 1:
        sync(planner_engine, policy, run)
        print(f"continuing after step {first_step - 1}")
    else:
        result["before"] = run_test(run, "before", system, test_set, config, judge)
        log(run / "metrics.jsonl", {"step": 0, "test_accuracy": result["before"]["accuracy"]})

    stop = StopRequest()
    for step in range(first_step, config.steps + 1):
        clock = Clock()
        torch.manual_seed(derive_seed(config.seed, step))  # of stochastic rounding: a function of the step, as all is

        # --- evaluate on the dev questions, with the policy this step starts from
        metrics = {"step": step}
        if (step - 1) % config.eval_every == 0:
            dev = evaluate(system, dev_set, config.temperature, (config.seed, "dev"), "dev", judge=judge)
            metrics["dev_accuracy"] = dev["accuracy"]
        clock.lap("eval")

        # --- roll out: P questions, G trajectories of each, through planner, executor, verifier and generator
        questions = questions_of_step(train_set, step, config.questions_per_step, config.seed)
        with tqdm(total=len(questions) * config.group_size, desc=f"step {step} rollouts", leave=False) as bar:
            texts, key = [example.question for example in questions], (config.seed, step)
            groups = system.rollout(texts, config.group_size, config.temperature, key, on_done=bar.update)
        clock.lap("rollout")

        # --- score: one outcome reward for each trajectory
        score([(example, t) for example, group in zip(questions, groups) for t in group], judge)
        clock.lap("judge")
        rewards = torch.tensor([[trajectory.reward for trajectory in group] for group in groups])  # (P, G)

        # --- advantages: normalised within the group (Eq. 7), broadcast to every turn (Eq. 4)
        advantages = group_advantages(rewards, config.normalize_std)  # (P, G)
        trajectories = [trajectory for group in groups for trajectory in group]
        for trajectory, advantage in zip(trajectories, advantages.flatten().tolist()):
            trajectory.advantage = advantage
        turns = [turn for trajectory in trajectories for turn in trajectory.turns]  # B rows
        num_turns = [len(trajectory.turns) for trajectory in trajectories]
        num_tokens = [len(turn.completion_ids) for turn in turns]
        row_advantages = broadcast_to_turns(advantages, num_turns)  # (B,)
        weights = row_weights(num_turns, num_tokens, config.aggregation)  # (B,)

        # --- micro-batches of similar length. Rollouts of a group often write the same plan from the same memory: such
        # rows are computed once and then copied, which leaves the loss and its gradient what they are.
        rows_of: dict[tuple, list[int]] = {}  # (prompt_ids, completion_ids) -> the numbers of the rows that are so
        for i, turn in enumerate(turns):
            if row_advantages[i] != 0 or not config.skip_zero_variance:
                rows_of.setdefault((tuple(turn.prompt_ids), tuple(turn.completion_ids)), []).append(i)
        lengths = [len(prompt) + len(completion) for prompt, completion in rows_of]
        equal_rows = list(rows_of.values())
        split = micro_batches(lengths, config.micro_batch_tokens, config.packed)
        batches = [[equal_rows[n] for n in batch] for batch in split]
        kept = weights[[i for equal in equal_rows for i in equal]].sum().item() or 1.0  # 1, unless rows are left out

        def forward(model: torch.nn.Module, batch: list[list[int]]) -> list[torch.Tensor]:
            """logprobs, mask and entropy of all rows of the batch, (B, T) each."""
            firsts = [turns[equal[0]] for equal in batch]
            prompts, completions = [turn.prompt_ids for turn in firsts], [turn.completion_ids for turn in firsts]
            of_row = [n for n, equal in enumerate(batch) for _ in equal]
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                rows = token_logprobs(model, prompts, completions, config.temperature, packed=config.packed)
            return [x[of_row] for x in rows]

        planner_engine.sleep()  # what it can give back, the gradient step may use; no engine is asked until `sync`
        with torch.no_grad():
            with adapter_off(policy, config):
                ref_logprobs = [forward(ref_policy, batch)[0] if config.kl_coef else None for batch in batches]
            for batch, ref in zip(batches, ref_logprobs if config.kl_coef else []):
                for i, row in zip((i for equal in batch for i in equal), ref.tolist()):
                    turns[i].ref_logprobs = row[: num_tokens[i]]  # for the reader of the run
            # With one update the policy has not moved yet: its log-probs are the old ones, and the ratio is exactly 1.
            old_logprobs = [forward(policy, batch)[0] if config.updates_per_step > 1 else None for batch in batches]
        clock.lap("logprobs")

        # --- update: the gradients of the micro-batches add up to that of Eq. 5, whatever the split
        policy.train()
        sampler_gap = 0.0  # mean |sampler - trainer| log-prob of the sampled tokens, before the first update
        for update in range(config.updates_per_step):
            stats = dict.fromkeys(("loss", "kl", "clip_fraction", "ratio", "importance", "entropy"), 0.0)
            for batch, old, ref in zip(batches, old_logprobs, ref_logprobs):
                rows = [i for equal in batch for i in equal]
                logprobs, mask, entropy = forward(policy, batch)
                sampled = torch.tensor([x for i in rows for x in turns[i].logprobs], device=device)
                sampled = torch.zeros_like(logprobs).masked_scatter(mask, sampled)  # (B, T)
                batch_weights = weights[rows].to(device)
                loss, batch_stats = flow_grpo_loss(
                    logprobs, logprobs.detach() if old is None else old, ref,
                    row_advantages[rows].to(device), mask, batch_weights,
                    clip_low=config.clip_low, clip_high=config.clip_high, kl_coef=config.kl_coef,
                    sampler_logprobs=sampled if config.tis_cap else None, tis_cap=config.tis_cap or None,
                )  # fmt: skip
                loss.backward()
                of_token = token_weights(batch_weights, mask)  # (B, T)
                batch_stats |= {"loss": loss, "entropy": (of_token * entropy).sum()}
                for name in stats:
                    stats[name] += batch_stats[name].item() / (1.0 if name == "loss" else kept)
                if update == 0:
                    sampler_gap += (of_token * (logprobs.detach() - sampled).abs()).sum().item() / kept
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
            if not math.isfinite(grad_norm):
                raise UserError(f"step {step}: the gradient is {grad_norm}; the last checkpoint is intact")
            if not sampler_gap <= max_gap:  # nan too
                raise EngineError(
                    f"step {step}: sampler and trainer differ by {sampler_gap:.2g} nats a token, more than "
                    f"{max_gap:g}: the engine does not hold the trainer's weights; the last checkpoint is intact"
                )
            set_learning_rate(optimizer, learning_rate(config, (step - 1) * config.updates_per_step + update))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        policy.eval()
        clock.lap("update")

        # --- the new weights to the engine
        sync(planner_engine, policy, run)
        clock.lap("sync")

        # --- log
        metrics |= {
            "reward": rewards.mean().item(),
            "zero_variance_groups": (advantages == 0).all(dim=1).float().mean().item(),
            **behaviour(trajectories, tools),
            **(judge.report() if judge else {}),
            "tokens_per_turn": sum(num_tokens) / len(turns),
            "truncated_turns": sum(turn.truncated for turn in turns) / len(turns),
            **stats,
            "sampler_gap": sampler_gap,
            "grad_norm": grad_norm,
            "learning_rate": float(optimizer.param_groups[0]["lr"]),
            "tokens_per_second": sum(num_tokens) / clock.laps["rollout"],
            "gpu_memory_mb": clock.gpu_memory_mb,
            **{f"t_{phase}": seconds for phase, seconds in clock.laps.items()},
        }
        log(run / "metrics.jsonl", metrics)
        log(run / "rollouts.jsonl", *(record(step, e, t) for e, group in zip(questions, groups) for t in group))
        print(console_line(metrics, config.steps))
        if config.print_every and (step % config.print_every == 0 or step == 1):
            print(transcript(questions[0], groups[0][0]))

        # --- save
        result["train_seconds"] = result.get("train_seconds", 0.0) + sum(clock.laps.values())
        result["peak_gpu_memory_mb"] = max(result.get("peak_gpu_memory_mb", 0.0), clock.gpu_memory_mb)
        if step % config.save_every == 0 or step == config.steps or stop.asked:
            save(run, step, policy, tokenizer, optimizer, result)
        if stop.asked:
            print(f"stopped after step {step} and saved; the same command continues")
            return

    stop.release()
    result["after"] = run_test(run, "after", system, test_set, config, judge)
    finish(run, config, result)
    report(run)


# --- the policy, its engines and its optimizer ------------------------------------------------------------------------


def precision(config: Config, device: str) -> tuple[torch.dtype, torch.dtype, bool]:
    """(dtype of the trained model's weights, dtype in the engines, bfloat16 arithmetic on float32 weights?)."""
    choice = config.dtype if config.dtype != "auto" else "mixed" if device.startswith("cuda") else "float32"
    if choice == "float32":
        return torch.float32, torch.float32, False
    # The base of an adapter is never updated, so it can be bfloat16; the adapter itself is float32.
    weights = torch.float32 if choice == "mixed" and not config.lora_rank else torch.bfloat16
    return weights, torch.bfloat16, choice == "mixed" or config.lora_rank > 0


def open_engines(config: Config, device: str) -> tuple[Any, Any]:
    """(of the planner, of the frozen modules). One vLLM engine can be both: with a LoRA adapter, and without it."""
    dtype, frozen = precision(config, device)[1], config.frozen_engine or config.engine
    vllm = dict(memory_share=config.engine_memory)
    trained = dict(lora_rank=config.lora_rank, can_sleep=True)
    planner_engine = open_engine(config.engine, config.model, device, dtype, **vllm, **trained)
    if config.engine == frozen == "vllm" and config.lora_rank and config.frozen_model in ("", config.model):
        return planner_engine, planner_engine.without_adapter()
    return planner_engine, open_engine(frozen, config.frozen_model or config.model, device, dtype, **vllm)


def build_trainer(config: Config, device: str) -> tuple[Any, Any, torch.optim.Optimizer]:
    """(policy, tokenizer, optimizer)."""
    policy, tokenizer = load_model(config.model, device, precision(config, device)[0], config.attention)
    if config.lora_rank:
        add_adapter(policy, config.lora_rank, config.seed)
    if config.activation_checkpointing:
        older_name = policy.gradient_checkpointing_enable
        getattr(policy, "activation_checkpointing_enable", older_name)()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    options = dict(lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        # On a GPU the default would hold one more copy of the weights for the time of a step.
        return policy, tokenizer, torch.optim.AdamW(trained, **options, fused=device.startswith("cuda") or None)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw8bit needs torchao: pip install -r requirements-gpu.txt") from None
    # Updates below 0.4 % of a bfloat16 weight would all be rounded away: rounding at random keeps their mean.
    return policy, tokenizer, AdamW8bit(trained, **options, bf16_stochastic_round=trained[0].dtype == torch.bfloat16)


def reference(config: Config, device: str, policy: Any, frozen_engine: Any) -> Any:
    """pi_ref, the initial weights."""
    if config.lora_rank or not config.kl_coef:
        return policy  # see `adapter_off`
    if isinstance(frozen_engine, TransformersEngine) and config.frozen_model in ("", config.model):
        return frozen_engine.model
    return load_model(config.model, device, precision(config, device)[1], config.attention)[0]


@contextmanager
def adapter_off(policy: Any, config: Config) -> Iterator[None]:
    """The base of a LoRA policy is the reference policy."""
    if config.lora_rank:
        policy.disable_adapters()
    yield
    if config.lora_rank:
        policy.enable_adapters()


def sync(engine: Any, policy: Any, run: Path) -> None:
    """The policy's weights to its engine, as an adapter where the engine serves the base as well."""
    if getattr(engine, "lora_rank", 0):
        with disk_errors(run):
            policy.save_pretrained(run / "adapter")
        engine.load_adapter(run / "adapter")
    else:
        engine.load_weights(plain_weights(policy))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step, and would again for each new number
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def budget(policy: Any, config: Config, device: str) -> str:
    """Parameters and the memory that training them takes, before activations and engines; `UserError` when that is more
    than the GPU has."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    states = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)  # the gradients ...
    states += trained * (8 if config.optimizer == "adamw" else 2)  # ... and the two moments of Adam
    gib = (weights + states) / 2**30
    text = f"{trained / 1e6:,.2f} M parameters, {gib:.2f} GiB of weights, gradients and moments"
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        if gib > total:
            raise UserError(f"{text}, but the GPU has {total:.0f} GiB: {SMALLER}")
    return text


SMALLER = (
    "try --lora_rank 16, --optimizer adamw8bit (with --dtype bfloat16 for less still), "
    "--activation_checkpointing True, or a smaller --micro_batch_tokens, --engine_memory or --model"
)


def run_test(
    run: Path, when: str, system: AgentSystem, test_set: list[Example], config: Config, judge: ModelJudge | None
) -> dict:
    """The figures of the test "before" or "after" training; the trajectories behind them are kept in the folder."""
    pairs, step = [], 0 if when == "before" else config.steps
    label, key = f"test {when} training", (config.seed, "test")
    figures = evaluate(system, test_set, config.temperature, key, label, keep=pairs, judge=judge)
    lines = [json.dumps(record(step, *pair)) + "\n" for pair in pairs]
    write_atomically(run / f"test_{when}.jsonl", "".join(lines).encode())
    return figures


# --- functions of the step alone: a run that is continued needs no other state ----------------------------------------


def learning_rate(config: Config, update: int) -> float:
    """Of update 0, 1, ...: up over the warm-up, then down to 0, so that the last policy is no longer shaken about."""
    share = min(1.0, (update + 1) / max(1, config.warmup_steps))
    if config.decay:
        share = min(share, 1 - update / (config.steps * config.updates_per_step))
    return config.learning_rate * share


def questions_of_step(train_set: list[Example], step: int, count: int, seed: int) -> list[Example]:
    """The next `count` questions of an endless stream, shuffled anew each epoch; a function of the step alone."""
    n, first = len(train_set), (step - 1) * count
    epochs = range(first // n, (first + count - 1) // n + 1)
    order = [i for epoch in epochs for i in random.Random(f"{seed} epoch {epoch}").sample(range(n), n)]
    return [train_set[i] for i in order[first % n : first % n + count]]


# --- what you see -----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of each phase of a step, and the most GPU memory in use at the end of one."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.gpu_memory_mb = 0.0

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase], self.last = now - self.last, now
        self.gpu_memory_mb = max(self.gpu_memory_mb, used_gpu_memory_mb())


def console_line(m: dict, steps: int) -> str:
    dev = f"{100 * m['dev_accuracy']:.0f} %" if "dev_accuracy" in m else "-"
    return (
        f"step {m['step']:>3}/{steps}  reward {m['reward']:.3f}  dev {dev:>5}  "
        f"zero-var {m['zero_variance_groups']:.2f}  turns {m['turns']:.2f}  tok/turn {m['tokens_per_turn']:.1f}  "
        f"kl {m['kl']:.4f}  gap {m['sampler_gap']:.1e}  clip {m['clip_fraction']:.3f}  grad {m['grad_norm']:.2f}  "
        f"rollout {m['t_rollout']:.1f}s  update {m['t_logprobs'] + m['t_update']:.1f}s  sync {m['t_sync']:.2f}s"
    )


def transcript(example: Example, t: Trajectory) -> str:
    """One whole trajectory for the console, so that a reward that is earned the wrong way does not go unseen."""
    head = f"  Question: {example.question}\n  Analysis: {t.memory.analysis}"
    tail = f"  Answer: {t.answer} (expected {example.answer}), reward {t.reward:g}, advantage {t.advantage:+.2f}"
    text = f"{head}{t.memory.render()}".replace("\n", "\n  ") + f"\n{tail}\n"
    # A model's text must not move the cursor or recolour the screen: control characters are shown, not sent.
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def record(step: int, example: Example, t: Trajectory) -> dict:
    """A line of rollouts.jsonl: everything that a reader of the run may want to look into."""
    return {
        "step": step, "question": example.question, "expected": example.answer, "family": example.family,
        "answer": t.answer, "reward": t.reward, "advantage": t.advantage, "analysis": t.memory.analysis,
        "crash": t.crash,
        "turns": [
            asdict(memory_step)
            | {"completion_ids": turn.completion_ids, "logprobs": [round(x, 4) for x in turn.logprobs]}
            | {"ref_logprobs": [round(x, 4) for x in turn.ref_logprobs]}
            for memory_step, turn in zip(t.memory.steps, t.turns)
        ],
    }  # fmt: skip


def plot_curves(run: Path) -> None:
    """curves.png: reward and dev accuracy, turns, tools and errors, KL over the steps of the run."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    lines = [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if m["step"] > 0]
    steps = [m["step"] for m in lines]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, constrained_layout=True)
    dev = [(m["step"] - 1, m["dev_accuracy"]) for m in lines if "dev_accuracy" in m]
    axes[0, 0].plot(steps, [m["reward"] for m in lines], label="training reward (sampled)")
    axes[0, 0].plot(*zip(*dev), "o-", label="dev accuracy")
    axes[0, 1].plot(steps, [m["turns"] for m in lines], label="turns a question")
    for tool in lines[0]["tool_shares"]:
        axes[1, 0].plot(steps, [m["tool_shares"][tool] for m in lines], label=tool)
    axes[1, 0].plot(steps, [m["tool_error_rate"] for m in lines], ":", label="turns with an error")
    axes[1, 1].plot(steps, [m["kl"] for m in lines], label="KL to the initial policy (nats a token)")
    axes[1, 1].plot(steps, [m["entropy"] for m in lines], label="entropy of the policy (nats a token)")
    titles = ("reward and accuracy (share)", "turns", "tools (share of turns)", "nats a token")
    for axis, title in zip(axes.flat, titles):
        axis.set(title=title, ylim=(0, 1.02) if "share" in title else (0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(run / "curves.png", dpi=120)
    plt.close(figure)


# --- the folder of a run ----------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Bad values are refused before anything is loaded or written."""
    check_judge(config)
    if Path(config.task).is_file():
        raise UserError(f"--task {config.task}: training needs a folder with train.jsonl, dev.jsonl and test.jsonl")
    if config.group_size < 2:
        raise UserError(f"--group_size {config.group_size}: a group needs at least 2 trajectories to compare")
    if config.temperature <= 0:
        raise UserError(
            f"--temperature {config.temperature:g}: must be above 0, greedy rollouts of a group are all the same"
        )
    choices = {
        "aggregation": ("paper", "token-mean"),
        "engine": ("transformers", "vllm"),
        "frozen_engine": ("", "transformers", "vllm", "http"),
        "dtype": ("auto", "float32", "mixed", "bfloat16"),
        "optimizer": ("adamw", "adamw8bit"),
    }
    for name, values in choices.items():
        if getattr(config, name) not in values:
            raise UserError(f"--{name} {getattr(config, name)}: must be {', '.join(filter(None, values))}")
    if config.dtype == "bfloat16" and config.optimizer == "adamw" and not config.lora_rank:
        raise UserError("--dtype bfloat16 loses small updates to rounding: add --optimizer adamw8bit, or use mixed")
    for name in ("steps", "questions_per_step", "max_turns", "max_planner_tokens", "max_frozen_tokens", "result_chars",
                 "updates_per_step", "micro_batch_tokens", "eval_every", "save_every"):  # fmt: skip
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")


def start_run(run: Path, config: Config) -> None:
    """Make the folder, or see that the run that is there belongs to the same command. Before its first line of metrics
    there is nothing to lose: a start that failed may be tried again with other flags."""
    path = run / "config.json"
    if not (run / "metrics.jsonl").exists():
        with disk_errors(run):
            run.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(config), indent=2))
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: remove the folder {run}, or name another with --run_dir") from None
    changed = [f"--{name}" for name, value in asdict(config).items() if before.get(name) != value and name != "run_dir"]
    if changed:
        raise UserError(f"{run} holds a run with other {', '.join(changed)}: remove it, or name another with --run_dir")


def save(run: Path, step: int, policy, tokenizer, optimizer, result: dict) -> None:
    """Replace checkpoint/ as a whole: a kill at any moment leaves the new one or the last one."""
    new, current, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    with disk_errors(run):
        shutil.rmtree(new, ignore_errors=True)
        policy.save_pretrained(new)
        tokenizer.save_pretrained(new)
        torch.save({"step": step, "optimizer": optimizer.state_dict(), "result": result}, new / "trainer.pt")
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)


def resume(run: Path, policy, optimizer, config: Config) -> tuple[int, dict]:
    """(next step, result so far) from the last checkpoint, or (1, {}). Log lines of steps after it are dropped."""
    current, old = run / "checkpoint", run / "checkpoint.old"
    if not current.exists() and old.exists():  # killed between the two renames of `save`
        old.rename(current)
    step, result = 0, {}
    if current.exists():
        try:
            trainer = torch.load(current / "trainer.pt", weights_only=True)
            if config.lora_rank:
                load_adapter(policy, current, config.model)
            else:
                policy.load_state_dict(load_model(current, dtype=policy.dtype)[0].state_dict())
            optimizer.load_state_dict(trainer["optimizer"])
            step, result = trainer["step"], trainer["result"]
        except (UserError, OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{current} is not a whole checkpoint ({reason}): remove {run} to start again") from error
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if (run / name).exists():
            lines = (run / name).read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step] if step else []
            write_atomically(run / name, b"".join(kept))
    return step + 1, result


def load_adapter(policy: Any, folder: Path, base: str) -> None:
    """The LoRA weights of a checkpoint into a policy that has an adapter of the same shape."""
    if adapter_base(folder) != base:
        raise UserError(f"its adapter belongs to {adapter_base(folder) or 'no model'}, not to {base}")
    saved = load_file(folder / "adapter_model.safetensors")
    names = {k: k.removeprefix("base_model.model.").replace(".weight", ".default.weight") for k in saved}
    policy.load_state_dict(policy.state_dict() | {names[k]: tensor for k, tensor in saved.items()})


def finish(run: Path, config: Config, result: dict) -> None:
    summary = {
        "seed": config.seed,
        "test_accuracy_before": result["before"]["accuracy"],
        "test_accuracy_after": result["after"]["accuracy"],
        "by_family": {
            family: {"before": figures["accuracy"], "after": result["after"]["by_family"][family]["accuracy"]}
            for family, figures in result["before"]["by_family"].items()
        },
        "train_seconds": result["train_seconds"],
        "peak_memory_mb": peak_memory_mb(),
        "peak_gpu_memory_mb": result.get("peak_gpu_memory_mb", 0.0),
        "versions": dict(
            python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__
        ),
        "before": result["before"],
        "after": result["after"],
    }
    write_atomically(run / "result.json", json.dumps(summary, indent=2).encode())
    with disk_errors(run):
        plot_curves(run)


def peak_memory_mb() -> float:
    """The most memory that this process has had, without the GPU's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def used_gpu_memory_mb() -> float:
    """In use on the whole GPU, 0 without one. After a phase this is its peak, as torch keeps what it has once taken; by
    torch's own count of the peak, a sleeping engine's memory is in use."""
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return (total - free) / 2**20


def report(run: Path) -> None:
    """The table before and after, and where everything lies."""
    result = read_json(run / "result.json")
    print(table({"before": result["before"], "after": result["after"]}))
    print(f"trained in {result['train_seconds']:.0f} s, peak memory {result['peak_memory_mb']:.0f} MB")
    for name in ("curves.png", "rollouts.jsonl", "metrics.jsonl", "checkpoint"):
        print(f"{run / name}")


def log(path: Path, *lines: dict) -> None:
    with disk_errors(path.parent), path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def write_atomically(path: Path, data: bytes) -> None:
    with disk_errors(path.parent):
        partial = path.with_name(path.name + ".new")
        partial.write_bytes(data)
        partial.rename(path)


@contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is one clear line; the last whole checkpoint stays as it is."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but the disk's fault it is not
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk torch and safetensors have their own
        there = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
        space = getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(there).free < 2**20
        advice = "free some space, then run the same command to continue" if space else "make it writable"
        raise UserError(f"cannot write to {run} ({error}): {advice}; the last checkpoint is intact") from error


class StopRequest:
    """The first Ctrl-C (or SIGTERM) ends the run after the step, saved; the second ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def release(self) -> None:
        """No step is under way that would have to be finished: Ctrl-C ends the program at once again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask(self, number: int, frame) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step; once more to stop at once", flush=True)


if __name__ == "__main__":
    run_main(main, Config)
