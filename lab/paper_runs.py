"""The runs behind `lab/paper.py`: what is run, for how long, and one run after another.

Each run has a process and a folder of its own. If it is stopped at any moment, the same command goes on where it was.
What is finished is not repeated, and a training that was cut continues by train.py's own means. A run carries a
fingerprint of the code and the settings that made it; a run of other code is made again.
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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import groupby
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

import train
from agent import AgentSystem, Trajectory, Turn
from eval import evaluate
from flow_grpo import broadcast_to_turns
from lab.pretrain import PretrainConfig, encoder, make_backbone
from lab.teacher import TEST_WORLD, IdealPlanner
from lab.variants import COMPARED, FLAGS, PATCHES
from llm import TransformersEngine, load_model
from sandbox import Sandbox
from tasks import load_corpus, load_examples, write_atomically
from tinyworld.world import World
from tools import TOOLS, UserError

ROOT = Path(__file__).parent.parent
BACKBONE = "tinyworld/backbone"

# --- what is run ------------------------------------------------------------------------------------------------------


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
    group_sizes: tuple[int, ...]  # beside the default; the number of trajectories per step stays the same
    share: float = 0.0  # of the pretraining steps, for the smaller backbone; 0: none


# The comparisons use the training reward and the test alone, and make one update per step where they do not vary it.
SHORT = dict(dev_questions=1, eval_every=5, updates_per_step=1)
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
    work: Callable[["Run", Path], dict]  # makes its record, for the figures; a folder is given to it
    settings: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # runs whose folders it reads
    seconds: float = 60.0  # on two quiet cores, as `plan` estimates

    @property
    def id(self) -> str:
        return f"{self.name}-seed{self.seed}"


# Seconds of each piece of work, a little above what the runs of docs/paper.md took.
PROCESS, TRAJECTORY, FURTHER_UPDATE, TEST_QUESTION = 12, 0.042, 0.012, 0.035


def plan(scale: Scale) -> list[Run]:
    """All runs, in order."""
    runs = [training("main", seed, scale.main) for seed in scale.seeds]
    for seed in scale.seeds:
        tested = train.Config(**scale.main).test_questions
        settings = dict(questions=scale.taught, test_questions=tested, skill=0.75, epochs=3)
        runs.append(Run("taught", seed, learn_from_teacher, settings, (), PROCESS + 0.08 * scale.taught + 35))
        settings = dict(budgets=scale.budgets, questions=scale.budget_questions)
        seconds = PROCESS + TEST_QUESTION * 2 * scale.budget_questions * len(scale.budgets)
        runs.append(Run("turn-budget", seed, turn_budgets, settings, (f"main-seed{seed}",), seconds))
    for name in COMPARED:
        runs += [training(name, seed, scale.short | FLAGS.get(name, {})) for seed in scale.few_seeds]
    default = train.Config(**scale.short)
    for size in scale.group_sizes:
        groups = dict(group_size=size, questions_per_step=default.questions_per_step * default.group_size // size)
        runs += [training(f"group-{size}", seed, scale.short | groups) for seed in scale.few_seeds]
    if scale.share:
        settings = dict(layers=2, share=scale.share)
        runs.append(Run("pretrain", 0, pretrain_backbone, settings, (), PROCESS + 1000 * scale.share))
        runs += [training("small", seed, scale.short, ("pretrain-seed0",)) for seed in scale.few_seeds]
    return runs


def training(name: str, seed: int, flags: dict, needs: tuple[str, ...] = ()) -> Run:
    """A run of train.py with these flags, and the seconds that it may take."""
    config = train.Config(**flags)
    per_trajectory = TRAJECTORY + FURTHER_UPDATE * (config.updates_per_step - 1)
    trajectories = config.steps * config.questions_per_step * config.group_size
    evaluations = (config.steps - 1) // config.eval_every + 1
    asked = 2 * (config.test_questions or 500) + evaluations * config.dev_questions
    seconds = PROCESS + per_trajectory * trajectories + TEST_QUESTION * asked
    return Run(name, seed, train_planner, flags, needs, seconds)


def by_id(scale: Scale) -> dict[str, Run]:
    return {run.id: run for run in plan(scale)}


# --- the work of each kind of run -------------------------------------------------------------------------------------


def train_planner(run: Run, folder: Path) -> dict:
    """train.py with the run's flags, and with one of its functions replaced if the run is such a variant."""
    config = train.Config(run_dir=str(folder), seed=run.seed, device="cpu", **run.settings)
    if run.needs:  # a planner of its own size; the bundled backbone plays all other modules, as ever
        config = replace(config, model=str(folder.parent / run.needs[0] / "model"), frozen_model=BACKBONE)
    place, function = PATCHES.get(run.name, ("broadcast_to_turns", broadcast_to_turns))
    with patch.object(train, place, function):
        train.main(config)
    if not (folder / "result.json").exists():
        raise UserError("stopped; the same command continues")
    result = json.loads((folder / "result.json").read_text())
    return {"before": result["before"], "after": result["after"], "steps": training_steps(folder)}


def training_steps(folder: Path) -> list[dict]:
    """What each step's rollouts were, as counts and sums, so that several seeds can be added up."""
    metrics = {m["step"]: m for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    steps = []
    with (folder / "rollouts.jsonl").open() as file:
        for step, group in groupby(map(json.loads, file), key=lambda t: t["step"]):
            trajectories = list(group)
            turns = [turn for trajectory in trajectories for turn in trajectory["turns"]]
            lengths = [len(turn["completion_ids"]) for turn in turns]
            used, tokens = Counter(turn["tool"] for turn in turns), sum(lengths)
            clipped = metrics[step]["clip_fraction"] * tokens
            steps.append({
                "step": step,
                "reward": moments([trajectory["reward"] for trajectory in trajectories]),
                "turns": moments([len(trajectory["turns"]) for trajectory in trajectories]),
                "tokens": moments(lengths),
                "errors": moments([bool(turn["error"]) for turn in turns]),
                "clipped": [tokens, clipped, clipped],
                "tools": {tool: [len(turns), used[tool], used[tool]] for tool in TOOLS},
            })  # fmt: skip
    return steps


def moments(values: list) -> list[float]:
    """[how many, their sum, the sum of their squares]"""
    return [len(values), float(sum(values)), float(sum(x * x for x in values))]


def learn_from_teacher(run: Run, folder: Path) -> dict:
    """A stronger planner, and the backbone after supervised fine-tuning on that planner's successes."""
    settings, world = run.settings, World(TEST_WORLD)
    teacher = IdealPlanner(world.questions("train") + world.questions("test"), world, settings["skill"])
    system = AgentSystem(teacher, TransformersEngine(BACKBONE), load_corpus("tinyworld"), Sandbox())
    taught = load_examples("tinyworld", "train")[: settings["questions"]]
    _, pairs = evaluate(system, taught, (run.seed, "taught"))
    config = train.Config(model=BACKBONE)
    policy, tokenizer, optimizer = train.build_trainer(config, train.choose_precision(config, "cpu"))
    encode = encoder(tokenizer)
    rows = [row_of(turn, encode) for _, trajectory in pairs if trajectory.reward == 1 for turn in trajectory.turns]
    fine_tune(policy, optimizer, rows, settings["epochs"], run.seed)
    student = TransformersEngine(BACKBONE)
    student.load_weights(policy.state_dict().items())
    test_set, record = load_examples("tinyworld", "test", settings["test_questions"]), {}
    for name, planner in (("teacher", teacher), ("student", student)):
        record[name], _ = evaluate(replace(system, planner=planner), test_set, (run.seed, "test"))
    return record


def row_of(turn: Turn, encode: Callable) -> Turn:
    """The training row of a teacher's turn, which holds texts in place of ids; `lab.pretrain.encoder` encodes."""
    ids, begin = encode(turn.prompt_ids[0], turn.completion_ids[0])
    return Turn(ids[:begin], ids[begin:], [0.0] * (len(ids) - begin))


def fine_tune(policy: Any, optimizer: torch.optim.Optimizer, rows: list[Turn], epochs: int, seed: int) -> None:
    """Cross-entropy of the completions, 64 rows per optimizer step; all else is as in train.py.

    The update is train.py's own. With advantages of 1 and a ratio of 1, the gradient of its loss is the gradient of the
    cross-entropy.
    """
    rng = random.Random(f"sft {seed}")
    order = [row for _ in range(epochs) for row in rng.sample(rows, len(rows))]
    steps = [order[n : n + 64] for n in range(0, len(order), 64)]
    config = train.Config(steps=len(steps), updates_per_step=1, kl_coef=0.0, aggregation="token-mean")
    precision = train.choose_precision(config, "cpu")
    for number, turns in enumerate(steps, start=1):
        batches = train.make_batches([Trajectory("", turns, None, "")], torch.ones(1, 1), config, policy)
        train.update_policy(policy, policy, optimizer, batches, config, precision, number)


def turn_budgets(run: Run, folder: Path) -> dict:
    """The untrained and the trained planner of a main run, evaluated with every turn budget."""
    frozen = TransformersEngine(BACKBONE)
    planners = {"untrained": frozen, "trained": TransformersEngine(folder.parent / run.needs[0] / "checkpoint")}
    questions = load_examples("tinyworld", "test")[: run.settings["questions"]]
    system = AgentSystem(frozen, frozen, load_corpus("tinyworld"), Sandbox())
    record = {name: {} for name in planners}
    for name, planner in planners.items():
        for turns in run.settings["budgets"]:
            _, pairs = evaluate(replace(system, planner=planner, max_turns=turns), questions, (run.seed, "test"))
            rewards, used = [t.reward for _, t in pairs], [len(t.turns) for _, t in pairs]
            record[name][turns] = {"reward": moments(rewards), "turns": moments(used)}
    return record


def pretrain_backbone(run: Run, folder: Path) -> dict:
    """A backbone of fewer layers and fewer steps."""
    make_backbone(PretrainConfig(out=str(folder / "model"), **run.settings))
    models = {"small": folder / "model", "bundled": BACKBONE}
    return {name: sum(p.numel() for p in load_model(path)[0].parameters()) for name, path in models.items()}


# --- fingerprints -----------------------------------------------------------------------------------------------------


@cache
def code_behind(script: str) -> str:
    """Digest of a script, of all the files of this repository that it imports, and of the backbone. The variants are
    left out: each is in the fingerprint of its own run alone."""
    finder = ModuleFinder([str(ROOT)], excludes=["lab.variants"])
    finder.run_script(str(ROOT / script))
    files = sorted(module.__file__ for module in finder.modules.values() if module.__file__)
    code = [meaning(Path(file).read_text()) for file in files]
    weights = [sha256(path.read_bytes()).hexdigest() for path in sorted((ROOT / BACKBONE).iterdir())]
    return digest(*code, *weights)


def meaning(code: str | Callable) -> str:
    """Code without comments and layout."""
    return ast.dump(ast.parse(code if isinstance(code, str) else inspect.getsource(code)))


def digest(*parts: str) -> str:
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def fingerprint(run: Run, runs: dict[str, Run]) -> str:
    """Of everything that decides what a run gives: code, settings, seed, and the runs that it builds on."""
    variant = meaning(PATCHES[run.name][1]) if run.name in PATCHES else ""
    needed = [fingerprint(runs[name], runs) for name in run.needs]
    return digest(code_behind("lab/paper_runs.py"), run.id, json.dumps(run.settings), variant, *needed)


# --- one run after another --------------------------------------------------------------------------------------------


def folder_of_runs(out: Path, scale: Scale) -> Path:
    return out / ("runs" if scale.name == "full" else f"runs-{scale.name}")


def finished(folder: Path, made_by: str) -> bool:
    """Whether this code has made the record of a run."""
    try:
        return json.loads((folder / "record.json").read_text())["fingerprint"] == made_by
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # none, or a damaged one
        return False


def do(run: Run, folder: Path, made_by: str) -> None:
    """Begin a run in this process, or continue it if the same code began it. Its record.json is written at the end."""
    mark = folder / "made_by"
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} was not made by lab.paper: move it away, or name another folder with --out")
    if mark.exists() and mark.read_text() != made_by:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, made_by)
    started = time.time()
    data = run.work(run, folder)
    record = {"fingerprint": made_by, "seconds": time.time() - started, "date": time.strftime("%Y-%m-%d"), "data": data}
    write_atomically(folder / "record.json", json.dumps(record))


def do_all(out: Path, scale: Scale) -> None:
    """Every run that is not finished, each in a process of its own, under one bar for all of them."""
    runs, folder = by_id(scale), folder_of_runs(out, scale)
    missing = [run for run in runs.values() if not finished(folder / run.id, fingerprint(run, runs))]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    seconds, to_do = sum(run.seconds for run in runs.values()), sum(run.seconds for run in missing)
    shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed} so far, {remaining} left"
    with (out / "lock").open("w") as lock, tqdm(total=seconds, initial=seconds - to_do, bar_format=shape) as bar:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another lab.paper, or a run that it left behind, is at work in {out}: wait") from None
        for number, run in enumerate(missing, start=len(runs) - len(missing) + 1):
            bar.set_description_str(f"run {number} of {len(runs)}, {run.id}")
            work_on(run, folder, out, scale, lock.fileno(), bar)


def work_on(run: Run, folder: Path, out: Path, scale: Scale, lock: int, bar: tqdm) -> None:
    """A run in a process of its own. As it has its own session, Ctrl-C reaches it once, from here, and it can save. It
    inherits the lock: if this process is killed, nobody starts the same run beside it."""
    log, before, started = folder / f"{run.id}.log", bar.n, time.time()
    words = [sys.executable, "-m", "lab.paper", "--run", run.id, "--scale", scale.name, "--out", str(out)]
    with log.open("a") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, pass_fds=(lock,),
            env=os.environ | {"TQDM_DISABLE": "1"},
        )  # fmt: skip
    try:
        while process.poll() is None:
            bar.n = before + min(time.time() - started, 0.98 * run.seconds)
            bar.refresh()
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait()
        finally:
            process.kill()  # matters after a second Ctrl-C only
        raise UserError("stopped; the same command continues") from None
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the run {run.id} failed ({last}); {log} has more, and the same command continues")
    bar.n = before + run.seconds
