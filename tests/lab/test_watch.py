"""The rule that stops a run: by hand, and in a run."""

import json

import pytest

import train
from lab import watch
from lab.watch import stop_at
from tools import UserError


def test_the_rule():
    assert stop_at([0.8] * 10 + [0.0] * 2) is None  # 8 of the last ten are 0.8: 0.64 is not below 0.6
    assert stop_at([0.8] * 10 + [0.0] * 3) == 13  # 0.56 is
    assert stop_at([0.1] * 5 + [0.8] * 5) is None  # ten steps have to be there
    assert stop_at([0.0] * 30) is None
    assert stop_at([0.2, 0.9] * 40) is None  # noise around a mean


def test_a_run_that_has_recovered_goes_on(tmp_path):
    """The rule looks at the last ten steps. A log that was written without it may hold an earlier fall."""
    earlier = [{"step": n, "reward": r} for n, r in enumerate([0.8] * 10 + [0.0] * 10 + [0.8] * 10, start=1)]
    path = tmp_path / "metrics.jsonl"
    watch.append_and_watch(path, *earlier, {"step": 31, "reward": 0.8})
    with pytest.raises(UserError, match="stopped at step 34: the mean reward of the last 10 steps is 0.56 after 0.80"):
        watch.append_and_watch(path, *({"step": n, "reward": 0.0} for n in (32, 33, 34)))


def test_a_run_that_falls_keeps_its_checkpoint(tmp_path, monkeypatch):
    """With a window of one step, a run whose second reward is lower ends there, and its first checkpoint stays."""
    monkeypatch.setattr(watch, "WINDOW", 1)
    rewards = iter([1.0, 0.0])

    def score(examples, groups, *others):
        value = next(rewards)
        pairs = [(example, trajectory) for example, group in zip(examples, groups) for trajectory in group]
        for _, trajectory in pairs:
            trajectory.reward = value
        return pairs

    monkeypatch.setattr(train, "score", score)
    small = dict(steps=3, questions_per_step=1, group_size=2, dev_questions=1, test_questions=1, max_turns=1)
    config = train.Config(run_dir=str(tmp_path), eval_every=1, device="cpu", **small)
    with pytest.raises(UserError, match="stopped at step 2: the mean reward of the last 1 steps is 0.00 after 1.00"):
        watch.main(config)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert (tmp_path / "checkpoint").exists() and not (tmp_path / "result.json").exists()
    assert train.append is not watch.append_and_watch
