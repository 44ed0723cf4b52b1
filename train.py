"""Train the planner in the flow: each step samples the whole system, updates the planner and syncs its engine.

    python train.py                                   # the bundled world and backbone: minutes on a laptop
    python train.py --seed 1 --run_dir runs/other     # every flag: python train.py --help

A run leaves a folder: config.json, metrics.jsonl (one line per step), rollouts.jsonl, test_before.jsonl,
test_after.jsonl, curves.png, result.json, and checkpoint/. The checkpoint is a Hugging Face folder of the model (of
the adapter, if you set --lora_rank) plus the optimizer. `lab/report.py` makes a page of the run. If you stop a run,
the same command continues it, bit for bit on a CPU. No random state needs saving: the seed of each request comes from
the run's seed, the step, the question, the sample and the turn.
"""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer

from agent import AgentSystem, Trajectory, Turn
from eval import SystemConfig, behaviour, evaluate, open_system, run_main, setting, table
from flow_grpo import broadcast_to_turns, flow_grpo_loss, group_advantages, row_weights, token_logprobs, token_weights
from judge import score
from llm import EngineError, add_adapter, best_device, derive_seed, load_model, open_engine
from tasks import Example, append, keep_steps, load_examples, questions_of_step, write_atomically
from team import team
from tools import UserError, find
from tree import split_rows


@dataclass
class Config(SystemConfig):
    # the run
    steps: int = setting(20, "* rollout batches, each followed by a policy update", group="the run", low=1)
    run_dir: str = setting("", "folder of the run; empty: runs/TASK-seedSEED")
    model: str = setting("tinyworld/backbone", "* model folder or hub name of the planner and the frozen modules")
    frozen_model: str = setting("", "model of the frozen modules: folder, hub name or URL#NAME; empty: --model")
    eval_every: int = setting(10, "steps between checkpoints, evaluations on dev and printed trajectories", low=1)
    dev_questions: int = setting(50, "dev questions per evaluation; 0: the whole split")
    test_questions: int = setting(0, "test questions before and after training; 0: the whole split")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = setting("none", "tracker that gets the metrics too")
    # Flow-GRPO
    questions_per_step: int = setting(16, "* P, questions per step", group="Flow-GRPO", low=1)
    group_size: int = setting(8, "* G, trajectories per question", low=2)
    learning_rate: float = setting(6e-4, "* learning rate of AdamW after the warm-up")
    warmup_steps: int = setting(3, "optimizer steps over which the learning rate rises linearly")
    decay: bool = setting(True, "linear decay of the learning rate, to 0 at the end of the run")
    updates_per_step: int = setting(2, "optimizer steps per rollout batch; the clip acts from the second on", low=1)
    clip_low: float = setting(0.2, "epsilon of the clip below a ratio of 1 (Eq. 5)", high=1)
    clip_high: float = setting(0.2, "epsilon of the clip above a ratio of 1 (Eq. 5); the authors ran 0.3")
    dual_clip: float = setting(0.0, "bound c of the loss for A < 0, above 1 (the authors ran 3); 0: no bound")
    kl_coef: float = setting(0.001, "* beta, weight of the KL to the initial policy (Eq. 5)")
    aggregation: Literal["paper", "token-mean"] = setting(
        "paper", "means in the loss; paper: trajectories, turns, tokens; token-mean: all tokens, as the authors ran it"
    )
    normalize_std: bool = setting(True, "division of the advantages by the group's standard deviation (Eq. 7)")
    tis_cap: float = setting(0.0, "cap of the importance weights trainer / sampler; 0: no such weights")
    # the trainer at real size
    micro_batch_tokens: int = setting(
        2048, "tokens of a forward and backward pass; shared ones count once", group="the trainer at real size", low=1
    )
    dtype: Literal["auto", "float32", "mixed", "float16", "bfloat16"] = setting(
        "auto",
        "number format; mixed: float32 weights, bfloat16 arithmetic; float16: the same with float16, whose rounding "
        "is finer; auto: mixed on cuda, else float32",
    )
    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "optimizer; adamw8bit: moments in 8 bits, stochastic rounding of bfloat16 weights"
    )
    lora_rank: int = setting(0, "rank of a LoRA adapter on all linear layers; 0: all weights are trained")
    shard: bool = setting(False, "whether the processes of torchrun hold a part of the policy each (FSDP2)")


def main(config: Config) -> None:
    if config.temperature < 0.01:
        raise UserError(f"--temperature {config.temperature}: greedy rollouts are equal, with nothing to compare")
    if 0 < config.dual_clip <= 1:
        raise UserError(f"--dual_clip {config.dual_clip}: must be above 1, or failures have no gradient; 0: no bound")
    run = Path(config.run_dir or f"runs/{Path(config.task).name}-seed{config.seed}")
    train_set = load_examples(config.task, "train")
    dev_set = load_examples(config.task, "dev", config.dev_questions)
    test_set = load_examples(config.task, "test", config.test_questions)
    system = open_system(config)
    main_process = team().rank == 0
    if main_process:
        start_run(run, config)
    team().gather([])  # the others wait until the folder is there; only this process writes into it
    if (run / "result.json").exists():
        print(f"{run} is finished; for another run, remove it or name another folder with --run_dir")
        return report(run)

    # A run has four parts: the policy that learns, the engine that samples it, the frozen engine that plays every other
    # module, and the tools. The reference policy has the initial weights: one more copy, or the policy without adapter.
    precision = choose_precision(config, best_device(config.device))
    system.planner, system.frozen = open_engines(config, precision)
    policy, tokenizer, optimizer = build_trainer(config, precision)
    ref_policy = policy
    if config.kl_coef and not config.lora_rank:
        ref_policy, _ = load_model(config.model, precision.device, precision.engine)
    print(f"{run} on {precision.device}; {system.sandbox.describe()}")
    team().announce(policy, run)
    if os.getloadavg()[0] > os.cpu_count() / 2:
        print("the cores are busy: two trainings side by side are many times faster with OMP_NUM_THREADS=1 for each")

    # Take weights, optimizer and step from the last checkpoint. Later log lines are dropped, as their steps run again.
    first_step, result = resume(run, policy, optimizer)
    if first_step > 1:
        print(f"continuing after step {first_step - 1}")
        sync(system.planner, policy, run)
    else:
        result["before"] = run_test(run, "before", system, test_set, config)
        if main_process:
            append(run / "metrics.jsonl", {"step": 0, "test_accuracy": result["before"]["accuracy"]})

    tracked = main_process and config.report_to != "none"
    track = find("lab.track.open_tracker", {})(config, run) if tracked else lambda *_: None
    stop = listen_for_stop()
    for step in range(first_step, config.steps + 1):
        metrics, lap = {"step": step}, stopwatch()

        # --- evaluate on the dev questions, with the policy this step starts from
        if (step - 1) % config.eval_every == 0:
            dev, _ = evaluate(system, dev_set, (config.seed, "dev"), "dev")
            metrics["dev_accuracy"] = dev["accuracy"]
        metrics["t_eval"] = lap()

        # --- roll out: P questions, G trajectories of each, through planner, executor, verifier and generator
        examples = questions_of_step(train_set, step, config.questions_per_step, config.seed)
        questions = [example.question for example in examples]
        groups = system.rollout(questions, config.group_size, (config.seed, step), f"step {step} rollouts")
        metrics["t_rollout"] = lap()

        # --- score: one outcome reward per trajectory
        pairs = score(examples, groups, system.reward, system.frozen)
        rewards = torch.tensor([[trajectory.reward for trajectory in group] for group in groups])  # (P, G)
        metrics["t_judge"] = lap()

        # --- advantages: normalised within the group (Eq. 7)
        advantages = group_advantages(rewards, config.normalize_std)  # (P, G)
        trajectories = [trajectory for _, trajectory in pairs]
        for trajectory, advantage in zip(trajectories, advantages.flatten().tolist()):
            trajectory.advantage = advantage  # for the log; the loss takes the tensor

        # --- update: every turn is a row with the advantage of its trajectory (Eq. 4), in the loss of Eq. 5
        system.planner.sleep()  # frees memory for the gradient step; nobody asks an engine until `sync`
        batches = make_batches(trajectories, advantages, config, policy)
        torch.manual_seed(derive_seed(config.seed, step))  # for stochastic rounding: a resumed run repeats it
        stats = update_policy(policy, ref_policy, optimizer, batches, config, precision, step)
        check_update(step, stats, precision)
        turns = [turn for trajectory in trajectories for turn in trajectory.turns]
        for turn, own in zip(turns, team().gather([turn.ref_logprobs for turn in team().share(turns)])):
            turn.ref_logprobs = own  # for the log: each process has those of its own rows
        metrics["t_update"] = lap()

        # --- hand the new weights to the engine
        sync(system.planner, policy, run)
        metrics["t_sync"] = lap()

        # --- log
        metrics |= {
            "reward": rewards.mean().item(),
            "zero_variance_groups": (advantages == 0).all(dim=1).float().mean().item(),
            **behaviour(trajectories, system.tools),
            **stats,
        }
        if main_process:
            append(run / "metrics.jsonl", metrics)
            append(run / "rollouts.jsonl", *(record(step, *pair) for pair in pairs))
            track(metrics, pairs)
        print(console_line(metrics, config.steps))
        if "dev_accuracy" in metrics:
            print(transcript(*pairs[0]))

        # --- save
        result["train_seconds"] += sum(seconds for name, seconds in metrics.items() if name.startswith("t_"))
        stopping = team().gather(stop)  # if any process was asked to
        if step % config.eval_every == 0 or step == config.steps or stopping:
            save(run, step, policy, tokenizer, optimizer, result)
            if stopping:
                return print(f"stopped after step {step} and saved; the same command continues")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # everything is saved: it may end at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result["after"] = run_test(run, "after", system, test_set, config)
    if not main_process:
        return None
    find("lab.curves.plot_curves", {})(run)
    write_atomically(run / "result.json", json.dumps(result, indent=2))  # last: a run that has it is finished
    report(run)


# --- the update -------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Turns that share one forward and backward pass, with their numbers from before the update."""

    turns: list[Turn]
    advantages: Tensor  # (B,), of each turn's trajectory
    weights: Tensor  # (B,), the weight of each turn in the mean over the whole step
    sampler_logprobs: Tensor  # (B, T), 0 on pads
    ref_logprobs: Tensor | None = None  # (B, T), of pi_ref
    old_logprobs: Tensor | None = None  # (B, T), of pi_old; from the first update

    def forward(self, model: Any, config: Config, precision: "Precision") -> tuple[Tensor, Tensor, Tensor]:
        """logprobs, mask and entropy, (B, T) each."""
        prompts, completions = [t.prompt_ids for t in self.turns], [t.completion_ids for t in self.turns]
        with precision.autocast():
            if hasattr(model, "unshard"):  # its forward is `token_logprobs`, after the weights have come together
                return model(prompts, completions, config.temperature)
            return token_logprobs(model, prompts, completions, config.temperature)


def make_batches(trajectories: list[Trajectory], advantages: Tensor, config: Config, policy: Any) -> list[Batch]:
    """Split the turns of a step into micro-batches and broadcast advantages (P, G) to them (Eq. 4). The gradients of
    micro-batches add up to the gradient of Eq. 5, however the turns are split."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    num_turns = [len(trajectory.turns) for trajectory in trajectories]
    num_tokens = [len(turn.completion_ids) for turn in turns]
    row_advantages = broadcast_to_turns(advantages, num_turns)  # (B,)
    weights = row_weights(num_turns, num_tokens, config.aggregation)  # (B,)
    rows_of_ids = [[*turn.prompt_ids, *turn.completion_ids] for turn in turns]
    needed = list(range(len(turns)))
    if not config.kl_coef:  # then a turn without an advantage adds nothing to the gradient
        needed = row_advantages.nonzero()[:, 0].tolist() or needed
    needed = team().share(needed)
    batches = []
    for part in split_rows([rows_of_ids[i] for i in needed], config.micro_batch_tokens, policy):
        rows = [needed[i] for i in part]
        batch = [turns[i] for i in rows]
        sampled = pad_sequence([torch.tensor(turn.logprobs) for turn in batch], batch_first=True)  # (B, T)
        tensors = (x.to(policy.device) for x in (row_advantages[rows], weights[rows], sampled))
        batches.append(Batch(batch, *tensors))
    return find("lab.torchrun.level", {})(batches, policy) if config.shard else batches


def update_policy(
    policy, ref_policy, optimizer: Optimizer, batches: list[Batch], config: Config, precision: "Precision", step: int
) -> dict[str, float]:
    """Take the optimizer steps on the batches of one rollout step -> stats of the last update. Means have the weights
    of Eq. 5. Only `sampler_gap` is about the first update: the mean |sampler - trainer| log-prob, under pi_old."""
    with torch.no_grad():
        if config.kl_coef:
            if ref_policy is policy:  # pi_ref is the policy without its adapter
                policy.disable_adapters()
            for batch in batches:
                batch.ref_logprobs, mask, _ = batch.forward(ref_policy, config, precision)
                for turn, row, real in zip(batch.turns, batch.ref_logprobs, mask):
                    turn.ref_logprobs = row[real].tolist()  # rollouts.jsonl keeps them
            if ref_policy is policy:
                policy.enable_adapters()

    share = sum(team().gather([batch.weights.sum().item() for batch in batches]))  # 1, less if some are not needed
    policy.train()  # without dropout in these models, it only switches activation checkpointing on
    for update in range(config.updates_per_step):
        sums, max_ratio = Counter(), 0.0  # of this process
        for batch in batches:
            logprobs, mask, entropy = batch.forward(policy, config, precision)
            if update == 0:  # the policy still is pi_old, so r = 1
                batch.old_logprobs = logprobs.detach()
            loss, stats = flow_grpo_loss(
                logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, mask, batch.weights,
                clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
                kl_coef=config.kl_coef, sampler_logprobs=batch.sampler_logprobs, tis_cap=config.tis_cap,
            )  # fmt: skip
            precision.scaler.scale(loss).backward()
            max_ratio = max(max_ratio, (logprobs - batch.old_logprobs).max().exp().item())
            weights = token_weights(batch.weights, mask)  # (B, T)
            gap = (batch.old_logprobs - batch.sampler_logprobs).abs()  # (B, T)
            stats |= {"entropy": (weights * entropy).sum(), "sampler_gap": (weights * gap).sum()}
            sums.update({name: value.item() / share for name, value in stats.items()})  # a Counter adds them up
            sums["loss"] += loss.item()
        rate = learning_rate(config, (step - 1) * config.updates_per_step + update)
        grad_norm = take_step(policy, optimizer, rate, precision)
    policy.eval()
    parts = team().gather([sums])  # empty for a process without rows
    total = {name: sum(part[name] for part in parts) for name in max(parts, key=len)}
    return {**total, "max_ratio": max(team().gather([max_ratio])), "grad_norm": grad_norm, "learning_rate": rate}


MAX_GRAD_NORM = 1.0  # a gradient with a larger norm is scaled down to it


def check_update(step: int, stats: dict[str, float], precision: "Precision") -> None:
    """Stop a run that has gone wrong before it saves this step. A large gap means that the engine has other weights."""
    limits = {"sampler_gap": 1e-3 if precision.engine == torch.float32 else 0.1}
    if not precision.scaler.is_enabled():
        limits["grad_norm"] = math.inf
    for name, limit in limits.items():
        if not stats[name] < limit:  # nan too
            raise EngineError(f"step {step}: {name} is {stats[name]:.2g}, not below {limit}; this step is not saved")


def learning_rate(config: Config, update: int) -> float:
    """The rate of update 0, 1, ...: it rises over the warm-up and falls towards 0, so that the policy comes to rest."""
    share = min(1.0, (update + 1) / max(1, config.warmup_steps))
    if config.decay:
        share = min(share, 1 - update / (config.steps * config.updates_per_step))
    return config.learning_rate * share


def take_step(policy: Any, optimizer: Optimizer, rate: float, precision: "Precision") -> float:
    """One optimizer step on the gradients that have been added up -> their norm before it is scaled down."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):  # torchao compiles its step, and would compile again for each new number
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    team().add_gradients(policy)
    precision.scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM).item()
    precision.scaler.step(optimizer)  # leaves an update out, if float16 could not hold its gradient
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# --- the policy, its engines and its optimizer ------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """The device and the number formats of a run."""

    device: str
    weights: torch.dtype  # of the trained model
    engine: torch.dtype  # of the engines and the reference policy
    arithmetic: torch.dtype  # what autocast computes in. float32: no autocast, so the format of the weights
    scaler: GradScaler  # of the loss: small gradients would be 0 in float16. In other formats it does nothing

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.arithmetic, enabled=self.arithmetic != torch.float32)


def choose_precision(config: Config, device: str) -> Precision:
    choice = config.dtype
    if choice == "auto":
        choice = "mixed" if device == "cuda" else "float32"
    if choice == "bfloat16" and config.optimizer == "adamw" and not config.lora_rank:
        raise UserError("--dtype bfloat16 loses small updates to rounding: add --optimizer adamw8bit, or use mixed")
    half = torch.float16 if choice == "float16" else torch.bfloat16
    engine = torch.float32 if choice == "float32" else half
    # The base of an adapter is never updated, so it can be bfloat16; the adapter itself is float32.
    weights = half if choice == "bfloat16" or (config.lora_rank and choice != "float32") else torch.float32
    arithmetic = torch.float32 if choice == "bfloat16" and not config.lora_rank else engine
    return Precision(device, weights, engine, arithmetic, GradScaler(device, 2.0**12, enabled=choice == "float16"))


def open_engines(config: Config, precision: Precision) -> tuple[Any, Any]:
    """(planner's engine, frozen modules' engine). One vLLM engine can be both, with and without a LoRA adapter."""
    planner_engine = open_engine(config, config.model, precision.engine, config.lora_rank, can_sleep=True)
    frozen_model = config.frozen_model or config.model
    if config.engine == "vllm" and config.lora_rank and frozen_model == config.model:
        return planner_engine, planner_engine.without_adapter()
    return planner_engine, open_engine(config, frozen_model, precision.engine)


def build_trainer(config: Config, precision: Precision) -> tuple[Any, Any, Optimizer]:
    """(policy, tokenizer, optimizer)."""
    policy, tokenizer = load_model(config.model, "cpu" if config.shard else precision.device, precision.weights)
    if config.lora_rank:
        add_adapter(policy, config.lora_rank, config.seed)
    on_gpu = precision.device == "cuda"
    if on_gpu:  # the backward pass computes each layer again: this saves much memory and costs some time
        policy.gradient_checkpointing_enable()
    if config.shard:
        find("lab.torchrun.shard", {})(policy, config, precision)
    options = dict(params=policy.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    if config.optimizer == "adamw":
        # On a GPU, AdamW's default would hold one more copy of the weights during each step.
        return policy, tokenizer, AdamW(**options, fused=on_gpu or None)
    from torchao.optim import AdamW8bit

    # Plain rounding would lose all updates below 0.4 % of a bfloat16 weight: rounding at random keeps their mean.
    return policy, tokenizer, AdamW8bit(**options, bf16_stochastic_round=True)


def sync(engine: Any, policy: Any, run: Path) -> None:
    """Hand the policy's weights to its engine, only the adapter if the engine serves the base as well."""
    if getattr(engine, "lora_rank", 0):
        folder = run / f"adapter{team().rank or ''}"  # each process hands over its own
        policy.save_pretrained(folder)
        engine.load_adapter(folder)
    else:
        engine.load_weights(team().weights(policy))


def run_test(run: Path, when: str, system: AgentSystem, test_set: list[Example], config: Config) -> dict:
    """Run the test "before" or "after" training -> figures. The folder of the run keeps the trajectories."""
    figures, pairs = evaluate(system, test_set, (config.seed, "test"), f"test {when} training")
    path, step = run / f"test_{when}.jsonl", 0 if when == "before" else config.steps
    if not team().rank:
        path.unlink(missing_ok=True)
        append(path, *(record(step, *pair) for pair in pairs))
    return figures


# --- what you see -----------------------------------------------------------------------------------------------------


def stopwatch() -> Callable[[], float]:
    """A function that gives the seconds since its last call."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, time.perf_counter()
        return last - before

    return lap


def console_line(m: dict, steps: int) -> str:
    dev = f"{100 * m['dev_accuracy']:.0f} %" if "dev_accuracy" in m else "-"
    return (
        f"step {m['step']:>3}/{steps}  reward {m['reward']:.3f}  dev {dev:>5}  "
        f"zero-var {m['zero_variance_groups']:.2f}  turns {m['turns']:.2f}  tok/turn {m['tokens_per_turn']:.1f}  "
        f"kl {m['kl']:.4f}  gap {m['sampler_gap']:.1e}  clip {m['clip_fraction']:.3f}  grad {m['grad_norm']:.2f}  "
        f"rollout {m['t_rollout']:.1f}s  update {m['t_update']:.1f}s  sync {m['t_sync']:.2f}s"
    )


def transcript(example: Example, t: Trajectory) -> str:
    """One whole trajectory for the console, so that you see whether its reward was earned the right way."""
    head = f"  Question: {example.question}\n  Analysis: {t.memory.analysis}"
    tail = f"  Answer: {t.answer} (expected {example.answer}), reward {t.reward:g}, advantage {t.advantage:+.2f}"
    return visible(f"{head}{t.memory.render()}".replace("\n", "\n  ") + f"\n{tail}\n")


def visible(text: str) -> str:
    """A model's text must not move the cursor or recolour the screen: control characters are shown, not sent."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def record(step: int, example: Example, t: Trajectory) -> dict:
    """A line of rollouts.jsonl: everything that a reader of the run may want to look into."""
    numbers = ("completion_ids", "logprobs", "ref_logprobs")  # four digits are enough; the ids are whole numbers
    turns = [
        asdict(memory_step) | {name: [round(x, 4) for x in getattr(turn, name)] for name in numbers}
        for memory_step, turn in zip(t.memory.steps, t.turns)
    ]
    return {
        "step": step, "question": example.question, "expected": example.answer, "family": example.family,
        "answer": t.answer, "reward": t.reward, "advantage": t.advantage, "analysis": t.memory.analysis, "turns": turns,
    }  # fmt: skip


def report(run: Path) -> None:
    """Print the test before and after, and the folder."""
    with whole(run / "result.json"):
        result = json.loads((run / "result.json").read_text())
        print(table({"before": result["before"], "after": result["after"]}))
        end = f"trained in {result['train_seconds']:.0f} s; {run} has curves.png, rollouts.jsonl and checkpoint"
    print(find("lab.paired.line_of_run", {})(run), end, sep="\n")


# --- the folder of a run ----------------------------------------------------------------------------------------------


def start_run(run: Path, config: Config) -> None:
    """Make the folder, or check that the run in it has the same flags. Until a run has a log of metrics, there is
    nothing to lose, so you may start it again with other flags. This process locks the folder until it ends."""
    path = run / "config.json"
    run.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.lockf(os.open(run / "lock", os.O_CREAT | os.O_WRONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process trains in {run}: let it end, or name a folder with --run_dir") from None
    now, started = asdict(config), (run / "metrics.jsonl").exists() or (run / "checkpoint").exists()
    with whole(path):
        before = json.loads(path.read_text()) if started or path.exists() else now
        changed = [f"--{name}" for name in before | now if before.get(name) != now.get(name) and name != "run_dir"]
    if changed and (started or "run_dir" not in before):  # without that flag it is no config of ours
        raise UserError(f"{run} holds a run with other {', '.join(changed)}: remove it, or name another with --run_dir")
    if not started:
        write_atomically(path, json.dumps(now, indent=2))


def save(run: Path, step: int, policy, tokenizer, optimizer, result: dict) -> None:
    """Replace checkpoint/ as a whole: a kill at any moment leaves the new one or the last one."""
    new, current, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    weights, state = team().snapshot(policy, optimizer)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise EngineError(f"step {step}: a weight is nan or infinite; this step is not saved")
    if team().rank:
        return
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new, state_dict=weights)
    tokenizer.save_pretrained(new)
    torch.save({"step": step, "optimizer": state, "result": result}, new / "trainer.pt")
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def restore(run: Path, policy: Any, optimizer: Optimizer) -> tuple[int, dict]:
    """Fill policy and optimizer from the last checkpoint, if there is one -> (steps that are done, result so far)."""
    current, old = run / "checkpoint", run / "checkpoint.old"
    if not current.exists() and old.exists():  # killed between the two renames of `save`
        old.rename(current)
    if not current.exists():
        return 0, {"train_seconds": 0.0}
    with whole(current):
        trainer = torch.load(current / "trainer.pt", map_location="cpu", weights_only=True)
        team().restore(policy, optimizer, load_model(current)[0].state_dict(), trainer["optimizer"])
        assert range(trainer["step"]), "no step is in it"
        return trainer["step"], dict(trainer["result"])


def resume(run: Path, policy: Any, optimizer: Optimizer) -> tuple[int, dict]:
    """(next step, result so far) from the last checkpoint, if there is one. Log lines of later steps are dropped."""
    done, result = restore(run, policy, optimizer)
    if not team().rank:
        keep_steps(run / "metrics.jsonl", done)
        keep_steps(run / "rollouts.jsonl", done)
    return done + 1, result


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """If somebody has changed a file of the run, say so in one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({error!r}): restore it, or remove the folder of the run") from error


def listen_for_stop() -> list[int]:
    """The first Ctrl-C (or SIGTERM) fills this list: the run ends after the step, and saves. A second ends it now."""
    signals = []

    def ask(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this step; a second Ctrl-C stops at once", flush=True)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return signals


if __name__ == "__main__":
    run_main(main, Config)
