"""The rules for mathematics, for the game of 24 and for multiple choice."""

import os
import time
from pathlib import Path

import pytest

from lab import judges
from lab.judges import MATH, MathWorker, choice_judge, game24_judge, math_judge

# fmt: off
# (accepted, prediction, prediction, ...)
MATH_RIGHT = [
    (r"\frac{1}{2}", "1/2", "0.5", r"2^{-1}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sqrt{8}", r"2\sqrt{2}", r"$2 \sqrt 2$"), (r"2\pi", r"\boxed{2\pi}"), (r"\frac{\pi}{4}", r"\pi/4"),
    ("x^2-1", "(x-1)(x+1)"), ("(x+1)^2", "x^2+2x+1"), ("2n+1", "1 + 2n"), ("x=5", "5"), ("5", "x=5"), ("10", "10^1"),
    ("1", "2-1"), ("-2", "-4/2"), ("(1,2)", r"\left(1, 2\right)"), ("[0,1)", r"\left[0,1\right)"),
    (r"\{1,2\}", r"\{2,1\}"), (r"\sin^2 x", r"1-\cos^2 x"), (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"), ("12", "$12$", r"The answer is $\boxed{12}$."), (r"e^2", r"\mathrm{e}^2"),
    # decimals are fractions
    (r"\frac{1}{3}", "(1/3)"), ("10^{-7}", "0.0000001"), (r"\frac{\sqrt2}{1000}", r"0.001\sqrt2"), ("x/2", "0.5x"),
    (r"\frac{1}{2^{99}}", "1/2^{99}", "2^{-99}"), (r"\sqrt{2}", "2^{0.5}", "2^0.5"), ("1234.5x", "1,234.5x"),
    ("y=2x+0.5", r"y=2x+\frac{1}{2}"), ("(0.5, 1.25]", "(1/2, 5/4]"), (r"\{0.5, 3\}", r"\{3, 1/2\}"),
    # a rounded answer
    ("1.41", r"\sqrt2"), ("-1.41", r"-\sqrt{2}"), ("3.14159", r"\pi"), ("0.00141", r"\frac{\sqrt2}{1000}"),
    ("0.693", r"\ln 2"),
    # intervals and inequalities
    ("(0, 12.5)", "0 < x < 12.5", "0<x<25/2"), ("0 < x < 12.5", "(0, 12.5)"), ("[0,1]", r"1 \ge x \ge 0"),
    (r"(0, \infty)", "x > 0"), ("x > 0", r"(0, \infty)"), ("x<3", "3>x"),
    # all values of a list
    ("1, 2", "2, 1", "x=1 or x=2", r"x=1 \text{ or } x=2", "1 and 2"), ("1, 2, 3", "3, 2, and 1"),
    # units and words
    ("5 cm", r"5\text{ cm}", r"5\,\mathrm{cm}"), (r"5\text{ cm}", "5 cm"), (r"\text{east}", "East"),
]

MATH_WRONG = [
    ("33", "33 or 34", "33, 34", r"\{33, 34\}", "33; 34", r"$33$ and $34$", "33?", "", None, "unknown", "3^3",
        r"\boxed{33} \boxed{34}"),
    ("12", r"12\%", "-12"), ("0.12", r"12\%", "12 percent", r"12 \text{ pct}"), ("2m", "2", "2t"), ("3ab", "3"),
    (r"\frac{1}{2}d", r"\frac{1}{2}"), ("f'(0)", "f(0)", r"f^{\prime\prime}(0)"), (r"f^{\prime}(0)", "f(0)"),
    (r"\frac{1}{2}", r"\frac{1}{3}"), (r"\frac{1}{3}", "0.333"), ("[0,1)", "[0,1]"), ("(1,2)", "(2,1)", "1 or 2"),
    ("x^2-1", "x^2+1"), (r"\pi", "3.14"), ("5", "__import__('os').getpid()", "5" * 400),
    # values that differ by little
    ("10^{-7}", "0.0000004", r"4 \cdot 10^{-7}"), (r"\frac{1}{2^{30}}", "0.0000000009"), ("1/2^{99}", "1/2^{98}"),
    (r"\frac{\sqrt2}{1000}", "0.001414", r"\frac{1.414}{1000}"), ("1/3", "0.333333", "(0.333333)", r"\{0.333333\}"),
    ("10^{-400}", "10^{-401}"), ("10^{100}", "10^{100}+1"), ("x=10^{-20}", "x=10^{-21}"), ("x", "x + 10^{-20}"),
    (r"\{10^{-20}\}", r"\{10^{-21}\}"), ("y=0.1234567x", "y=0.1234568x"), ("(0, 12.5)", "(0, 12.5000001)"),
    # a rounded answer is exact for what a decimal or a fraction can write, and two digits agree by chance
    ("0.333", "1/3", "(1/3)", "(0.3331)"), ("1.42", r"\sqrt2"), ("0.8", r"\pi/4"),
    ("1.41", r"1.412\cdot\frac{\pi}{\pi}"),
    # other bounds, and inequalities and equations that are not solved but copied
    ("(0, 12.5]", "0 < x < 12.5"), ("0 < x < 12.5", "(0, 12.6)"), ("0 < x < 12.5", "x < 12.5"), ("x<1", "y<1"),
    ("(0,1)", "x^2<x", "x-x^2>0", r"\{x \mid x^2<x\}"), ("(-1,1)", "|x|<1"), ("x>3", "2x+1>7"), (r"\emptyset", "x<x"),
    ("x=2", "2x=4", "x=2x-2", "x^2-4x+4=0"), (r"h=\frac{2A}{b}", r"A=\frac{bh}{2}"), (r"\{-1,1\}", "x^2=1"),
    # candidates to choose from
    ("1", "1 or 2", "x=1 or x=2"), ("1, 2", "1 or 3", "1 or 2 or 3", "1 or", "1"), ("1,234", "1 or 234"),
    ("1{,}234", "1 or 234"), (r"\{1,2\}", "1 or 2"), (["1", "2"], "1 or 2"),
    # words are not products of letters
    ("east", "seat"), (r"\text{east}", "seat", r"\text{seat}"), ("5 cm", r"5\text{ m}"),
]
# fmt: on


def pairs(table):
    return [(accepted, prediction) for accepted, *predictions in table for prediction in predictions]


@pytest.mark.parametrize("accepted, prediction", pairs(MATH_RIGHT))
def test_math_right(accepted, prediction):
    assert math_judge("Find it.", accepted, prediction) == 1.0


@pytest.mark.parametrize("accepted, prediction", pairs(MATH_WRONG))
def test_math_wrong(accepted, prediction):
    assert math_judge("Find it.", accepted, prediction) == 0.0


# --- the process of math-verify ---------------------------------------------------------------------------------------


def test_a_runaway_simplification_is_killed_and_the_next_verdict_comes(monkeypatch):
    worker = MathWorker(limit_s=1.0)
    monkeypatch.setattr(judges, "MATH", worker)
    assert worker.same(["2"], "1+1")  # it runs: importing SymPy is not on the clock
    process, start = worker.process, time.monotonic()
    assert math_judge("Find it.", "5", "9^{9^{9^9}}") == 0.0
    assert time.monotonic() - start < 2.0 and process.poll() is not None
    assert math_judge("Find it.", "5", "2^2+1") == 1.0
    worker.close()


def test_the_worker_has_none_of_our_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    worker = MathWorker()
    assert worker.same(["2"], "1+1")
    assert b"secret" not in Path(f"/proc/{worker.process.pid}/environ").read_bytes()
    worker.close()


def test_ctrl_c_does_not_reach_the_worker_and_a_dead_one_is_replaced():
    worker = MathWorker()
    assert worker.same(["2"], "1+1")
    assert os.getsid(worker.process.pid) != os.getsid(0)
    worker.process.kill()
    worker.process.wait()
    assert worker.same(["2"], "1+1")
    worker.close()


def test_several_accepted_answers_share_one_limit(monkeypatch):
    worker = MathWorker(limit_s=1.0)
    monkeypatch.setattr(judges, "MATH", worker)
    assert math_judge("Find it.", ["7+1", "2+1"], "4-1") == 1.0
    start = time.monotonic()
    assert math_judge("Find it.", ["2", "3", "4", "5"], "9^{9^{9^9}}") == 0.0
    assert time.monotonic() - start < 3.0
    worker.close()


def test_verdicts_are_quick():
    """At least 50 a second, each of a new pair that has to be parsed and simplified. In seconds of the worker's CPU, as
    other work on the machine says nothing about it."""

    def cpu_s():
        ticks = Path(f"/proc/{MATH.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    pairs = [(f"{n}/7 + \\sqrt{{{n}}}", f"\\sqrt{{{n}}} + \\frac{{{n}}}{{7}}") for n in range(2, 202)]
    assert MATH.same(["2"], "1+1")
    start = cpu_s()
    assert all(math_judge("Find it.", *pair) == 1.0 for pair in pairs)
    assert cpu_s() - start < 4


# --- the game of 24 ---------------------------------------------------------------------------------------------------

GAMES = [
    *((text, 1.0) for text in ("(10-4)*4*1", "4*(10-4)*1", "(10 - 4) × 4 ÷ 1 = 24", "$(10-4) \\times 4 / 1$")),
    *((text, 1.0) for text in ("(10-4)*4/1", "[10-4]*4*1", "**(10-4)*4*1**", "\\boxed{(10-4) \\cdot 4 \\cdot 1}")),
    *((text, 1.0) for text in ("(10-4) x 4 X 1", "(10-4)x4x1", "(10-4)∗4⋅1", "(10-4)•4/1")),
    *((text, 1.0) for text in (r"\frac{(10-4) \times 4}{1}", r"\dfrac{10-4}{\frac{1}{4}}")),
    *((text, 0.0) for text in ("24", "24*1", "4*4+10-1-1", "(10-4)*4", "6*4*1", "(10-4)*4*1*1", "104-4*1", "")),
    *((text, 0.0) for text in ("10-4*4*1", "(10-4)*4*1 or 24", "(10-4)**4", "10/(4-4)", "((((", "4!", None)),
    *((text, 0.0) for text in ("print(24)", "__import__('os')", "(" * 99 + "1", "10-4*4*1=24", "(True+9)*4")),
]


@pytest.mark.parametrize("prediction, reward", GAMES)
def test_game24(prediction, reward):
    assert game24_judge("Use 1, 4, 4, 10.", ["(10-4)*4*1"], prediction) == reward


def test_game24_fractions():
    assert game24_judge("Use 3, 3, 8, 8.", "8/(3-8/3)", r"\frac{8}{3-\frac{8}{3}}") == 1.0
    assert game24_judge("Use 2, 3, 12, 12.", "12+12*(3-2)", r"12*12/\frac{3}{2}") == 0.0
    assert game24_judge("Use 2, 3, 12, 12.", "12+12*(3-2)", "12*(3-2)+12") == 1.0


def test_game24_has_no_hexadecimal_numbers():
    assert game24_judge("Use 0, 18.", "0*18", "0x18") == 0.0


# --- multiple choice --------------------------------------------------------------------------------------------------

CHOICES = [
    *((text, 1.0) for text in ("B", "b", "(b)", "B.", "B)", "B) Paris", "B: Paris", "Paris", "paris.", "Option B")),
    *((text, 1.0) for text in ("The answer is B.", "**B**", "\\boxed{B}", "Answer: (B) Paris", "choice b")),
    *((text, 0.0) for text in ("A", "A) Paris", "B) London", "B or C", "A, B", "A B", "AB", "", None, "unknown")),
    *((text, 0.0) for text in ("B and not A", "Paris or London", "All of them", "not B", "B C D", "(A) (B)")),
]


@pytest.mark.parametrize("prediction, reward", CHOICES)
def test_choice(prediction, reward):
    assert choice_judge("Which? A) London B) Paris", ["B", "Paris"], prediction) == reward


def test_a_letter_is_the_letter():
    """Even if the contents are letters too."""
    assert [choice_judge("Which?", ["A", "C"], text) for text in ("A", "C", "A) C", "C) D")] == [1.0, 0.0, 1.0, 0.0]
