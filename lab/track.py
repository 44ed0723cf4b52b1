"""Sends the figures of a run to TensorBoard, Weights & Biases or Trackio: `python train.py --report_to tensorboard`.

The names are those of metrics.jsonl, in groups: score/reward, loss/kl, time/rollout, tool_shares/Search. At each
evaluation a table of a few trajectories comes along. If you stop a run and continue it, its curves go on: steps that
were sent before are not sent again.

    tensorboard --logdir runs        # shows all runs
    wandb sync runs/NAME/wandb/*     # uploads what `WANDB_MODE=offline` has collected
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools import UserError

TRAJECTORIES = 4  # in a table
SCORES = ("reward", "dev_accuracy", "zero_variance_groups")
LOSSES = ("loss", "kl", "ratio", "max_ratio", "clip_fraction", "importance", "entropy", "sampler_gap", "grad_norm")
COLUMNS = ("question", "expected", "answer", "reward", "advantage", "turns")

Send = Callable[[int, dict[str, float], list[list]], None]  # (step, figures, rows of COLUMNS)


def open_tracker(config: Any, run: Path) -> Callable[[dict, list], None]:
    """A function (metrics of a step, its pairs of example and trajectory) that sends them to --report_to."""
    name = config.report_to
    try:
        package = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(f"--report_to {name}: run `pip install {name}` first ({error})") from None
    send = (tensorboard if name == "tensorboard" else weights_and_biases)(package, config, run)
    sent = run / f"{name}.sent"  # the last step that was sent

    def track(metrics: dict, pairs: list) -> None:
        step = metrics["step"]
        if step > (int(sent.read_text()) if sent.exists() else -1):
            send(
                step,
                grouped(metrics),
                [row(*pair) for pair in pairs[:TRAJECTORIES]] if "dev_accuracy" in metrics else [],
            )
            sent.write_text(str(step))

    return track


def grouped(metrics: dict) -> dict[str, float]:
    """metrics.jsonl's names, each with its group in front."""
    figures = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            figures |= {f"{name}/{key}": part for key, part in value.items()}
        elif name.startswith("t_"):
            figures[f"time/{name.removeprefix('t_')}"] = value
        elif name != "step":
            group = "score" if name in SCORES else "loss" if name in LOSSES else "planner"
            figures[f"{group}/{name}"] = value
    return figures


def row(example: Any, trajectory: Any) -> list:
    steps = [f"{n} {s.tool}: {s.sub_goal} -> {s.result}" for n, s in enumerate(trajectory.memory.steps, start=1)]
    reward, advantage = trajectory.reward, round(trajectory.advantage, 3)
    return [example.question, str(example.answer), trajectory.answer, reward, advantage, "\n".join(steps)]


def tensorboard(package: Any, config: Any, run: Path) -> Send:
    writer = package.SummaryWriter(str(run / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in asdict(config).items()))

    def send(step: int, figures: dict[str, float], rows: list[list]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        if rows:  # indented text is shown as it is: no Markdown or HTML of a model
            lines = [f"{column}: {value}" for cells in rows for column, value in zip(COLUMNS, cells)]
            writer.add_text(
                "trajectories", "\n".join(f"    {part}" for line in lines for part in line.splitlines()), step
            )
        writer.flush()

    return send


def weights_and_biases(package: Any, config: Any, run: Path) -> Send:
    """Trackio has the same functions as wandb."""
    options = {"name": run_id(run), "resume": "allow", "config": asdict(config)}
    if package.__name__ == "wandb":
        options |= {"id": options["name"], "name": run.name, "dir": str(run)}
    package.init(project="nano-agentflow", **options)

    def send(step: int, figures: dict[str, float], rows: list[list]) -> None:
        table = {"trajectories": package.Table(columns=list(COLUMNS), data=rows)} if rows else {}
        package.log(figures | table, step=step)

    return send


def run_id(run: Path) -> str:
    """The same whenever this run goes on, another for a new run in the same folder."""
    config = run / "config.json"
    key = f"{config.resolve()} {config.stat().st_mtime_ns}"
    return f"{run.name}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
