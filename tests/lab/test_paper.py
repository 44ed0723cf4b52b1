"""The paper's analyses in small: variants against numbers worked by hand, runs that are not repeated, a true page."""

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from flow_grpo import flow_grpo_loss, group_advantages
from judge import rules
from lab import paper, paper_figures, paper_runs, variants
from lab.paper import PaperConfig
from lab.paper_runs import SCALES, by_id, do, do_all, fingerprint
from lab.variants import (
    clipped_weight,
    fading_credit,
    last_turn,
    noisier_judge,
    noisy_judge,
    same_turn,
    sequence_ratio,
    turn_pooled,
)
from tasks import Example
from tools import UserError

ROOT = Path(__file__).parent.parent.parent
TINY = SCALES["tiny"]


@pytest.fixture(autouse=True, scope="module")
def at_home():
    """Runs name the bundled backbone from the root of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


# --- variants ---------------------------------------------------------------------------------------------------------


def test_credit_of_the_turns():
    """Two trajectories of three turns and of one, advantages 2 and -3."""
    advantages = torch.tensor([[2.0, -3.0]])
    assert last_turn(advantages, [3, 1]).tolist() == [0, 0, 2, -3]
    assert fading_credit(advantages, [3, 1]).tolist() == [0.5, 1, 2, -3]


def test_turns_of_the_same_number_are_compared():
    """Two groups of two trajectories. In the first, one has a second turn; the other has no signal."""
    credit = same_turn(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), [1, 2, 2, 1])
    half = math.sqrt(0.5)  # of two numbers, each lies so many sample standard deviations from their mean
    assert credit.tolist() == pytest.approx([half, -half, 0, 0, 0, 0])
    won_at_once = group_advantages(torch.tensor([[1.0] + [0.0] * 7]))  # seven equal second turns: nothing to compare
    assert same_turn(won_at_once, [1] + [2] * 7)[2::2].tolist() == [0.0] * 7


def test_a_noisy_judge_errs_as_often_as_it_says():
    examples = [Example(f"Question {n}?", "yes") for n in range(400)]
    trajectory = lambda answer: SimpleNamespace(answer=answer, reward=None)  # noqa: E731
    for judge, share in ((noisy_judge, 0.1), (noisier_judge, 0.2)):
        pairs = judge(examples, [[trajectory("yes"), trajectory("no")] for _ in examples], rules, None)
        wrong = [pair[1].reward != (pair[1].answer == "yes") for pair in pairs]
        for side in (wrong[::2], wrong[1::2]):  # either way
            assert sum(side) / len(side) == pytest.approx(share, abs=0.06)


def test_statistics_pooled_over_turns():
    """4 wins of 3 turns, 4 losses of 1 turn: 12 rows of 1 and 4 of 0 have mean 3/4 and std sqrt(16 * 3/16 / 15)."""
    rewards, turns = torch.tensor([[1.0] * 4 + [0.0] * 4, [1.0] * 8]), [3] * 4 + [1] * 4 + [2] * 8
    rows = turn_pooled(group_advantages(rewards), turns)
    assert rows[:12].tolist() == pytest.approx([0.25 / math.sqrt(0.2)] * 12, abs=1e-5)  # 0.559
    assert rows[12:16].tolist() == pytest.approx([-0.75 / math.sqrt(0.2)] * 4, abs=1e-5)  # -1.677
    assert rows[16:].tolist() == [0.0] * 16  # all solved: no signal, and no nan
    without_std = turn_pooled(group_advantages(rewards, normalize_std=False), turns)
    assert torch.allclose(rows, without_std, atol=1e-5)  # Eq. 7's numbers or the rewards: the same


def test_ratio_of_a_turn_is_the_geometric_mean():
    """One row with token ratios 2 and 1/2: their mean is 1. Another with 3 and 3 and a pad: 3, clipped to 1.5."""
    old = torch.full((2, 3), -1.0)
    logprobs = old + torch.tensor([[2.0, 0.5, 1.0], [3.0, 3.0, 7.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, False]])
    weights, advantages = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0])
    loss, stats = sequence_ratio(logprobs, old, None, advantages, mask, weights, clip_high=0.5)
    assert loss.item() == pytest.approx(-(0.5 * 1 + 0.5 * 1.5))
    assert stats["ratio"].item() == pytest.approx(0.5 * 1 + 0.5 * 3)
    assert stats["clip_fraction"].item() == pytest.approx(0.5)


def test_other_ratios_begin_as_flow_grpo_and_keep_its_kl():
    torch.manual_seed(0)
    logprobs, ref = -torch.rand(3, 4), -torch.rand(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    rest = (ref, torch.tensor([1.0, -2.0, 0.5]), mask, torch.tensor([0.25, 0.25, 0.5]))
    gradients, kls = [], []
    for loss_function in (flow_grpo_loss, sequence_ratio, clipped_weight):
        x = logprobs.clone().requires_grad_()
        loss, stats = loss_function(x, logprobs, *rest, clip_low=0.2, clip_high=0.2, kl_coef=0.5)
        gradients.append(torch.autograd.grad(loss, x)[0])
        kls.append(stats["kl"].item())
    assert all(torch.allclose(gradients[0], x, atol=1e-6) for x in gradients) and gradients[0].abs().max() > 0.1
    assert kls == pytest.approx([kls[0]] * 3) and kls[0] > 0


def test_a_clipped_weight_keeps_every_gradient():
    """Ratios 3 and 1/2, clipped to 1.2 and 0.8: Flow-GRPO gives the first no gradient, CISPO the clipped one."""
    old = torch.tensor([[-2.0, -1.0]])
    logprobs = (old + torch.tensor([[3.0, 0.5]]).log()).requires_grad_()
    rest = (None, torch.tensor([1.0]), torch.ones(1, 2).bool(), torch.tensor([1.0]))
    loss, stats = clipped_weight(logprobs, old, *rest, clip_low=0.2, clip_high=0.2)
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [pytest.approx([-0.6, -0.4])]
    assert stats["clip_fraction"].item() == pytest.approx(1.0)
    theirs, _ = flow_grpo_loss(logprobs, old, *rest, clip_low=0.2, clip_high=0.2)
    assert torch.autograd.grad(theirs, logprobs)[0].tolist() == [pytest.approx([0, -0.25])]


def test_every_edit_is_shown_as_it_is_run():
    shown = {name for figure in paper.FIGURES.values() for name in figure.variants}
    assert shown == set(variants.PATCHES) | set(variants.FLAGS)
    assert all(paper.code_of(name) for name in shown)
    for name, (place, function) in variants.PATCHES.items():
        assert hasattr(train, place) and f"def {function.__name__}(" in paper.code_of(name)
    assert paper.code_of("no-std") == "- normalize_std = True\n+ normalize_std = False\n"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, minutes, left_out", [("full", 80, []), ("quick", 10, ["size", "long"])])
def test_the_plan_keeps_to_its_time(scale, minutes, left_out):
    runs = paper_runs.plan(SCALES[scale])
    assert left_out == [n for n, f in paper.FIGURES.items() if not paper.runs_of(f, by_id(SCALES[scale]))]
    assert len({run.id for run in runs}) == len(runs)
    assert sum(run.seconds for run in runs) / 60 < 2 * minutes  # two runs at a time
    for n, run in enumerate(runs):
        assert set(run.needs) <= {before.id for before in runs[:n]}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """All runs of the tiny scale: one of each kind is real, the others are given its record."""
    out = tmp_path_factory.mktemp("paper")
    runs, folder, records = by_id(TINY), out / "runs-tiny", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_runs, "BUDGETS", (1, 4, 5))  # the figure's claims are about the first, 4, and the last
        for name in ("main", "imitation-peer", "turn-budget", "gspo", "three-families", "other-families"):
            run = runs[f"{name}-seed0"]
            do(run, folder / run.id, fingerprint(run, runs))
            records[run.work] = json.loads((folder / run.id / "record.json").read_text())
    for run in runs.values():
        if not (folder / run.id).exists():
            (folder / run.id).mkdir()
            record = records.get(run.work, records[paper_runs.train_planner])
            if run.name == "pretrain":
                record = record | {"data": {"small": 1, "bundled": 2}}
            record = record | {"fingerprint": fingerprint(run, runs)}
            (folder / run.id / "record.json").write_text(json.dumps(record))
    paper.write_figures(out, TINY)
    return out


def test_a_reward_counts_each_question_once():
    rollouts = [{"question": question, "reward": reward} for question in "ab" for reward in (1.0, 0.0, 0.0, 1.0)]
    rollouts[0]["reward"] = 0.0
    assert paper_runs.means_of_groups(rollouts) == [0.25, 0.5]


def test_a_run_uses_its_variant(out):
    """And the function that it replaced is back afterwards."""
    assert train.flow_grpo_loss is flow_grpo_loss
    config = json.loads((out / "runs-tiny" / "gspo-seed0" / "run" / "config.json").read_text())
    assert (config["task"], config["clip_high"]) == ("tinyworld-hard", 0.04)
    steps = json.loads((out / "runs-tiny" / "gspo-seed0" / "record.json").read_text())["data"]["steps"]
    assert [step["step"] for step in steps] == [1, 2] and steps[0]["reward"][0] == 2  # questions


def test_stopped_and_started_again_no_finished_run_is_repeated(out, tmp_path):
    shutil.copytree(out, tmp_path / "paper")
    folder = tmp_path / "paper" / "runs-tiny"
    shutil.rmtree(folder / "no-std-seed0")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/record.json")}
    refused = []

    def stop() -> None:
        while not (folder / "no-std-seed0" / "run" / "config.json").exists():
            time.sleep(0.05)
        try:
            do_all(tmp_path / "paper", TINY)  # nobody else works in that folder now
        except UserError as error:
            refused.append(str(error))
        os.kill(os.getpid(), signal.SIGINT)

    at_sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(UserError, match="stopped; the same command continues"):
        do_all(tmp_path / "paper", TINY)
    signal.signal(signal.SIGINT, at_sigint)
    assert "another lab.paper" in refused[0]
    assert not (folder / "no-std-seed0" / "record.json").exists()

    run = by_id(TINY)["no-std-seed0"]
    do(run, folder / run.id, fingerprint(run, by_id(TINY)))
    do_all(tmp_path / "paper", TINY)  # with nothing left to do
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_a_run_of_other_code_is_made_again(out, tmp_path, monkeypatch):
    shutil.copytree(out, tmp_path / "paper")
    monkeypatch.setattr(paper_runs, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: None))
    monkeypatch.setitem(variants.PATCHES, "last-turn", ("broadcast_to_turns", fading_credit))
    again = []
    process = SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(paper_runs, "start", lambda run, *_: again.append(run.id) or process)
    do_all(tmp_path / "paper", TINY)
    assert again == ["last-turn-seed0"]
    (tmp_path / "paper" / "runs-tiny" / "imitation-peer-seed0" / "record.json").write_text('{"fingerprint": "')
    do_all(tmp_path / "paper", TINY)  # one record is damaged
    assert sorted(again[1:]) == ["imitation-peer-seed0", "last-turn-seed0"]
    monkeypatch.setattr(paper_runs, "code_behind", lambda script: "other")
    again.clear()
    do_all(tmp_path / "paper", TINY)
    assert set(again) == set(by_id(TINY))
    runs = by_id(TINY)
    assert all(again.index(need) < again.index(run.id) for run in runs.values() for need in run.needs)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    run = by_id(TINY)["main-seed0"]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by lab.paper"):
        do(run, tmp_path, "made by")
    assert (tmp_path / "thesis.txt").exists()


def test_a_run_that_fails_says_why(out, tmp_path, monkeypatch):
    """A shell script takes the place of Python, whose start takes seconds."""
    shutil.copytree(out, tmp_path / "paper")
    (tmp_path / "paper" / "runs-tiny" / "gspo-seed0" / "record.json").unlink()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho Loading >&2\necho "paper.py: $4 was not made by lab.paper" >&2\nexit 2\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=r"gspo-seed0 failed \(.*not made by lab.paper.*gspo-seed0.log has more"):
        do_all(tmp_path / "paper", TINY)


# --- figures and page -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(out):
    return paper.write_page(out).read_text()


def test_the_page_needs_the_json_alone(out, page, tmp_path):
    for path in out.glob("*.json"):
        shutil.copy(path, tmp_path)
    paper.main(PaperConfig(figures=True, out=str(tmp_path)))
    assert (tmp_path / "index.html").read_text() == page.replace(str(out), str(tmp_path))


def test_every_figure_has_what_it_must(out, page):
    assert len(paper.FIGURES) >= 12
    for name, figure in paper.FIGURES.items():
        data = json.loads((out / f"{name}.json").read_text())
        section = page.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert section.count("<svg") == len(data["panels"]) > 0 and f'href="{name}.json"' in section
        assert "In the paper.</b> " + paper.html.escape(figure.paper) in section and "seed 0" in section
        for panel in data["panels"]:
            assert panel["y"] in section and panel["x"] in section and "95 % intervals" in section
            points = [point for series in panel["series"].values() for point in series]
            assert points and all(p["low"] <= p["y"] <= p["high"] for p in points)
            assert all(p["n"] >= 1 and p["seeds"] for p in points)
        claims = [line for claim in figure.claims if (line := paper.sentence(data, claim))]
        assert claims or not figure.claims
        assert all("(n = " in line and "seed 0" in line and "[" in line for line in claims)
        assert paper.html.escape(figure.says(data)) in section and section.count("<table") == bool(figure.table)
        assert f"**{figure.says(data)}**" in (out / "findings.md").read_text()
    assert "quick version" in page


def test_a_difference_is_clear_if_its_interval_excludes_zero():
    """Differences of -10, -12 and -14 points: mean -12, standard error 2 / sqrt(3), 4.30 of them to each side."""
    point = paper_figures.paired_point("x", {0: -10.0, 1: -12.0, 2: -14.0})
    half = 4.30 * 2 / math.sqrt(3)
    assert (point["y"], point["low"], point["high"]) == pytest.approx((-12, -12 - half, -12 + half))
    assert paper_figures.conclusion(point).startswith("It learns more slowly here, in 3 of 3 seeds.")
    spread = paper_figures.paired_point("x", {0: -10.0, 1: 2.0, 2: 4.0})
    needed = "No effect is shown: with 3 seeds as noisy as these, a difference has to exceed about 19 points."
    assert paper_figures.conclusion(spread) == needed
    single = paper_figures.paired_point("x", {0: 50.0})
    assert "Nothing" in paper_figures.conclusion(single) and not paper_figures.clear(single)
    data = {"panels": [paper_figures.panel("", "", {paper_figures.GAIN: [point, spread]}, False)]}
    expected = "1 of 2 changes differs from Flow-GRPO by more than the noise between seeds: x (-12.0 points)."
    assert paper.effects(data) == expected


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert "default-src 'none'" in page and "<script" not in page
    assert set(re.findall(r'(?:src|href)="(?!#|\w[\w-]*\.json)([^"]*)"', page)) == {"https://arxiv.org/abs/2510.05592"}
    assert not re.search(r"@import|url\((?!#)", page)
    ids = re.findall(r'clipPath id="([^"]*)"', page)
    assert len(set(ids)) == len(ids)  # no drawing is clipped by another's frame


def test_text_is_shown_not_run(out):
    data, evil = json.loads((out / "main.json").read_text()), "<script>alert(1)</script>"
    (panel,) = data["panels"]
    panel["y"], panel["series"][evil] = evil, [p | {"x": evil} for p in panel["series"].pop("untrained")]
    claim = paper.Claim((evil, evil), (evil, evil), 1, evil, evil)
    figure = paper.Figure(evil, ("main",), paper_figures.main_result, lambda data: evil, evil, (claim,))
    shown = paper.section("main", figure, data)
    assert "<script" not in shown and shown.count("&lt;script") >= 10


@pytest.mark.parametrize("what", ["core", "figure", "variant", "settings", "missing", "cut", "scales"])
def test_stale_json_is_refused(out, page, tmp_path, monkeypatch, what):
    for path in [*out.glob("*.json"), out / "index.html"]:
        shutil.copy(path, tmp_path)
    if what == "core":
        monkeypatch.setattr(paper_runs, "code_behind", lambda script: "other")
    elif what == "figure":
        monkeypatch.setattr(paper, "code_behind", lambda script: "other")
    elif what == "variant":
        monkeypatch.setitem(variants.PATCHES, "gspo", ("flow_grpo_loss", flow_grpo_loss))
    elif what == "settings":
        monkeypatch.setitem(variants.FLAGS, "no-kl", {"kl_coef": 0.5})
    elif what == "missing":
        (tmp_path / "main.json").unlink()
    elif what == "cut":
        (tmp_path / "main.json").write_text('{"figure": "ma')
    else:
        data = json.loads((tmp_path / "main.json").read_text()) | {"scale": "quick"}
        (tmp_path / "main.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="make paper"):
        paper.write_page(tmp_path)
    assert (tmp_path / "index.html").read_text() == page


def test_what_makes_a_figure_stale(tmp_path, monkeypatch):
    """Code does, in any file that the script imports, at whatever distance; comments, layout and other files do not."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "script.py").write_text("import near, json")
    (tmp_path / "near.py").write_text("from far import x")
    (tmp_path / "far.py").write_text("x = 1")
    (tmp_path / "other.py").write_text("x = 1")
    monkeypatch.setattr(paper_runs, "ROOT", tmp_path)
    monkeypatch.setattr(paper_runs, "BACKBONE", "weights")
    code_behind = paper_runs.code_behind.__wrapped__
    digest = code_behind("script.py")
    (tmp_path / "far.py").write_text("x   =   1  # one")
    (tmp_path / "other.py").write_text("x = 2")
    assert code_behind("script.py") == digest
    (tmp_path / "far.py").write_text("x = 2")
    assert code_behind("script.py") != digest
    (tmp_path / "far.py").write_text("x = 1")
    (tmp_path / "weights" / "model").write_text("0.5")
    assert code_behind("script.py") != digest


@pytest.mark.skipif(not (ROOT / "paper" / "main.json").exists(), reason="make paper has not been run here")
def test_the_json_that_lies_here_is_not_older_than_the_code():
    assert set(paper.read_figures(ROOT / "paper")) == set(paper.FIGURES)


def test_sentences_follow_from_the_numbers():
    def data(a: list[float], b: list[float], n: int) -> dict:
        series = {}
        for name, shares in (("a", a), ("b", b)):
            series[name] = [paper_figures.point("all", {s: [n, n * x, n * x] for s, x in enumerate(shares)})]
        return {"panels": [paper_figures.panel("x", "y", series)]}

    claim = paper.Claim(("a", "all"), ("b", "all"), -1, "-19.0 points", "Other data.")
    clear = paper.sentence(data([0.9, 0.92], [0.5, 0.52], 100), claim)
    assert clear.startswith("a, all: 91.0 % [86.2, 94.2] (n = 200, seeds 0, 1); b, all: 51.0 %")
    assert "+40.0 points, clear" in clear and "the other direction here. A possible reason: Other data." in clear
    agrees = paper.sentence(data([0.5, 0.52], [0.9, 0.92], 100), claim)
    assert agrees.endswith("Paper: -19.0 points; the same direction here.")
    alone = paper.sentence(data([0.5], [0.9], 100), claim)
    assert "one seed does not show the noise" in alone and alone.endswith("the same direction here (one seed).")
    assert "not clear" in paper.sentence(data([0.5], [0.6], 20), claim)  # the intervals overlap
    assert "not clear" in paper.sentence(data([0.5, 0.7], [0.6, 0.3], 4000), claim)  # the seeds overlap
    assert paper.sentence(data([0.5], [0.6], 20), paper.Claim(("a", "all"), ("c", "all"))) == ""
