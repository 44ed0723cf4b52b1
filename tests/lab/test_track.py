"""What trackers get: TensorBoard's files read back, wandb offline, a run that was stopped in between."""

import json
import subprocess
import sys

import pytest

import train
from lab import track
from tests.test_train import ROOT, flags, tiny
from tools import UserError

SMALL = dict(questions_per_step=1, group_size=2, max_turns=1, dev_questions=1, test_questions=1)


def test_names_are_grouped():
    metrics = {"step": 3, "reward": 0.5, "kl": 0.1, "turns": 2.0, "t_rollout": 1.5, "tool_shares": {"Search": 0.7}}
    expected = {
        "score/reward": 0.5,
        "loss/kl": 0.1,
        "planner/turns": 2.0,
        "time/rollout": 1.5,
        "tool_shares/Search": 0.7,
    }
    assert track.grouped(metrics) == expected


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="--report_to trackio: run `pip install trackio` first"):
        track.open_tracker(tiny(tmp_path, report_to="trackio"), tmp_path)


def test_tensorboard_has_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = tiny(run, report_to="tensorboard", steps=3, eval_every=2, **SMALL)

    class AfterThreeSteps:  # the checkpoint is of step 2, so step 3 runs twice
        def __bool__(self):
            if (run / "metrics.jsonl").read_text().count("t_sync") == 3:
                raise KeyboardInterrupt
            return False

    with monkeypatch.context() as patch:
        patch.setattr(train, "listen_for_stop", AfterThreeSteps)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    train.main(config)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rewards = events.Scalars("score/reward")
    assert [(e.step, e.value) for e in rewards] == [(m["step"], pytest.approx(m["reward"])) for m in logged]
    texts = events.Tensors("trajectories/text_summary")
    assert [e.step for e in texts] == [1, 3] and b"question: " in texts[0].tensor_proto.string_val[0]


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    config = tiny(tmp_path / "run", report_to="wandb", steps=1, **SMALL)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "train.py", *flags(config)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert b"score/reward" in file.read_bytes()
