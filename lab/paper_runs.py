"""The runs behind `lab/paper.py`: what is run, for how long, and as many runs at a time as there are cores.

Each run has a process, a core and a folder of its own. If it is stopped at any moment, the same command goes on where
it was. What is finished is not repeated, and a training that was cut continues by train.py's own means. A run carries a
fingerprint of the code and the settings that made it; a run of other code is made again.
"""

import ast
import fcntl
import inspect
import json
import os
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
from statistics import mean
from unittest.mock import patch

from tqdm import tqdm

import train
from agent import AgentSystem
from eval import evaluate
from flow_grpo import broadcast_to_turns
from lab import variants, worlds
from lab.imitation import BACKBONE, WAYS, learn
from lab.paired import paired
from lab.pretrain import PretrainConfig, make_backbone
from lab.teacher import TEST_WORLD
from lab.variants import ABLATIONS, FLAGS, PATCHES
from llm import TransformersEngine, load_model
from sandbox import Sandbox
from tasks import Corpus, load_corpus, load_examples, tinyworld, write_atomically
from tinyworld.world import FAMILIES, HARD_FAMILIES, HARD_TURNS
from tools import TOOLS, UserError

ROOT = Path(__file__).parent.parent

# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How much of everything: flags of train.py, seeds, and numbers of questions."""

    name: str
    main: dict  # flags of the main result; empty: the defaults, as `python train.py`
    seeds: tuple[int, ...]  # of the main result
    hard: dict  # flags of the ablations
    hard_seeds: tuple[int, ...]
    few_seeds: tuple[int, ...]  # of imitation, generalisation, noisy judges and the smaller backbone
    traces: int  # questions for traces; 0: as many as each way says
    test_questions: int  # of imitation and of generalisation
    budget_questions: int  # of each turn budget
    long_steps: int = 0  # of the trainings at a constant learning rate; 0: none
    share: float = 0.0  # of the pretraining steps, for the smaller backbone; 0: none


BUDGETS = (1, 2, 4, 8)  # turns
GROUP_SIZES = (2, 4, 16)  # beside the default; the number of trajectories per step stays the same
EASY = dict(dev_questions=1, eval_every=5)
# An ablation is judged by its learning curve, so it tests one question only.
HARD = EASY | dict(task="tinyworld-hard", max_turns=HARD_TURNS, test_questions=1)
LONG = dict(questions_per_step=4, decay=False, dev_questions=50, eval_every=20, test_questions=200)
SCALES = {
    "full": Scale(
        "full", {}, (0, 1, 2), HARD | dict(steps=8, questions_per_step=6), (0, 1, 2, 3), (0,),
        traces=0, test_questions=200, budget_questions=100, long_steps=300, share=0.25,
    ),
    "quick": Scale(
        "quick", EASY | dict(steps=12, test_questions=200), (0,), HARD | dict(steps=3, questions_per_step=4), (0,),
        (0,),
        traces=160, test_questions=60, budget_questions=20,
    ),
    "tiny": Scale(  # of the tests
        "tiny", EASY | dict(steps=2, questions_per_step=2, group_size=2, test_questions=3, max_turns=2), (0,),
        HARD | dict(steps=2, questions_per_step=2, group_size=2, max_turns=2), (0,), (0,),
        traces=12, test_questions=2, budget_questions=2, long_steps=2, share=0.001,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    work: Callable[["Run", Path], dict]  # makes its record, for the figures; a folder is given to it
    settings: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # runs whose folders it reads
    seconds: float = 60.0  # on one quiet core, as `plan` estimates

    @property
    def id(self) -> str:
        return f"{self.name}-seed{self.seed}"


def plan(scale: Scale) -> list[Run]:
    """All runs, in order: what takes longest begins first, so that no core is idle at the end."""
    runs = []
    if scale.long_steps:
        runs += [training(f"long{kl}", 0, LONG | dict(steps=scale.long_steps) | FLAGS.get(kl[1:], {}))
                 for kl in ("", "-no-kl")]  # fmt: skip
    if scale.share:
        runs.append(Run("pretrain", 0, pretrain_backbone, dict(layers=2, share=scale.share), (), 1000 * scale.share))
    runs += [training("main", seed, scale.main) for seed in scale.seeds]
    for name in ABLATIONS:
        runs += [training(name, seed, scale.hard | FLAGS.get(name, {})) for seed in scale.hard_seeds]
    hard = train.Config(**scale.hard)
    for size in GROUP_SIZES:
        groups = dict(group_size=size, questions_per_step=max(1, hard.questions_per_step * hard.group_size // size))
        runs += [training(f"group-{size}", seed, scale.hard | groups) for seed in scale.hard_seeds]
    few = scale.main | EASY | dict(test_questions=min(scale.test_questions, scale.main.get("test_questions", 500)))
    for seed in scale.few_seeds:
        questions = dict(questions=scale.traces, test_questions=scale.test_questions)
        runs += [
            Run(f"imitation-{way}", seed, imitate, questions, (), PROCESS + 75 * min(1, (scale.traces or 640) / 640))
            for way in WAYS
        ]
        runs += [training(name, seed, few) for name in ("noisy-10", "noisy-20")]
        runs.append(training("three-families", seed, few | dict(families=THREE_FAMILIES)))
        runs.append(training("three-turns", seed, few | dict(max_turns=3)))
        if scale.share:
            runs.append(training("small", seed, few, ("pretrain-seed0",)))
    for seed in scale.seeds:
        seconds = PROCESS + TEST_TURN * 6 * scale.budget_questions * len(BUDGETS)
        runs.append(Run("turn-budget", seed, turn_budgets, dict(questions=scale.budget_questions),
                        (f"main-seed{seed}",), seconds))  # fmt: skip
    for name, (planner, settings) in TRANSFERS.items():
        settings = settings | dict(questions=scale.test_questions)
        seconds = PROCESS + TEST_TURN * 12 * scale.test_questions
        for seed in scale.seeds if planner == "main" else scale.few_seeds:
            runs.append(Run(name, seed, transfer, settings, (f"{planner}-seed{seed}",), seconds))
    return runs


THREE_FAMILIES = ("lookup", "two-hop", "difference")
TRANSFERS = {  # planner of which run, and what it is tested on
    "other-families": ("three-families", dict(families=("three-hop", "earlier", "four-hop"))),
    "other-world": ("main", dict(world=1)),
    "more-turns": ("three-turns", dict(max_turns=8)),
    "harder": ("main", dict(families=HARD_FAMILIES, max_turns=HARD_TURNS)),
}

# Seconds of each piece of work on one core, a little above what the runs of docs/paper.md took.
PROCESS, TURN, TURN_OF_UPDATE, TEST_TURN = 9, 0.009, 0.0025, 0.01


def training(name: str, seed: int, flags: dict, needs: tuple[str, ...] = ()) -> Run:
    """A run of train.py with these flags, and the seconds that it may take."""
    config = train.Config(**{flag: value for flag, value in flags.items() if flag != "families"})
    trajectories = config.steps * config.questions_per_step * config.group_size
    turns = 0.7 * config.max_turns  # of a trajectory, as the planner learns
    turns *= (config.max_turns / 4) ** 1.5  # later turns have longer prompts
    per_trajectory = turns * (TURN + TURN_OF_UPDATE * config.updates_per_step)
    evaluations = (config.steps - 1) // config.eval_every + 1
    asked = 2 * (config.test_questions or 500) + evaluations * config.dev_questions
    seconds = PROCESS + per_trajectory * trajectories + TEST_TURN * turns * asked
    if not config.decay:
        seconds *= 2  # a policy that falls apart writes long plans, and takes all its turns
    return Run(name, seed, train_planner, flags, needs, seconds)


def by_id(scale: Scale) -> dict[str, Run]:
    return {run.id: run for run in plan(scale)}


# --- the work of each kind of run -------------------------------------------------------------------------------------


def train_planner(run: Run, folder: Path) -> dict:
    """train.py with the run's flags, and with one of its functions replaced if the run is such a variant."""
    flags = dict(run.settings)
    if families := flags.pop("families", ()):
        flags["task"] = str(folder / "task")
        worlds.main(worlds.WorldConfig(folder=flags["task"], families=list(families)))
    config = train.Config(run_dir=str(folder / "run"), seed=run.seed, device="cpu", **flags)
    if run.needs:  # a planner of its own size; the bundled backbone plays all other modules, as ever
        config = replace(config, model=str(folder.parent / run.needs[0] / "model"), frozen_model=BACKBONE)
    place, function = PATCHES.get(run.name, ("broadcast_to_turns", broadcast_to_turns))
    with patch.object(train, place, function):
        train.main(config)
    if not (folder / "run" / "result.json").exists():
        raise UserError("stopped; the same command continues")
    result = json.loads((folder / "run" / "result.json").read_text())
    return {"before": result["before"], "after": result["after"], "steps": training_steps(folder / "run")}


def training_steps(folder: Path) -> list[dict]:
    """What each step's rollouts were, as counts and sums, so that several seeds can be added up."""
    metrics = {m["step"]: m for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    steps = []
    with (folder / "rollouts.jsonl").open() as file:
        for step, group in groupby(map(json.loads, file), key=lambda t: t["step"]):
            trajectories, of_step = list(group), metrics[step]
            turns = [turn for trajectory in trajectories for turn in trajectory["turns"]]
            lengths = [len(turn["completion_ids"]) for turn in turns]
            used = Counter(turn["tool"] for turn in turns)
            steps.append({
                "step": step,
                "reward": moments(means_of_groups(trajectories)),
                "turns": moments([len(trajectory["turns"]) for trajectory in trajectories]),
                "tokens": moments(lengths),
                "errors": moments([bool(turn["error"]) for turn in turns]),
                **{tool: [len(turns), used[tool], used[tool]] for tool in TOOLS},
                **{name: moments([of_step[name]]) for name in ("kl", "entropy", "zero_variance_groups")},
                "dev": moments([of_step["dev_accuracy"]]) if "dev_accuracy" in of_step else None,
            })  # fmt: skip
    return steps


def means_of_groups(trajectories: list[dict]) -> list[float]:
    """The mean reward of each question: its rollouts are too alike to count one by one."""
    groups = groupby(trajectories, key=lambda trajectory: trajectory["question"])
    return [mean(trajectory["reward"] for trajectory in group) for _, group in groups]


def moments(values: list) -> list[float]:
    """[how many, their sum, the sum of their squares]"""
    return [len(values), float(sum(values)), float(sum(x * x for x in values))]


def imitate(run: Run, folder: Path) -> dict:
    return learn(run.name.removeprefix("imitation-"), run.seed, **run.settings)


def turn_budgets(run: Run, folder: Path) -> dict:
    """The untrained and the trained planner of a main run, evaluated with every turn budget."""
    questions, record = load_examples("tinyworld", "test", run.settings["questions"]), {}
    for name, system in systems(run, folder).items():
        record[name] = {}
        for turns in BUDGETS:
            _, pairs = evaluate(replace(system, max_turns=turns), questions, (run.seed, "test"))
            rewards, used = [t.reward for _, t in pairs], [len(t.turns) for _, t in pairs]
            record[name][turns] = {"reward": moments(rewards), "turns": moments(used)}
    return record


def transfer(run: Run, folder: Path) -> dict:
    """The untrained planner and a trained one on questions of a kind that the training did not have: figures, and the
    paired difference."""
    settings = run.settings
    world = worlds.world_of(settings.get("world", TEST_WORLD))
    examples = tinyworld("test", settings.get("families", FAMILIES), world)[: settings["questions"]]
    corpus, record, rewards = Corpus.from_articles(world.articles.items()), {}, {}
    for name, system in systems(run, folder).items():
        system = replace(system, corpus=corpus, max_turns=settings.get("max_turns", system.max_turns))
        record[name], pairs = evaluate(system, examples, (run.seed, "test"))
        rewards[name] = [trajectory.reward for _, trajectory in pairs]
    return record | {"paired": paired(rewards["untrained"], rewards["trained"])}


def systems(run: Run, folder: Path) -> dict[str, AgentSystem]:
    """The system with the untrained planner, and with the planner that the needed run has trained."""
    frozen = TransformersEngine(BACKBONE)
    untrained = AgentSystem(frozen, frozen, load_corpus(), Sandbox())
    trained = TransformersEngine(folder.parent / run.needs[0] / "run" / "checkpoint")
    return {"untrained": untrained, "trained": replace(untrained, planner=trained)}


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


def edits(function: Callable) -> list[Callable]:
    """A function of lab/variants.py, and those others of this file that it calls."""
    called = [getattr(variants, name, None) for name in function.__code__.co_names]
    return [function, *(f for f in called if getattr(f, "__module__", "") == variants.__name__)]


def fingerprint(run: Run, runs: dict[str, Run]) -> str:
    """Digest of everything that decides what a run gives: code, settings, seed, and the runs that it builds on."""
    variant = "".join(map(meaning, edits(PATCHES[run.name][1]))) if run.name in PATCHES else ""
    needed = [fingerprint(runs[name], runs) for name in run.needs]
    return digest(code_behind("lab/paper_runs.py"), run.id, json.dumps(run.settings), variant, *needed)


# --- the runs at work -------------------------------------------------------------------------------------------------


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
        old = folder.rename(f"{folder}.old-{os.getpid()}")  # a kill in between leaves no half of a run
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, made_by)
    started = time.time()
    data = run.work(run, folder)
    record = {"fingerprint": made_by, "seconds": time.time() - started, "date": time.strftime("%Y-%m-%d"), "data": data}
    write_atomically(folder / "record.json", json.dumps(record))


def do_all(out: Path, scale: Scale) -> None:
    """Every run that is not finished, one per core and at most 8 at a time, under one bar for all of them."""
    runs, folder = by_id(scale), folder_of_runs(out, scale)
    waiting = [run for run in runs.values() if not finished(folder / run.id, fingerprint(run, runs))]
    if not waiting:
        return
    folder.mkdir(parents=True, exist_ok=True)
    total, workers = sum(run.seconds for run in runs.values()), min(8, cores())
    done = total - sum(run.seconds for run in waiting)
    shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed} so far, {remaining} left"
    at_work: dict[str, tuple[Run, subprocess.Popen, float]] = {}
    with (out / "lock").open("w") as lock, tqdm(total=total, initial=done, bar_format=shape) as bar:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another lab.paper, or a run that it left behind, is at work in {out}: wait") from None
        try:
            while waiting or at_work:
                unfinished = {run.id for run in waiting} | set(at_work)
                ready = [run for run in waiting if not unfinished & set(run.needs)]
                for run in ready[: workers - len(at_work)]:
                    at_work[run.id] = run, start(run, folder, out, scale, lock.fileno()), time.time()
                    waiting.remove(run)
                time.sleep(0.1)
                for run, process, _ in list(at_work.values()):
                    if process.poll() is not None:
                        check(run, process.returncode, folder)
                        del at_work[run.id]
                        done += run.seconds
                bar.set_description_str(f"{len(runs) - len(waiting) - len(at_work)} of {len(runs)} runs")
                under_way = (min(time.time() - started, 0.98 * run.seconds) for run, _, started in at_work.values())
                bar.n = done + sum(under_way)
                bar.refresh()
        except KeyboardInterrupt:
            raise UserError("stopped; the same command continues") from None
        finally:
            stop([process for _, process, _ in at_work.values()])


def start(run: Run, folder: Path, out: Path, scale: Scale, lock: int) -> subprocess.Popen:
    """A run in a process of its own, on one core. As it has its own session, Ctrl-C reaches it once, from here, and it
    can save. It inherits the lock: if this process is killed, nobody starts the same run beside it."""
    words = [sys.executable, "-m", "lab.paper", "--run", run.id, "--scale", scale.name, "--out", str(out)]
    with (folder / f"{run.id}.log").open("a") as file:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, pass_fds=(lock,),
            env=os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def check(run: Run, code: int, folder: Path) -> None:
    if code:
        log = folder / f"{run.id}.log"
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the run {run.id} failed ({last}); {log} has more, and the same command continues")


def stop(processes: list[subprocess.Popen]) -> None:
    """Let the runs at work save; a second Ctrl-C ends them at once, with all that they have started."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
