"""The speedrun: five runs, one row, and the rules."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from lab import speedrun
from tools import UserError


def results(*shares, seconds=60.0):
    return [{"after": {"accuracy": share}, "train_seconds": seconds + n} for n, share in enumerate(shares)]


def test_the_rules():
    row = speedrun.verdict(results(0.9, 0.95, 0.89, 0.91, 0.88))
    assert row == "62 s | 90.0, 95.0, 89.0, 91.0, 88.0 % (60, 61, 62, 63, 64 s): valid"
    assert "not valid" in speedrun.verdict(results(0.95, 0.95, 0.95, 0.95, 0.87))
    assert "not valid" in speedrun.verdict(results(0.89, 0.89, 0.89, 0.99, 0.99))


def test_it_runs_five_seeds_with_the_flags_and_stops_at_the_first_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command, cwd):
        commands.append(command)
        folder = tmp_path / command[-1]
        folder.mkdir(parents=True)
        if len(commands) < 7:
            (folder / "result.json").write_text(json.dumps(results(0.95)[0]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    speedrun.main(["--steps", "9", "--processes", "2"])
    assert [c[c.index("--seed") + 1] for c in commands] == list("01234")
    assert all(" --nproc-per-node 2 --standalone train.py --steps 9 --seed " in " ".join(c) for c in commands)
    assert capsys.readouterr().out.endswith(": valid\n")
    monkeypatch.chdir("/")
    commands += [None] * 5
    with pytest.raises(UserError, match="the same command goes on"):
        monkeypatch.setattr(speedrun, "SEEDS", [7])
        speedrun.main([])
