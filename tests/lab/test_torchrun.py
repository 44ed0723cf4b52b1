"""Several processes do what one does: the same rollouts, the same gradient, the same run, whoever ends too early."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval
import lab.torchrun
import train
from agent import Trajectory, Turn
from lab.pretrain import BACKBONE
from lab.torchrun import ScaleConfig, Team, traffic
from llm import Request, TransformersEngine
from team import Alone, team
from tests.test_train import ROOT, flags, wait_for_steps
from tools import UserError
from train import Config

SMALL = dict(steps=4, questions_per_step=5, group_size=2, max_turns=2, eval_every=2, dev_questions=2, test_questions=1)


def small(run: Path, **changes) -> Config:
    return Config(**(SMALL | {"run_dir": str(run)} | changes))


# --- processes that have torch already: `forkserver` imports once, then forks -----------------------------------------


def together(world_size: int, work, *arguments) -> list:
    """work(*arguments) in so many processes -> what each returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.lab.preloaded"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers = context.SimpleQueue()
    places = [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
              for rank in range(world_size)]  # fmt: skip
    processes = [context.Process(target=one, args=(place, answers, work, arguments)) for place in places]
    for process in processes:
        process.start()
    given = {}
    while len(given) < world_size:
        if answers.empty():
            assert all(process.is_alive() or process.exitcode == 0 for process in processes), given
            time.sleep(0.05)
        else:
            rank, answer = answers.get()
            given[rank] = answer
            if isinstance(answer, str):  # an error: the others wait for this one
                break
    for process in processes:
        process.kill() if len(given) < world_size else process.join()
    assert not [answer for answer in given.values() if isinstance(answer, str)], given
    return [given[rank] for rank in range(world_size)]


def one(place: dict, answers, work, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in place.items()}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        answer = work(*arguments)
    except Exception as error:
        answer = repr(error)
    answers.put((place["RANK"], answer))


# --- one step ---------------------------------------------------------------------------------------------------------


def ragged(groups: list[list[int]]) -> list[Trajectory]:
    """Trajectories with so many turns each, as the model samples them: completions of 1 to 7 tokens, some equal."""
    engine = TransformersEngine(BACKBONE)
    turns = [(i, t) for group in groups for i, count in enumerate(group) for t in range(count)]
    requests = [
        Request(engine.encode(f"Question: Who founded {'Vibel' * t}?"), 1 + (3 * i + t) % 7, 1.0, 10 * i * t)
        for i, t in turns
    ]
    rows = [Turn(c.prompt_ids, c.completion_ids, c.logprobs) for c in engine.generate_batch(requests)]
    return [Trajectory("q", [rows.pop(0) for _ in range(count)], None, "") for group in groups for count in group]


def gradient_of(config: Config, trajectories: list, advantages: torch.Tensor) -> tuple[dict, dict]:
    """(gradients, stats) of the first update."""
    taken = {}
    precision = train.choose_precision(config, "cpu")
    policy, _, optimizer = train.build_trainer(config, precision)

    def keep(policy, optimizer, rate, precision):
        team().add_gradients(policy)
        for name, parameter in policy.named_parameters():
            grad = parameter.grad
            taken[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).numpy()
        return 0.0

    batches = train.make_batches(trajectories, advantages, config, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "take_step", keep)
        stats = train.update_policy(policy, policy, optimizer, batches, config, precision, 1)
    return taken, stats


NO_KL = dict(updates_per_step=1, kl_coef=0)


def gradients(trajectories: list, advantages: torch.Tensor) -> list:
    settings = [
        dict(shard=shard, micro_batch_tokens=tokens, aggregation=aggregation)
        for shard, tokens in ((False, 2048), (True, 20))
        for aggregation in ("paper", "token-mean")
    ]
    return [gradient_of(Config(**NO_KL, **setting), trajectories, advantages) for setting in settings]


@pytest.fixture(scope="module")
def trajectories():
    return ragged([[1, 3], [4, 2], [2, 1]])


@pytest.mark.parametrize(
    "world_size, advantages", [(2, [[0.7, -0.7], [0.0, 0.0], [0.7, -0.7]]), (3, [[0.0, 0.0], [0.0, 0.0], [0.3, 0.0]])]
)
def test_the_gradient_is_that_of_one_process(trajectories, world_size, advantages):
    advantages = torch.tensor(advantages)
    alone = {a: gradient_of(Config(**NO_KL, aggregation=a), trajectories, advantages) for a in ("paper", "token-mean")}
    assert all(abs(grads["model.embed_tokens.weight"]).max() > 1e-3 for grads, _ in alone.values())
    for process in together(world_size, gradients, trajectories, advantages):
        assert len(process) == 4
        for n, (grads, stats) in enumerate(process):
            wanted, wanted_stats = alone[("paper", "token-mean")[n % 2]]
            assert grads.keys() == wanted.keys()
            norm = math.sqrt(sum((grad**2).sum() for grad in wanted.values()))
            for name in wanted:
                assert abs(grads[name] - wanted[name]).max() < 1e-6 * max(1, norm), (n, name)
            assert stats["loss"] == pytest.approx(wanted_stats["loss"], abs=1e-6)


# --- whole runs -------------------------------------------------------------------------------------------------------


def run_all(config: Config, evaluation: eval.EvalConfig | None) -> None:
    train.main(config)
    if evaluation:
        eval.main(evaluation)


def evaluation_of(run: Path) -> eval.EvalConfig:
    return eval.EvalConfig(planners=[str(run)], questions=5, max_turns=2, output=str(run / "eval.json"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    run_all(small(run), evaluation_of(run))
    return run


def rows(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text().splitlines()))


def check_same_run(run: Path, alone: Path) -> None:
    """Equal but for the rounding of sums in another order."""

    def words(row: dict) -> dict:
        turns = [{k: v for k, v in turn.items() if "logprobs" not in k} for turn in row["turns"]]
        return row | {"turns": turns, "advantage": pytest.approx(row["advantage"])}

    for name in ("rollouts.jsonl", "test_before.jsonl", "test_after.jsonl"):
        ours, theirs = rows(run / name), rows(alone / name)
        assert list(map(words, ours)) == list(map(words, theirs)), name
    for turn in (turn for row in rows(run / "rollouts.jsonl") for turn in row["turns"]):
        assert len(turn["ref_logprobs"]) == len(turn["completion_ids"])  # of the rows of all processes
    for ours, theirs in zip(rows(run / "metrics.jsonl"), rows(alone / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {name for name in ours if name.startswith("t_")} - {"sampler_gap"}:
            assert ours[name] == (pytest.approx(theirs[name], rel=1e-3, abs=1e-5)), name
    ours, theirs = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (run, alone))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in ours)
    assert not [path.name for path in run.iterdir() if path.name.startswith(("adapter", "checkpoint."))]


def test_a_run_is_the_run_of_one_process(alone, tmp_path):
    run = tmp_path / "run"
    together(3, run_all, small(run), evaluation_of(run))
    check_same_run(run, alone)
    ours, theirs = (json.loads((path / "eval.json").read_text())["results"][str(path)] for path in (run, alone))
    assert ours == theirs


def test_more_processes_than_questions(alone, tmp_path):
    """A process without a question and without a row takes part all the same."""
    one, more = (small(tmp_path / name, steps=1, questions_per_step=1, max_turns=1) for name in ("one", "more"))
    train.main(one)
    together(3, run_all, more, None)
    check_same_run(tmp_path / "more", tmp_path / "one")


def test_a_split_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    run = tmp_path / "run"
    together(2, ask_to_stop, small(run, shard=True), 3)
    assert torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)["step"] == 3
    assert len(rows(run / "metrics.jsonl")) == 4
    together(3, run_all, small(run, shard=True), None)
    check_same_run(run, alone)


def ask_to_stop(config: Config, step: int) -> None:
    """One process alone gets the signal of Ctrl-C."""
    line = train.console_line

    def at_step(metrics, steps):
        if metrics["step"] == step and team().rank == team().world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return line(metrics, steps)

    train.console_line = at_step
    train.main(config)


# --- the real torchrun ------------------------------------------------------------------------------------------------


def torchrun(config: Config, world_size: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--standalone"]
    command += ["--shutdown-timeout", "100", "train.py", *flags(config)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers(process: subprocess.Popen) -> dict[int, int]:
    """rank -> process id."""
    children = [
        pid for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()
    ]
    environments = {int(child): Path(f"/proc/{child}/environ").read_text() for child in children}
    found = {pid: re.search(r"\0RANK=(\d+)\0", text) for pid, text in environments.items()}
    return {int(match[1]): pid for pid, match in found.items() if match}


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_others_and_the_last_checkpoint_is_whole(alone, tmp_path):
    run = tmp_path / "run"
    process = torchrun(small(run))
    wait_for_steps(run, 2, process)
    while not (run / "checkpoint").exists():
        time.sleep(0.02)
    ids = workers(process)
    os.kill(ids[1], signal.SIGKILL)
    killed = time.time()
    out, err = process.communicate(timeout=60)
    assert time.time() - killed < 20 and process.returncode == 1
    assert "2 processes; each sends 0.0027 GB per update" in out
    assert err.count(f"train.py: {lab.torchrun.ENDED}") == 1 and "traceback.log" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ids.values())
    assert torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)["step"] in (2, 4)
    train.main(small(run))  # with one process
    check_same_run(run, alone)


# --- bad input, and the calculation -----------------------------------------------------------------------------------


def test_shard_needs_others():
    with pytest.raises(UserError, match="--shard True needs several processes: start train.py by torchrun"):
        train.build_trainer(Config(shard=True), train.choose_precision(Config(), "cpu"))


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"lora_rank": 2}, {"optimizer": "adamw8bit"}])
def test_what_shard_does_not_go_with(changes, monkeypatch):
    monkeypatch.setattr(lab.torchrun, "team", lambda: SimpleNamespace(world_size=2))
    config = Config(shard=True, **changes)
    with pytest.raises(UserError, match="--shard True does not go with"):
        lab.torchrun.shard(None, config, train.choose_precision(config, "cpu"))


def test_processes_that_see_different_folders(monkeypatch, tmp_path):
    process = Team.__new__(Team)
    for others in ([(False, False)], [(True, 7)]):
        monkeypatch.setattr(Team, "gather", lambda self, files, others=others: [*files, *others])
        (tmp_path / "config.json").touch()
        with pytest.raises(UserError, match="the processes see different files in"):
            process.announce(None, tmp_path)


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun starts more processes than the 1 GPUs here"):
        Team()


def test_one_process_touches_no_torch_distributed(alone):
    assert isinstance(team(), Alone) and not torch.distributed.is_initialized()


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 16])
def test_shares_are_even_and_whole(world_size, count):
    shares = []
    for rank in range(world_size):
        process = Team.__new__(Team)
        process.rank, process.world_size = rank, world_size
        shares.append(process.share(list(range(count))))
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_bytes_in_the_docs():
    text = (ROOT / "docs" / "scale.md").read_text()
    table = re.findall(r"^\| (\S+)B \| (\d) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|", text, re.M)
    assert len(table) == 6
    for billions, processes, *gigabytes in table:
        count, n = float(billions) * 1e9, int(processes)
        wanted = [*traffic(count, count, n, False).values(), *traffic(count, count, n, True).values()]
        assert [float(x) for x in gigabytes] == pytest.approx([x / 1e9 for x in wanted], rel=0.01)


def test_the_calculation(alone, capsys):
    lab.torchrun.main(ScaleConfig(run=str(alone)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Calculated from 4 steps of") and len(lines) == 5
    seconds = [float(re.search(r"([\d.]+) s per step", line)[1]) for line in lines[1:]]
    steps = [m for m in rows(alone / "metrics.jsonl") if m["step"]]
    whole = sum(m[t] for m in steps for t in ("t_rollout", "t_judge", "t_update", "t_sync")) / 4
    assert seconds[0] == pytest.approx(whole, abs=0.01) and seconds == sorted(seconds, reverse=True)
    shutil.rmtree(alone / "nothing", ignore_errors=True)
    with pytest.raises(UserError, match="has no steps"):
        lab.torchrun.main(ScaleConfig(run=str(alone / "nothing")))
