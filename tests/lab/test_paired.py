"""The paired comparison, against figures worked out by other means."""

import json
import math
import random
import statistics

import pytest

from lab.paired import PairedConfig, against_first, line, main, paired, sign_test
from tools import UserError


@pytest.mark.parametrize(
    "better, worse, p",
    [(1, 9, 0.021484375), (9, 1, 0.021484375), (0, 5, 0.0625), (5, 5, 1.0), (0, 0, 1.0)],
)
def test_mcnemar(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p)


def test_an_unpaired_difference_would_miss_what_the_pairs_show():
    before = [1.0] * 50 + [0.0] * 50
    after = [1.0] * 50 + [1.0] * 8 + [0.0] * 42
    r = paired(before, after)
    assert (r["difference"], r["better"], r["worse"], r["n"]) == (pytest.approx(0.08), 8, 0, 100)
    assert r["interval"][0] > 0 and r["p"] == pytest.approx(2 / 2**8)


def test_the_interval_holds_the_truth_in_95_of_100_cases():
    generator, inside = random.Random(0), 0
    for _ in range(400):
        hard = [generator.random() for _ in range(200)]
        before, after = ([float(generator.random() < p) for p in ps] for ps in (hard, [0.7 * h + 0.3 for h in hard]))
        low, high = paired(before, after)["interval"]
        inside += low <= 0.3 * (1 - statistics.mean(hard)) <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_line():
    assert line("b against a", [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]) == (
        "b against a: +50.0 points [-6.6, +106.6] on the same 4 questions; 2 better, 0 worse, McNemar p 0.5"
    )
    assert line("b against a", [0.0] * 40, [1.0] * 40).endswith("40 better, 0 worse, McNemar p below 1e-6")


def test_trials_are_a_mean_per_question():
    """Two questions with two trials each."""
    text = against_first({"a": [0.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0, 0.0], "c": [0.0, 1.0, 0.0, 0.0]}, trials=2)
    first, second = text.splitlines()
    assert first.startswith("b against a: +25.0 points") and "2 questions; 1 better, 0 worse" in first
    assert second.startswith("c against a: +0.0 points") and math.isclose(paired([0.5, 0], [0.5, 0])["p"], 1.0)


def test_the_tests_of_a_run(tmp_path, capsys):
    for when, rewards in (("before", [0, 1, 0]), ("after", [1, 1, 0])):
        rows = [{"question": f"q{n}", "reward": reward} for n, reward in enumerate(rewards)]
        (tmp_path / f"test_{when}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(PairedConfig(run=str(tmp_path)))
    assert "after against before: +33.3 points" in capsys.readouterr().out
    (tmp_path / "test_before.jsonl").write_text('{"question": "another", "reward": 1}\n')
    with pytest.raises(UserError, match="different questions"):
        main(PairedConfig(run=str(tmp_path)))
    (tmp_path / "test_after.jsonl").unlink()
    with pytest.raises(UserError, match="test_after.jsonl is missing: restore it"):
        main(PairedConfig(run=str(tmp_path)))


def test_many_questions_agree_with_the_normal_distribution():
    for better, worse in ((121, 59), (300, 250)):
        chi_square = (abs(better - worse) - 1) ** 2 / (better + worse)  # with the correction for whole numbers
        assert sign_test(better, worse) == pytest.approx(math.erfc(math.sqrt(chi_square / 2)), rel=0.25)
