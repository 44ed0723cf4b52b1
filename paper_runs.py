"""The runs behind `paper.py`: variants of the algorithm, what is run and for how long, and one run after another.

Each run has a process and a folder of its own. Stopped at any moment, the same command goes on where it was: what is
finished is not repeated, and a run that was cut continues by train.py's own means. A run carries a fingerprint of the
code and the settings that made it; a run of other code is made again.
"""

import ast
import fcntl
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

import train
from agent import AgentSystem
from eval import evaluate
from flow_grpo import broadcast_to_turns, flow_grpo_loss, micro_batches, token_logprobs
from llm import Completion, Request, TransformersEngine, UserError, load_model
from tasks import load_corpus, load_examples
from tinyworld import pretrain
from tinyworld.world import World
from tools import TOOLS, Sandbox

ROOT = Path(__file__).parent
BACKBONE = "tinyworld/backbone"
CODE = ["agent.py", "tools.py", "judge.py", "judge_llm.py", "flow_grpo.py", "llm.py", "tasks.py", "train.py", "eval.py"]
CODE += ["tinyworld/world.py", "tinyworld/pretrain.py"]

# --- variants of the algorithm, each put in the place of one function of train.py for the time of a run ---------------


def last_turn(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """The outcome is the last turn's alone. (P, G) -> (B,)"""
    rows = torch.zeros(sum(num_turns))  # (B,)
    rows[torch.tensor(num_turns).cumsum(0) - 1] = advantages.flatten()
    return rows


def fading_credit(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """Turn-level credit: half as much for each turn further from the outcome. (P, G) -> (B,)"""
    to_the_end = torch.cat([torch.arange(turns).flip(0) for turns in num_turns])  # (B,)
    return broadcast_to_turns(advantages, num_turns) * 0.5**to_the_end


def turn_pooled(advantages: Tensor, num_turns: list[int]) -> Tensor:
    """As the authors' code: mean and std over all turns of a group, so long trajectories count more. (P, G) -> (B,)

    Standardising Eq. 7's advantages once more gives what standardising the rewards gives.
    """
    turns_of_group = torch.tensor(num_turns).view(advantages.shape).sum(dim=1)  # (P,)
    groups = broadcast_to_turns(advantages, num_turns).split(turns_of_group.tolist())
    return torch.cat([(rows - rows.mean()) / rows.std() if rows.any() else rows for rows in groups])


def sequence_ratio(logprobs, old_logprobs, ref_logprobs, advantages, mask, row_weights, **settings):
    """GSPO (arXiv 2507.18071): one ratio for a turn, the geometric mean of its tokens' ratios; the KL is the same."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)  # (B, 1)
    loss, stats = flow_grpo_loss(old_logprobs + mean, old_logprobs, None, advantages, mask, row_weights, **settings)
    no_gain = torch.zeros_like(advantages)  # (B,)
    kl, kl_stats = flow_grpo_loss(logprobs, old_logprobs, ref_logprobs, no_gain, mask, row_weights, **settings)
    return loss + kl, stats | {"kl": kl_stats["kl"]}


PATCHES: dict[str, tuple[str, Callable]] = {  # run: (name in train.py, what stands there instead)
    "last-turn": ("broadcast_to_turns", last_turn),
    "fading-credit": ("broadcast_to_turns", fading_credit),
    "turn-pooled": ("broadcast_to_turns", turn_pooled),
    "gspo": ("flow_grpo_loss", sequence_ratio),
}
TWO = dict(updates_per_step=2)  # with a single update the ratio is 1 and nothing is clipped: such variants need more
FLAGS: dict[str, dict] = {  # run: what differs from train.py's defaults, as flags of its own
    "no-std": dict(normalize_std=False),
    "no-kl": dict(kl_coef=0.0),
    "two-updates": TWO,
    "dapo": TWO | dict(clip_high=0.28, aggregation="token-mean"),
    "gspo": TWO | dict(clip_low=0.03, clip_high=0.04),  # a mean over tokens moves less than one token does
}
COMPARED = ("baseline", "last-turn", "fading-credit", "turn-pooled", "no-std", "no-kl", "two-updates", "dapo", "gspo")

# --- the runs and their budget ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    name: str
    seeds: tuple[int, ...]  # of the main result
    main: dict  # flags of train.py for the main result; empty: its defaults, as `python train.py`
    few_seeds: tuple[int, ...]  # of the comparisons
    short: dict  # flags of train.py for the comparisons
    taught: int  # questions of the stronger planner, whose successes are imitated
    budgets: tuple[int, ...]  # turns
    budget_questions: int
    group_sizes: tuple[int, ...]  # beside the default; the trajectories of a step stay the same in number
    share: float = 0.0  # of the pretraining steps, for the smaller backbone; 0: none


SHORT = dict(
    dev_questions=1, eval_every=1000, save_every=5
)  # the comparisons look at the training reward and the test alone
SCALES = {
    "full": Scale(
        "full", (0, 1, 2), {}, (0, 1), SHORT | dict(steps=20, test_questions=300),
        taught=576, budgets=(1, 2, 3, 4, 5, 6, 7, 8), budget_questions=200, group_sizes=(2, 4, 16), share=0.5,
    ),
    "quick": Scale(
        "quick", (0,), SHORT | dict(steps=20, test_questions=200),
        (0,), SHORT | dict(steps=10, questions_per_step=8, test_questions=100),
        taught=320, budgets=(1, 2, 3, 4, 5, 6, 7, 8), budget_questions=60, group_sizes=(2,),
    ),
    "tiny": Scale(  # of the tests
        "tiny", (0,), SHORT | dict(steps=2, questions_per_step=2, group_size=2, test_questions=3, max_turns=2),
        (0,), SHORT | dict(steps=2, questions_per_step=2, group_size=2, test_questions=2, max_turns=2),
        taught=4, budgets=(1, 2), budget_questions=2, group_sizes=(4,), share=0.001,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    work: Callable[["Run", Path], dict]  # its record, for the figures; a folder is given to it
    settings: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # runs whose folders it reads
    seconds: float = 60.0  # on two quiet cores, by the figures of `plan`

    @property
    def id(self) -> str:
        return f"{self.name}-seed{self.seed}"


def plan(scale: Scale) -> list[Run]:
    """All runs, in order. Their seconds are estimates, a little above what the runs of the README took: 0.042 for a
    trajectory of a training step, 0.012 for a further update on it, 0.035 for a test question, 12 to start a process.
    """

    def training(name: str, seed: int, flags: dict, needs: tuple[str, ...] = ()) -> Run:
        c = train.Config(**flags)
        per_step = c.questions_per_step * c.group_size * (0.042 + 0.012 * (c.updates_per_step - 1))
        dev = (c.steps - 1) // c.eval_every + 1
        asked = 2 * (c.test_questions or 500) + dev * c.dev_questions
        return Run(name, seed, train_planner, flags, needs, 12 + c.steps * per_step + 0.035 * asked)

    default = train.Config(**scale.short)
    runs = [training("main", seed, scale.main) for seed in scale.seeds]
    for seed in scale.seeds:
        tested = train.Config(**scale.main).test_questions
        settings = dict(questions=scale.taught, test_questions=tested, skill=0.75, epochs=3)
        runs.append(Run("taught", seed, learn_from_teacher, settings, (), 12 + 0.08 * scale.taught + 35))
        settings = dict(budgets=scale.budgets, questions=scale.budget_questions)
        seconds = 12 + 0.035 * 2 * scale.budget_questions * len(scale.budgets)
        runs.append(Run("turn-budget", seed, turn_budgets, settings, (f"main-seed{seed}",), seconds))
    runs += [training(name, s, scale.short | FLAGS.get(name, {})) for name in COMPARED for s in scale.few_seeds]
    for size in scale.group_sizes:
        groups = dict(group_size=size, questions_per_step=default.questions_per_step * default.group_size // size)
        runs += [training(f"group-{size}", seed, scale.short | groups) for seed in scale.few_seeds]
    if scale.share:
        settings = dict(layers=2, share=scale.share)
        runs.append(Run("pretrain", 0, pretrain_backbone, settings, (), 12 + 1000 * scale.share))
        runs += [training("small", seed, scale.short, ("pretrain-seed0",)) for seed in scale.few_seeds]
    return runs


def train_planner(run: Run, folder: Path) -> dict:
    """train.py with the run's flags, and with one of its functions replaced."""
    config = train.Config(run_dir=str(folder), seed=run.seed, device="cpu", print_every=0, **run.settings)
    if run.needs:  # a planner of its own size; all other modules are played by the bundled backbone, as ever
        config = replace(config, model=str(folder.parent / run.needs[0] / "model"), frozen_model=BACKBONE)
    name, function = PATCHES.get(run.name, ("broadcast_to_turns", broadcast_to_turns))
    with patch.object(train, name, function):
        train.main(config)
    if not (folder / "result.json").exists():
        raise UserError("stopped; the same command continues")
    result = json.loads((folder / "result.json").read_text())
    return {"before": result["before"], "after": result["after"], "steps": training_steps(folder)}


def training_steps(folder: Path) -> list[dict]:
    """What each step's rollouts were, as counts and sums: those of several seeds add up."""
    metrics = {m["step"]: m for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    steps = []
    with (folder / "rollouts.jsonl").open() as file:
        for step, group in groupby(map(json.loads, file), key=lambda t: t["step"]):
            trajectories = list(group)
            turns = [turn for t in trajectories for turn in t["turns"]]
            counts, lengths = [len(t["turns"]) for t in trajectories], [len(turn["completion_ids"]) for turn in turns]
            tools, tokens = Counter(turn["tool"] for turn in turns), sum(lengths)
            clipped = metrics[step]["clip_fraction"] * tokens
            steps.append({
                "step": step,
                "reward": moments([t["reward"] for t in trajectories]),
                "turns": moments(counts),
                "tokens": moments(lengths),
                "errors": moments([bool(turn["error"]) for turn in turns]),
                "clipped": [tokens, clipped, clipped],
                "tools": {tool: [len(turns), tools[tool], tools[tool]] for tool in TOOLS},
            })  # fmt: skip
    return steps


def moments(values: list) -> list[float]:
    """[how many, their sum, the sum of their squares]"""
    return [len(values), float(sum(values)), float(sum(x * x for x in values))]


class NoisyPlanner(pretrain.IdealPlanner):
    """An engine that plans ideally in a share `skill` of its turns, else as clumsily as the backbone was taught to."""

    def __init__(self, world: World, skill: float):
        super().__init__(world.questions("train") + world.questions("test"), world)
        self.skill = skill

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        return [self._plan(request.prompt_ids[0], random.Random(request.seed)) for request in requests]

    def _plan(self, prompt: str, rng: random.Random) -> Completion:
        teacher = self.teachers[prompt.split("\nQuestion: ")[1].split("\n")[0]]
        teacher.rng = rng
        why, missing = teacher.findings(prompt)
        ideal = missing is not None and rng.random() < self.skill
        text = pretrain.render_plan(why, missing) if ideal else teacher.clumsy_plan(prompt)
        return Completion([prompt], [text], [0.0], text, "stop")  # it knows no tokens: the texts stand for their ids


def learn_from_teacher(run: Run, folder: Path) -> dict:
    """A stronger planner, and the backbone after supervised fine-tuning on that planner's successes."""
    settings, frozen = run.settings, TransformersEngine(BACKBONE)
    test_set = load_examples("tinyworld", "test")[: settings["test_questions"] or None]
    teacher = NoisyPlanner(World(pretrain.TEST_WORLD), settings["skill"])
    system = AgentSystem(teacher, frozen, load_corpus(), Sandbox())
    taught, pairs = load_examples("tinyworld", "train")[: settings["questions"]], []
    evaluate(system, taught, 1.0, (run.seed, "taught"), keep=pairs)
    turns = [turn for _, trajectory in pairs if trajectory.reward == 1 for turn in trajectory.turns]
    policy, tokenizer, optimizer = train.build_trainer(train.Config(model=BACKBONE), "cpu")
    encode = pretrain.encoder(tokenizer)
    encoded = [encode(turn.prompt_ids[0], turn.completion_ids[0]) for turn in turns]
    rows = [(ids[:begin], ids[begin:]) for ids, begin in encoded]
    fine_tune(policy, optimizer, rows, settings["epochs"], run.seed)
    student = TransformersEngine(BACKBONE)
    student.load_weights(policy.state_dict())
    return {
        name: evaluate(replace(system, planner=planner), test_set, 1.0, (run.seed, "test"))
        for name, planner in (("teacher", teacher), ("student", student))
    }


def fine_tune(policy: Any, optimizer: Any, rows: list[tuple[list[int], list[int]]], epochs: int, seed: int) -> None:
    """Cross-entropy of the completions, 64 rows to a step; optimizer and learning rate as in train.py."""
    rng, batch_size, config = random.Random(f"sft {seed}"), 64, train.Config()
    order = [i for _ in range(epochs) for i in rng.sample(range(len(rows)), len(rows))]
    steps = [order[n : n + batch_size] for n in range(0, len(order), batch_size)]
    policy.train()
    for number, step in enumerate(steps):
        total = sum(len(rows[i][1]) for i in step)
        for part in micro_batches([len(rows[i][0]) + len(rows[i][1]) for i in step], config.micro_batch_tokens):
            prompts, completions = zip(*(rows[step[k]] for k in part))
            logprobs, _, _ = token_logprobs(policy, list(prompts), list(completions))  # 0 on pads
            (-logprobs.sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        train.set_learning_rate(optimizer, train.learning_rate(replace(config, steps=len(steps)), number))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    policy.eval()


def turn_budgets(run: Run, folder: Path) -> dict:
    """The untrained and the trained planner of a main run, evaluated with every turn budget."""
    frozen = TransformersEngine(BACKBONE)
    planners = {"untrained": frozen, "trained": TransformersEngine(folder.parent / run.needs[0] / "checkpoint")}
    questions = load_examples("tinyworld", "test")[: run.settings["questions"]]
    record = {}
    for name, planner in planners.items():
        for turns in run.settings["budgets"]:
            system, pairs = AgentSystem(planner, frozen, load_corpus(), Sandbox(), max_turns=turns), []
            evaluate(system, questions, 1.0, (run.seed, "test"), keep=pairs)
            record[f"{name} {turns}"] = {
                "reward": moments([t.reward for _, t in pairs]), "turns": moments([len(t.turns) for _, t in pairs]),
            }  # fmt: skip
    return record


def pretrain_backbone(run: Run, folder: Path) -> dict:
    """A backbone of fewer layers and fewer steps."""
    words = [f"--{name}={value}" for name, value in run.settings.items()]
    pretrain.make_backbone(pretrain.flags().parse_args([*words, f"--out={folder / 'model'}"]))
    models = {"small": folder / "model", "bundled": BACKBONE}
    return {name: sum(p.numel() for p in load_model(path)[0].parameters()) for name, path in models.items()}


# --- one run after another --------------------------------------------------------------------------------------------


@cache
def code_digest() -> str:
    """Of the code behind every run, without comments and layout, and of the backbone's weights."""
    total = sha256()
    for name in CODE:
        total.update(meaning((ROOT / name).read_text()).encode())
    for path in sorted((ROOT / BACKBONE).iterdir()):
        total.update(path.read_bytes())
    return total.hexdigest()


def meaning(code: str | Callable) -> str:
    """Code without comments and layout."""
    return ast.dump(ast.parse(code if isinstance(code, str) else inspect.getsource(code)))


def fingerprint(run: Run, runs: dict[str, Run]) -> str:
    """Of everything that decides what a run gives: code, settings, seed, and the runs that it builds on."""
    helpers = {train_planner: (training_steps, moments), learn_from_teacher: (NoisyPlanner, fine_tune)}
    functions = [run.work, *helpers.get(run.work, ()), *PATCHES.get(run.name, ())[1:]]
    parts = [code_digest(), run.id, json.dumps(run.settings), *map(meaning, functions)]
    parts += [fingerprint(runs[name], runs) for name in run.needs]
    return digest(parts)


def digest(parts: list[str]) -> str:
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def by_id(scale: Scale) -> dict[str, Run]:
    return {run.id: run for run in plan(scale)}


def folder_of_runs(out: Path, scale: Scale) -> Path:
    return out / ("runs" if scale.name == "full" else f"runs-{scale.name}")


def finished(folder: Path, made_by: str) -> dict | None:
    """The record of a run, unless there is none or other code made it."""
    path = folder / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("fingerprint") == made_by else None


def do(run: Run, folder: Path, made_by: str) -> None:
    """A run in this process: begun, or continued if the same code began it. Its record.json is written at the end."""
    mark = folder / "made_by"
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} was not made by paper.py: move it away, or name another folder with --out")
    if mark.exists() and mark.read_text() != made_by:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train.write_atomically(mark, made_by.encode())
    started = time.time()
    data = run.work(run, folder)
    record = {"fingerprint": made_by, "seconds": time.time() - started, "date": time.strftime("%Y-%m-%d"), "data": data}
    train.write_atomically(folder / "record.json", json.dumps(record).encode())


def do_all(out: Path, scale: Scale) -> None:
    """Every run that is not finished, each in a process of its own, under one bar for all of them."""
    runs, folder = by_id(scale), folder_of_runs(out, scale)
    missing = [run for run in runs.values() if not finished(folder / run.id, fingerprint(run, runs))]
    total, to_do = sum(run.seconds for run in runs.values()), sum(run.seconds for run in missing)
    shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed} so far, {remaining} left"
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(out) as lock, tqdm(total=total, initial=total - to_do, bar_format=shape) as bar:
        for number, run in enumerate(missing, start=len(runs) - len(missing) + 1):
            bar.set_description_str(f"run {number} of {len(runs)}, {run.id}")
            before = bar.n
            work_on(run, folder, out, scale, lock, lambda share: show(bar, before + share * run.seconds))
            show(bar, before + run.seconds)


def show(bar: tqdm, n: float) -> None:
    bar.n = n
    bar.refresh()


def work_on(run: Run, folder: Path, out: Path, scale: Scale, lock: int, progress: Callable[[float], None]) -> None:
    """A run in a process of its own; Ctrl-C lets it save first."""
    log, started = folder / f"{run.id}.log", time.time()
    words = [sys.executable, str(ROOT / "paper.py"), "--run", run.id, "--scale", scale.name, "--out", str(out)]
    with log.open("a") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, pass_fds=(lock,),
            env=os.environ | {"TQDM_DISABLE": "1"},
        )  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(0.5)
            steps, metrics = run.settings.get("steps", 36), folder / run.id / "metrics.jsonl"
            done = len(metrics.read_bytes().splitlines()) / (steps + 2) if metrics.exists() else 0.0
            progress(min(0.98, done or (time.time() - started) / run.seconds))
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
        raise UserError("stopped; the same command continues") from None
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the run {run.id} failed ({last}); {log} has more, and the same command continues")


@contextmanager
def only_one(out: Path) -> Iterator[int]:
    """The lock is a file that runs inherit: a run that outlives a killed paper.py is not joined by its own twin."""
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another paper.py, or a run it left behind, is at work in {out}: wait for it") from None
        yield file.fileno()
