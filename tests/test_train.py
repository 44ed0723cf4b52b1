"""The whole loop on the bundled backbone: a run and its folder, resume bit for bit, stops, and bad input."""

import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from agent import Memory, Step, Trajectory
from eval import Flags
from llm import EngineError
from tasks import Example, questions_of_step
from tools import UserError
from train import Config

ROOT = Path(__file__).parent.parent
TINY = dict(
    steps=4,
    questions_per_step=6,
    group_size=4,
    max_turns=2,
    eval_every=2,
    dev_questions=4,
    test_questions=6,
    updates_per_step=1,
)


def tiny(run_dir: Path, **changes) -> Config:
    return Config(**(TINY | {"run_dir": str(run_dir)} | changes))


def flags(config: Config) -> list[str]:
    values = {name: value if isinstance(value, list) else [value] for name, value in asdict(config).items()}
    return [word for name, words in values.items() for word in (f"--{name}", *map(str, words))]


def command(config: Config, **options) -> subprocess.Popen:
    arguments = [sys.executable, "train.py", *flags(config)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.time() + 90
    while time.time() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > count:
            return
        time.sleep(0.02)
    pytest.fail(f"the run did not reach step {count}: {process.communicate()}")


def timeless(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in m.items() if not k.startswith("t_") and k != "tokens_per_second"} for m in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train.main(tiny(run))
    return run


def test_what_a_run_leaves(finished):
    assert json.loads((finished / "config.json").read_text())["group_size"] == TINY["group_size"]
    metrics = timeless(finished)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert all("dev_accuracy" in m for m in metrics[1::2]) and "dev_accuracy" not in metrics[2]
    for m in metrics[1:]:
        assert m["ratio"] == pytest.approx(1, abs=1e-6)  # one update: the policy is pi_old
        assert m["clip_fraction"] == 0 and m["max_ratio"] == 1 and m["sampler_gap"] < 1e-4
        assert 0 <= m["reward"] <= 1 and 0 <= m["zero_variance_groups"] <= 1
    assert metrics[1]["kl"] == pytest.approx(0, abs=1e-9)  # the first step starts at the reference policy
    assert metrics[4]["kl"] > 0
    rollouts = [json.loads(line) for line in (finished / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 4 * TINY["questions_per_step"] * TINY["group_size"]
    for m in metrics[1:]:
        mine = [r for r in rollouts if r["step"] == m["step"]]
        groups = [mine[i : i + TINY["group_size"]] for i in range(0, len(mine), TINY["group_size"])]
        equal = [len({r["reward"] for r in group}) == 1 for group in groups]
        assert all(len({r["question"] for r in group}) == 1 for group in groups)
        assert m["zero_variance_groups"] == pytest.approx(sum(equal) / len(groups))
        assert m["reward"] == pytest.approx(sum(r["reward"] for r in mine) / len(mine))
        assert m["turns"] == pytest.approx(sum(len(r["turns"]) for r in mine) / len(mine))
        lengths = [len(turn["completion_ids"]) for r in mine for turn in r["turns"]]
        assert m["tokens_per_turn"] == pytest.approx(sum(lengths) / len(lengths))
        assert m["truncated_turns"] == sum(n == 64 for n in lengths) / len(lengths) < 0.1
    turns = [(r["step"], turn) for r in rollouts for turn in r["turns"]]
    assert all(len(turn["completion_ids"]) == len(turn["logprobs"]) == len(turn["ref_logprobs"]) for _, turn in turns)
    changes = [(step, max(abs(a - b) for a, b in zip(turn["logprobs"], turn["ref_logprobs"]))) for step, turn in turns]
    assert all(change <= 2e-4 for step, change in changes if step == 1)  # to the last digit that is written
    assert sum(change > 1e-2 for step, change in changes if step == 4) > 20  # of about 45
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == {"before", "after", "train_seconds"}
    for when in ("before", "after"):
        test = [json.loads(line) for line in (finished / f"test_{when}.jsonl").read_text().splitlines()]
        assert sum(r["reward"] for r in test) / len(test) == result[when]["accuracy"] and len(test) == 6
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in finished.iterdir()} == (
        {"config.json", "lock", "metrics.jsonl", "rollouts.jsonl", "result.json", "curves.png", "checkpoint"}
        | {"test_before.jsonl", "test_after.jsonl"}
    )


def test_the_checkpoint_is_a_plain_model_folder(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
    initial = AutoModelForCausalLM.from_pretrained(ROOT / "tinyworld" / "backbone")
    assert AutoTokenizer.from_pretrained(finished / "checkpoint").chat_template
    assert any((a != b).any() for a, b in zip(model.parameters(), initial.parameters()))


def test_killed_and_resumed_is_bit_identical(finished, tmp_path):
    """SIGKILL after step 3, one step past the last checkpoint; the same command then ends like the whole run."""
    run = tmp_path / "killed"
    process = command(tiny(run))
    wait_for_steps(run, 3, process)
    process.kill()
    process.wait()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # and a line that was cut
    train.main(tiny(run))
    assert timeless(run) == timeless(finished)
    assert (run / "rollouts.jsonl").read_bytes() == (finished / "rollouts.jsonl").read_bytes()
    weights = [(r / "checkpoint" / "model.safetensors").read_bytes() for r in (run, finished)]
    assert weights[0] == weights[1]
    results = [json.loads((r / "result.json").read_text()) for r in (run, finished)]
    assert results[0]["after"] == results[1]["after"]


def test_ctrl_c_saves_and_exits_cleanly(finished, tmp_path, capsys):
    run = tmp_path / "stopped"
    process = command(tiny(run, eval_every=100))
    wait_for_steps(run, 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command continues" in out and "Traceback" not in err
    step = torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)["step"]
    assert step == len(timeless(run)) - 1 < 4
    train.main(tiny(run, eval_every=100))
    assert "continuing after step" in capsys.readouterr().out
    assert (run / "rollouts.jsonl").read_bytes() == (finished / "rollouts.jsonl").read_bytes()


def test_a_finished_run_is_not_trained_again(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    train.main(tiny(finished))
    out = capsys.readouterr().out
    assert "is finished" in out and "accuracy (n = 6)" in out and "curves.png" in out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_several_updates_clip_and_options_run(finished, tmp_path):
    """With another seed, so that its questions are others."""
    options = dict(
        questions_per_step=12,
        updates_per_step=3,
        learning_rate=3e-3,
        clip_high=0.3,
        micro_batch_tokens=500,
    )
    departures = dict(aggregation="token-mean", normalize_std=False, tis_cap=2.0)
    train.main(tiny(tmp_path / "run", steps=1, seed=1, **options, **departures))
    metrics = timeless(tmp_path / "run")[1]
    assert abs(metrics["ratio"] - 1) > 1e-3 and metrics["clip_fraction"] > 0 and metrics["kl"] > 0
    asked = []
    for run in (finished, tmp_path / "run"):
        rollouts = map(json.loads, (run / "rollouts.jsonl").read_text().splitlines())
        asked.append({row["question"] for row in rollouts if row["step"] == 1})
    assert not asked[0] & asked[1]


def test_the_objective_is_the_papers_unless_asked_otherwise():
    config = train.Config()
    assert (config.aggregation, config.normalize_std, config.kl_coef) == ("paper", True, 0.001)
    assert (config.clip_low, config.clip_high, config.tis_cap) == (0.2, 0.2, 0.0)


@pytest.mark.parametrize(
    "dtype, lora_rank, device, expected",
    [
        ("auto", 0, "cpu", (torch.float32, torch.float32, torch.float32)),
        ("auto", 0, "cuda", (torch.float32, torch.bfloat16, torch.bfloat16)),
        ("mixed", 0, "cpu", (torch.float32, torch.bfloat16, torch.bfloat16)),
        ("float16", 0, "cuda", (torch.float32, torch.float16, torch.float16)),
        ("mixed", 8, "cuda", (torch.bfloat16, torch.bfloat16, torch.bfloat16)),
        ("float16", 8, "cuda", (torch.float16, torch.float16, torch.float16)),
        ("bfloat16", 8, "cuda", (torch.bfloat16, torch.bfloat16, torch.bfloat16)),
        ("float32", 8, "cuda", (torch.float32, torch.float32, torch.float32)),
    ],
)
def test_precision_of_weights_engines_and_arithmetic(dtype, lora_rank, device, expected):
    precision = train.choose_precision(Config(dtype=dtype, lora_rank=lora_rank), device)
    assert (precision.weights, precision.engine, precision.arithmetic) == expected


def test_float16_trains_with_a_scaled_loss(finished, tmp_path):
    """Gradients are those of float32 up to the rounding of float16. An update that it cannot hold is left out."""
    precision = train.choose_precision(Config(dtype="float16"), "cpu")
    train.main(tiny(tmp_path / "half", dtype="float16", steps=1, dev_questions=1, test_questions=1))
    half, full = timeless(tmp_path / "half")[1], timeless(finished)[1]
    assert 0 < half["sampler_gap"] < 0.01
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.5)  # the rollouts may differ a little

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for factor, expected in ((1e38, 1.0), (0.25, 0.75)):
        precision.scaler.scale(factor * weight.sum()).backward()
        precision.scaler.unscale_(optimizer)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()
        assert weight.item() == expected


def test_bfloat16_weights_need_an_optimizer_that_can_update_them():
    with pytest.raises(UserError, match="loses small updates"):
        train.choose_precision(Config(dtype="bfloat16"), "cuda")
    precision = train.choose_precision(Config(dtype="bfloat16", optimizer="adamw8bit"), "cuda")
    assert (precision.weights, precision.arithmetic) == (torch.bfloat16, torch.float32)  # float32: no autocast


def test_the_learning_rate_rises_then_falls_to_nothing():
    config = train.Config(learning_rate=10.0, warmup_steps=2, steps=5, updates_per_step=2)
    assert [train.learning_rate(config, n) for n in range(10)] == pytest.approx([5, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    config.decay = False
    assert [train.learning_rate(config, n) for n in range(3)] == [5, 10, 10]


def test_questions_of_step_is_a_stream_of_shuffled_epochs():
    data = [Example(str(i), "") for i in range(10)]
    drawn = [[e.question for e in questions_of_step(data, step, 4, seed=0)] for step in range(1, 6)]
    flat = [question for step in drawn for question in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(e.question for e in data) and flat[:10] != flat[10:]
    assert [e.question for e in questions_of_step(data, 3, 4, seed=0)] == drawn[
        2
    ]  # of the step alone: resume needs no state
    assert [e.question for e in questions_of_step(data, 1, 25, seed=0)][:20] == flat


def test_printed_trajectories_cannot_control_the_terminal():
    memory = Memory("q", "a", [Step("clear \x1b[2J", "Search", "c", "bell \x07 \x9b31m\r\nline", "STOP")])
    text = train.transcript(Example("q", "x"), Trajectory("q", [], memory, "y\x1b[31m"))
    assert "\\x1b[2J" in text and "\\x07 \\x9b31m\\r\n  line" in text
    assert all(char == "\n" or char.isprintable() for char in text)


# --- bad input: one clear line, exit code 2, nothing lost -------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"group_size": 1}, "--group_size 1 is out of range: .* G, trajectories per question .at least 2"),
        ({"temperature": 0.0}, "nothing to compare"),
        ({"temperature": float("nan")}, "--temperature nan is out of range"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": -1.0}, "(at least 0)"),
        ({"clip_high": float("inf")}, "--clip_high inf is out of range"),
        ({"dtype": "bfloat16"}, "loses small updates"),
        ({"model": "no/such/folder"}, "cannot load a model from no/such/folder"),
        ({"task": "nowhere"}, "there is no nowhere/train.jsonl"),
        ({"tools": ["Sarch"]}, "there is no Sarch"),
        ({"reward": "lab.no_such.reward"}, "there is no lab.no_such.reward"),
    ],
)
def test_bad_flags(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train.main(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train.start_run(tmp_path / "run", tiny(tmp_path / "run"))  # the mended command may have the folder


def test_a_start_that_failed_can_be_mended(tmp_path, monkeypatch):
    """The frozen modules' server is down, say. Nothing was written that another command would have to respect."""

    def fail(*_):
        raise EngineError("no server")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", fail)
        with pytest.raises(EngineError, match="no server"):
            train.main(tiny(tmp_path / "run", learning_rate=1.0))
    train.start_run(tmp_path / "run", tiny(tmp_path / "run"))


def test_another_config_in_the_same_folder(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match="--learning_rate.*name another with --run_dir"):
        train.main(tiny(finished, learning_rate=1.0))
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_finished_run_without_its_checkpoint_stays_finished(finished, tmp_path, capsys):
    """It was deleted to save space: that is no reason to train again over the logs."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoint")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train.main(tiny(run))
    out = capsys.readouterr().out
    assert "is finished" in out and "accuracy (n = 6)" in out
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_one_process_per_run_folder(finished, tmp_path):
    """The lock ends with its process, however that ends."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; file = open({str(run / 'lock')!r}, 'w')\n"
         "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another process trains in .*--run_dir"):
        train.main(tiny(run))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder.kill()
    holder.wait()
    train.main(tiny(run))


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_log_that_was_changed_by_hand(finished, tmp_path, capsys, name):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    lines = (run / name).read_text().splitlines(keepends=True)
    (run / name).write_text("".join(line for line in lines if json.loads(line)["step"] != 2))
    train.main(tiny(run))
    assert f"{name} lacks 1 of 4 steps; the run goes on" in capsys.readouterr().out

    (run / "result.json").unlink()
    (run / name).write_text("".join([lines[0], "{half a line\n", *lines[1:]]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{name} is damaged .*mend or remove it"):
        train.main(tiny(run))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


class Code:
    """Runs where a pickle of it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "damage",
    ["no trainer.pt", "half trainer.pt", "zeros in trainer.pt", "code in trainer.pt", "half weights", "no weights"],
)
def test_a_half_written_checkpoint(finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()  # it comes last
    path = run / "checkpoint" / ("trainer.pt" if "trainer" in damage else "model.safetensors")
    data = path.read_bytes()
    path.unlink()
    if damage.startswith("half"):
        path.write_bytes(data[: len(data) // 2])
    elif damage.startswith("zeros"):
        path.write_bytes(bytes(len(data)))
    elif damage.startswith("code"):
        torch.save({"step": 4, "optimizer": Code(tmp_path / "executed"), "result": {}}, path)
    with pytest.raises(UserError, match="checkpoint is damaged .*: restore it, or remove the folder"):
        train.main(tiny(run))
    assert not (tmp_path / "executed").exists()
    assert (run / "rollouts.jsonl").read_bytes() == (finished / "rollouts.jsonl").read_bytes()  # nothing is lost


def test_too_little_memory_is_no_damage(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), train.whole(tmp_path):
        raise torch.OutOfMemoryError("another program holds it")


def test_a_kill_while_saving_leaves_a_checkpoint(finished, tmp_path, monkeypatch):
    """Killed between any two file operations of `save`, a resume finds the new checkpoint or the last one."""
    policy, tokenizer = train.load_model(finished / "checkpoint")
    optimizer = torch.optim.AdamW(policy.parameters())

    class Killed(BaseException):
        pass

    operations = [(shutil, "rmtree"), (torch, "save"), (Path, "rename")]
    for survive in range(6):
        run = tmp_path / f"run{survive}"
        shutil.copytree(finished, run)
        count = 0
        with monkeypatch.context() as patch:
            for owner, name in operations:
                real = getattr(owner, name)

                def step(*args, real=real, **kwargs):
                    nonlocal count
                    if (count := count + 1) > survive:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(owner, name, step)
            with pytest.raises(Killed):
                train.save(run, 5, policy, tokenizer, optimizer, {})
        assert train.resume(run, policy, torch.optim.AdamW(policy.parameters()))[0] in (5, 6)


def test_weights_that_are_not_finite_are_not_saved(finished, tmp_path):
    policy, tokenizer = train.load_model(finished / "checkpoint")
    policy.model.norm.weight.data[3] = math.nan
    with pytest.raises(EngineError, match="a weight is nan or infinite"):
        train.save(tmp_path, 5, policy, tokenizer, torch.optim.AdamW(policy.parameters()), {})
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_an_update_stops_the_run():
    precision = train.choose_precision(Config(), "cpu")
    train.check_update(1, {"grad_norm": 1e3, "sampler_gap": 1e-5}, precision)
    for wrong in ({"grad_norm": math.inf}, {"grad_norm": math.nan}, {"sampler_gap": 0.01}, {"sampler_gap": math.nan}):
        (name,) = wrong
        with pytest.raises(EngineError, match=f"step 3: {name} is"):
            train.check_update(3, {"grad_norm": 1.0, "sampler_gap": 0.0} | wrong, precision)


def test_help_lists_every_flag_in_its_group_with_its_default():
    help_text = Flags(Config).format_help()
    groups = [line for line in help_text.splitlines() if re.fullmatch(r"\w.*:", line)]
    assert groups == ["options:", "the system:", "the run:", "Flow-GRPO:", "the trainer at real size:"]
    words = " ".join(help_text.split())
    for name, value in asdict(Config()).items():
        entry = re.search(rf" --{name} .*?\(default: (.*?)\)", words)
        assert entry and entry[1] == str(value).strip() and len(entry[0]) > len(name) + 30, name
    assert len(asdict(Config())) <= 38 and words.count(" * ") == 10  # the ones to change first


def test_a_disk_that_fills_up_while_saving(tmp_path):
    """No file may grow past 1 MB, as on a disk that is nearly full: one line, exit code 2, and the logs are kept."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    run = tmp_path / "run"
    process = command(tiny(run, steps=1, questions_per_step=2), preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    (ROOT / "traceback.log").unlink()
    assert process.returncode == 1 and "Traceback" not in err
    assert len(err.split("train.py: ")) == 2 and "traceback.log says where" in err
    assert len(timeless(run)) == 2 and not (run / "checkpoint").exists()
