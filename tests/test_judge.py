"""The judges: tables of pairs, wrong calls, and what must hold for any text. `pytest tests/test_judge.py`"""

import os
import time
from fractions import Fraction
from pathlib import Path

import pytest

import judge
from judge import (
    MATH,
    MathWorker,
    Number,
    choice_judge,
    game24_judge,
    math_judge,
    normalize,
    parse_number,
    rule_judge,
)

CAPITAL = "What is the capital of France?"
HOW_FAR = "How far is Tolvan from Merrit?"
HOW_MANY = "How many apples are left after 3 years?"

# (accepted, prediction): the question does not matter.
RIGHT = [
    # text
    ("Paris", "Paris"),
    ("Paris", "  paris \n"),
    ("Paris", "PARIS"),
    ("Café", "cafe"),
    ("cafe\u0301", "caf\u00e9"),  # decomposed and composed
    ("Straße", "STRASSE"),
    ("Tokyo", "Ｔｏｋｙｏ"),  # full-width letters
    ("The Beatles", "beatles"),
    ("Beatles", "The Beatles."),
    ("apple", "an apple"),
    ("1960s", "the 1960s"),
    ("New York", "New\tYork"),
    ("Jean-Luc", "Jean Luc"),
    ("O'Brien", "O’Brien"),
    ("O'Brien", "OBrien"),
    ('the "Big Apple"', "Big Apple"),
    ("U.S.A.", "USA"),
    ("St. Louis", "St Louis"),
    ("Yahoo!", "yahoo"),
    ("Чай-Кофе", "чай кофе"),
    ("Mission: Impossible", "Mission Impossible"),
    ("May 1, 2020", "May 1 2020"),
    ("H₂O", "H2O"),
    ("m²", "m^2"),
    # names and dates
    ("J.K. Rowling", "J. K. Rowling"),
    ("John F. Kennedy", "John F Kennedy"),
    ("U.S.A.", "U. S. A."),
    ("5 January 1964", "January 5, 1964"),
    ("5 January 1964", "January 5th, 1964"),
    ("April 30, 1971", "the 30th of April 1971"),
    ("13 June 1410", "13 Jun 1410."),
    ("March 19, 1666", "1666-03-19"),
    # one letter, and marks that carry meaning
    ("A", "A"),
    ("B", "b."),
    ("Vitamin A", "vitamin A"),
    ("C++", "c++"),
    ("A-", "A−"),
    # an answer that looks like a list matches itself
    ("Paris, Texas", "Paris, Texas"),
    ("Simon and Garfunkel", "Simon and Garfunkel"),
    ("Crime or Punishment", "crime or punishment"),
    ("AC/DC", "AC/DC"),
    ("A / B", "A/B"),
    ("1, 2, 3", "1, 2, 3"),
    ("1, 2, 3", "1; 2; 3"),
    ("(3, 4)", "(3,4)"),
    ("2 Fast 2 Furious", "2 fast 2 furious"),
    # wrapping
    ("Paris", "The answer is Paris."),
    ("Paris", "the final answer is: Paris"),
    ("Paris", "Answer: Paris"),
    ("Paris", "Answer = Paris"),
    ("Paris", "So, the answer is Paris."),
    ("Paris", "Therefore, the correct answer is **Paris**."),
    ("Paris", "**Paris**"),
    ("Paris", "**Paris.**"),
    ("Paris", "**Answer:** Paris"),
    ("Paris", "**Answer:** **Paris**"),
    ("Paris", "**Final answer: Paris**"),
    ("Paris", "Answer:\nParis"),
    ("Paris", "Answer:Paris"),
    ("Paris", "**The answer is** Paris"),
    ("Paris", "My answer is 'Paris'"),
    ("Paris", "*Paris*"),
    ("Paris", '"Paris"'),
    ("Paris", "“Paris.”"),
    ("Paris", "'Paris'."),
    ("Paris", "`Paris`"),
    ("Paris", '" **Paris** "'),
    ("Paris", "\\boxed{\\text{Paris}}"),
    ("5", "The final answer is $\\boxed{5}$."),
    ("5", "$$5$$"),
    ("5", "\\(5\\)"),
    ("5", "\\[ 5. \\]"),
    # numbers
    ("1234", "1,234"),
    ("1,234,567.5", "1234567.50"),
    ("12", "12.0"),
    ("12", "१२"),
    ("1.50", "1.5"),
    ("0.5", ".5"),
    ("73", "073"),
    ("5", "+5"),
    ("-5", "−5"),
    ("-5", "–5"),
    ("3/4", "0.75"),
    ("3/4", "6/8"),
    ("-3/4", "-.75"),
    ("1.5", "1 1/2"),
    ("1.5", "1½"),
    ("1.5", "1\\frac{1}{2}"),
    ("-1.5", "-1 1/2"),
    ("0.75", "\\boxed{\\dfrac{3}{4}}"),
    ("-0.5", "$-\\frac{1}{2}$"),
    ("1500000", "1.5e6"),
    ("1500000", "1.5 × 10^6"),
    ("1500000", "1.5×10⁶"),
    ("1500000", "$1.5 \\times 10^{6}$"),
    ("0.0015", "1.5E-3"),
    # units
    ("12 km", "12.0 km"),
    ("12 km", "12km"),
    ("1,000 people", "1000 people"),
    ("$5", "5 dollars"),
    ("$5", "\\$5.00"),
    ("-$5", "$-5"),
    ("5 euros", "€5"),
    ("5 pounds", "£5"),
    ("5 yen", "¥5"),
    ("50%", "50 percent"),
    ("50%", "50.0\\%"),
    ("90°", "90 degrees"),
    # several accepted answers
    (["Paris", "City of Light"], "City of Light"),
    (["12", "a dozen"], "12.0"),
]

WRONG = [
    # no answer
    ("Paris", None),
    ("Paris", ""),
    ("Paris", " \n "),
    ("Paris", "..."),
    ("Paris", "**"),
    ("Paris", "unknown"),
    ("Paris", "I don't know"),
    ("Paris", "None"),
    ("Paris", "The answer is"),
    ("Paris", "Answer:"),
    # the question, alone or with an answer behind it
    ("Paris", CAPITAL),
    ("Paris", CAPITAL + " Paris"),
    ("Paris", CAPITAL + "\nAnswer: Paris"),
    # another day, or a part of it
    ("5 January 1964", "January 6, 1964"),
    ("5 January 1964", "5 January 1965"),
    ("5 January 1964", "January 1964"),
    ("5 January 1964", "1964"),
    ("5 January 1964", "5"),
    ("5 January 1964", "January 5, 1964 or January 6, 1964"),
    ("5 January 1964", "1/5/1964"),
    ("1964", "January 5, 1964"),
    ("5", "5 January 1964"),
    ("31 February 1964", "March 2, 1964"),
    # several candidates
    ("Paris", "Paris, London, Rome"),
    ("Paris", "Paris or London"),
    ("Paris", "Paris and London"),
    ("Paris", "Paris / London"),
    ("Paris", "Paris\nLondon"),
    ("Paris", "- Paris\n- London"),
    ("Paris", "Paris; London"),
    ("Paris", "Paris. London."),
    ("Paris", "The answer is Paris or London."),
    ("Paris", "Answer: London. Answer: Paris"),
    ("Paris", '"Paris" or "London"'),
    ("Paris", "**London** **Paris**"),
    ("1", "1; 2; 3"),
    ("1", "1, 2, 3"),
    ("1", "1 2 3"),
    ("1", "1\n2\n3"),
    ("1", "1 or 2"),
    ("1", "1/2"),
    ("123", "1, 2, 3"),
    ("123", "1 2 3"),
    ("2", "\\boxed{1} \\boxed{2}"),
    ("5", "5-7"),
    (["Paris", "London"], "Paris, London"),
    (["Paris", "London"], "Rome"),
    (["1", "2"], "1 2"),
    # the answer inside more text
    ("Paris", "The capital of France is Paris."),
    ("Paris", "The answer is not Paris."),
    ("Paris", "I think the answer is Paris, because it is the seat of the government."),
    ("Paris", "Paris, France"),
    ("Paris", "Not Paris"),
    ("Paris", "Paris?!? Maybe Rome"),
    ("12", "about 12"),
    ("12", "less than 12"),
    # a part of the accepted answer
    ("Paris, Texas", "Paris"),
    ("Simon and Garfunkel", "Simon"),
    ("AC/DC", "AC"),
    ("A / B", "A"),
    # near misses in text
    ("Tolvan", "Tolvans"),
    ("Tolvan", "Tolva"),
    ("Tolvans", "Tolvan's"),
    ("Vitamin A", "Vitamin"),
    ("A B", "B"),
    ("Lord of the Rings", "Lord of Rings"),
    ("land", "The answer island"),
    ("A", "The"),
    ("C++", "C"),
    ("C#", "C"),
    (".NET", "net"),
    ("A-", "A+"),
    ("A-", "A"),
    ("n!", "n"),
    ("x-y", "x y"),
    ("f'", "f"),
    ("(0, 1]", "[0, 1]"),
    ("version 1.5", "version 15"),
    ("か", "が"),
    ("мои", "мой"),
    # near misses in numbers
    ("12", "112"),
    ("12", "21"),
    ("5", "-5"),
    ("-5", "5"),
    ("-5", "- 5"),  # may be a bullet
    ("-5", "--5"),
    ("5", "-$-5"),
    ("-5", "+$-5"),
    ("15", "1.5"),
    ("123", "1,23"),
    ("3.14", "3,14"),
    ("34", "3/4"),
    ("102", "10²"),
    ("102", "10₂"),
    ("5.5", "1½"),
    ("11/2", "1½"),
    ("1/3", "0.333"),
    ("0.333", "0.333..."),
    ("1.20.3", "1.2.3"),
    ("1.5", "1.5.0"),
    ("10:30", "1030"),
    ("3:2", "3, 2"),
    ("3:2", "1.5"),
    ("5", "5!"),
    ("120", "5!"),
    ("5", "five"),
    ("1/2", "1/0"),
    ("5", "5e1"),
    ("5", "5x"),
    # units
    ("12 km", "12 miles"),
    ("12 km", "12"),
    ("12", "12 km"),
    ("12 km", "13 km"),
    ("5 m", "5 ms"),
    ("$5", "€5"),
    ("5", "5 million"),
    ("7", "7 pm"),
    ("50%", "0.5"),
    ("50%", "1/2"),
    ("50%", "50"),
    ("50", "50%"),
    ("0.5", "50%"),
    ("0.5", "0.5%"),
]

# (question, accepted, prediction, reward): a unit may be left out only where the question asks for it.
ASKED = [
    (HOW_MANY, "12", "12 apples", 1.0),
    (HOW_MANY, "12 apples", "12", 1.0),
    (HOW_MANY, "1", "1 apple", 1.0),
    (HOW_MANY, "12", "13 apples", 0.0),
    (HOW_MANY, "12", "12 oranges", 0.0),
    (HOW_MANY, "12", "12 years", 0.0),
    (HOW_MANY, "12 apples", "12 oranges", 0.0),
    (HOW_MANY, "12", "12 apples or 13 apples", 0.0),
    (HOW_FAR, "12 km", "12", 0.0),
    ("How far is it, in km?", "12 km", "12", 1.0),
    ("How far is it, in km?", "12", "12 km.", 1.0),
    ("How far is it, in km?", "12", "12 kilo", 0.0),
    ("How fast is it, in kmph?", "12", "12 km", 0.0),
    ("Give the number of edges.", "12", "12 edges", 1.0),
    ("How many dollars did she pay?", "5", "$5", 1.0),
    ("How many dollars did she pay?", "5", "€5", 0.0),
    ("What percentage of them is red?", "50", "50%", 1.0),
    ("By what percent did it grow?", "50%", "50", 1.0),
    ("What is the percentage of red ones?", "50", "50 percent", 1.0),
    ("What percentage of them is red?", "50", "0.5", 0.0),
    ("What is the angle in degrees?", "90", "90°", 1.0),
    ("What is the leading coefficient of this polynomial in x?", "3", "3x", 0.0),
]


@pytest.mark.parametrize("accepted, prediction", RIGHT)
def test_right(accepted, prediction):
    assert rule_judge(HOW_FAR, accepted, prediction) == 1.0


@pytest.mark.parametrize("accepted, prediction", WRONG)
def test_wrong(accepted, prediction):
    assert rule_judge(CAPITAL, accepted, prediction) == 0.0


@pytest.mark.parametrize("question, accepted, prediction, reward", ASKED)
def test_units_the_question_asks_for(question, accepted, prediction, reward):
    assert rule_judge(question, accepted, prediction) == reward


@pytest.mark.parametrize("accepted", sorted({pair[0] for pair in RIGHT + WRONG if isinstance(pair[0], str)}))
def test_an_accepted_answer_matches_itself_and_its_lead_in(accepted):
    assert rule_judge(CAPITAL, accepted, accepted) == 1.0
    assert rule_judge(CAPITAL, accepted, f"The answer is {accepted}") == 1.0


def test_the_reward_is_a_float():
    assert type(rule_judge(CAPITAL, "Paris", "Paris")) is float
    assert type(rule_judge(CAPITAL, "Paris", "Rome")) is float


def test_the_order_of_the_arguments_matters():
    """The question is not compared, and only `answer` may be a list."""
    assert rule_judge(CAPITAL, "Paris", "Paris") == 1.0
    assert rule_judge("Paris", CAPITAL, "Paris") == 0.0
    assert rule_judge("Paris", "Paris", CAPITAL) == 0.0
    assert rule_judge("12 apples", "How many apples?", "12") == 0.0
    with pytest.raises(TypeError, match="prediction must be"):
        rule_judge(CAPITAL, "Paris", ["Paris", "Lutetia"])


@pytest.mark.parametrize(
    "question, answer, prediction, error, message",
    [
        (None, "Paris", "Paris", TypeError, "question must be a str, not NoneType"),
        (CAPITAL, None, "Paris", TypeError, "answer must be a str or a list of str, not None"),
        (CAPITAL, 12, "12", TypeError, "not 12"),
        (CAPITAL, ("Paris",), "Paris", TypeError, "answer must be"),
        (CAPITAL, ["Paris", 12], "Paris", TypeError, "answer must be"),
        (CAPITAL, "Paris", 12, TypeError, "prediction must be a str or None, not int"),
        (CAPITAL, [], "Paris", ValueError, "at least one accepted answer"),
        (CAPITAL, [], None, ValueError, "at least one accepted answer"),  # a bad call is no wrong answer
        (CAPITAL, "", "Paris", ValueError, "none may be empty"),
        (CAPITAL, ["Paris", " . "], "Paris", ValueError, "none may be empty"),
    ],
)
def test_a_wrong_call_raises(question, answer, prediction, error, message):
    with pytest.raises(error, match=message):
        rule_judge(question, answer, prediction)


def test_no_text_from_a_model_raises_or_stalls():
    for text in ["9" * 9000, "1e999999999", "1/" + "0" * 500, "\ud800", "**" * 5000, "answer: " * 500, "$" * 999]:
        assert rule_judge(CAPITAL, "5", text) == 0.0
        assert rule_judge(CAPITAL, text + "a", text + "a") == 1.0


def test_normalize():
    assert normalize("  The  CAFÉ, “Flore” (Paris)!  ") == "cafe flore (paris)!"
    assert normalize("The answer is **The Beatles**.") == "beatles"
    assert normalize("a") == "a"
    assert normalize(" . ") == ""


def test_parse_number():
    assert parse_number("-$1,234.50") == Number(Fraction(-2469, 2), "dollar")
    assert parse_number("2 1/4 cups") == Number(Fraction(9, 4), "cup")
    assert parse_number("50%") == Number(Fraction(50), "percent")
    assert parse_number("1e-3") == Number(Fraction(1, 1000), "")
    for text in ["", "Paris", "about 12", "1/0", "1/2/2020", "10:30", "1.2.3", "5-7", "1,2", "--5"]:
        assert parse_number(text) is None


# --- mathematics ------------------------------------------------------------------------------------------------------

MATH_RIGHT = [
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"2^{-1}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt{8}", r"$2 \sqrt 2$"),
    (r"2\pi", r"\boxed{2\pi}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    ("x^2-1", "(x-1)(x+1)"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2n+1", "1 + 2n"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("10", "10^1"),
    ("1", "2-1"),
    ("-2", "-4/2"),
    ("(1,2)", r"\left(1, 2\right)"),
    ("[0,1)", r"\left[0,1\right)"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\log_2 8", "3"),
    pytest.param(r"e^2", r"\mathrm{e}^2", marks=pytest.mark.xfail(reason="math-verify reads a symbol", strict=True)),
    (r"\binom{5}{2}", "10"),
    ("12", "$12$"),
    ("12", r"The answer is $\boxed{12}$."),
]
MATH_WRONG = [
    ("33", "33 or 34"),
    ("33", "33, 34"),
    ("33", r"\{33, 34\}"),
    ("33", "33; 34"),
    ("33", r"$33$ and $34$"),
    ("33", "33?"),
    ("33", ""),
    ("33", None),
    ("33", "unknown"),
    ("33", "3^3"),
    ("33", r"\boxed{33} \boxed{34}"),
    ("12", r"12\%"),
    ("0.12", r"12\%"),
    ("0.12", "12 percent"),
    ("0.12", r"12 \text{ pct}"),
    ("2m", "2"),
    ("2m", "2t"),
    ("3ab", "3"),
    (r"\frac{1}{2}d", r"\frac{1}{2}"),
    ("f'(0)", "f(0)"),
    ("f'(0)", r"f^{\prime\prime}(0)"),
    (r"f^{\prime}(0)", "f(0)"),
    ("12", "-12"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{3}", "0.333"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1 or 2"),
    ("x^2-1", "x^2+1"),
    (r"\pi", "3.14"),
    ("5", "__import__('os').getpid()"),
    ("5", "5" * 400),
]


@pytest.mark.parametrize("accepted, prediction", MATH_RIGHT)
def test_math_right(accepted, prediction):
    assert math_judge("Find it.", accepted, prediction) == 1.0


@pytest.mark.parametrize("accepted, prediction", MATH_WRONG)
def test_math_wrong(accepted, prediction):
    assert math_judge("Find it.", accepted, prediction) == 0.0


def test_a_runaway_simplification_is_killed_and_the_next_verdict_comes(monkeypatch):
    worker = MathWorker(limit_s=1.0)
    monkeypatch.setattr(judge, "MATH", worker)
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
    monkeypatch.setattr(judge, "MATH", worker)
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


# --- multiple choice and the game of 24 -------------------------------------------------------------------------------


CHOICES = [
    *((text, 1.0) for text in ("B", "b", "(b)", "B.", "B)", "B) Paris", "B: Paris", "Paris", "paris.", "Option B")),
    *((text, 1.0) for text in ("The answer is B.", "**B**", "\\boxed{B}", "Answer: (B) Paris", "choice b")),
    *((text, 0.0) for text in ("A", "A) Paris", "B) London", "B or C", "A, B", "A B", "AB", "", None, "unknown")),
    *((text, 0.0) for text in ("B and not A", "Paris or London", "All of them", "not B", "B C D", "(A) (B)")),
]
GAMES = [
    *((text, 1.0) for text in ("(10-4)*4*1", "4*(10-4)*1", "(10 - 4) × 4 ÷ 1 = 24", "$(10-4) \\times 4 / 1$")),
    *((text, 1.0) for text in ("(10-4)*4/1", "[10-4]*4*1", "**(10-4)*4*1**", "\\boxed{(10-4) \\cdot 4 \\cdot 1}")),
    *((text, 1.0) for text in (r"\frac{(10-4) \times 4}{1}", r"\dfrac{10-4}{\frac{1}{4}}")),
    *((text, 0.0) for text in ("24", "24*1", "4*4+10-1-1", "(10-4)*4", "6*4*1", "(10-4)*4*1*1", "104-4*1", "")),
    *((text, 0.0) for text in ("10-4*4*1", "(10-4)*4*1 or 24", "(10-4)**4", "10/(4-4)", "((((", "4!", None)),
    *((text, 0.0) for text in ("print(24)", "__import__('os')", "(" * 99 + "1", "10-4*4*1=24", "(True+9)*4")),
]


@pytest.mark.parametrize("prediction, reward", CHOICES)
def test_choice(prediction, reward):
    assert choice_judge("Which? A) London B) Paris", ["B", "Paris"], prediction) == reward


@pytest.mark.parametrize("prediction, reward", GAMES)
def test_game24(prediction, reward):
    assert game24_judge("Use 1, 4, 4, 10.", ["(10-4)*4*1"], prediction) == reward


def test_game24_fractions():
    assert game24_judge("Use 3, 3, 8, 8.", "8/(3-8/3)", r"\frac{8}{3-\frac{8}{3}}") == 1.0
    assert game24_judge("Use 2, 3, 12, 12.", "12+12*(3-2)", r"12*12/\frac{3}{2}") == 0.0
    assert game24_judge("Use 2, 3, 12, 12.", "12+12*(3-2)", "12*(3-2)+12") == 1.0


def test_a_letter_is_the_letter():
    """Where contents are letters too."""
    assert [choice_judge("Which?", ["A", "C"], text) for text in ("A", "C", "A) C", "C) D")] == [1.0, 0.0, 1.0, 0.0]


def test_agreement_on_the_whole_table():
    """What the judge promises of all the pairs above: at least 98 %, and no false positive."""
    table = [(rule_judge, HOW_FAR, *pair, 1.0) for pair in RIGHT] + [
        (rule_judge, CAPITAL, *pair, 0.0) for pair in WRONG
    ]
    table += [(rule_judge, *row) for row in ASKED]
    table += [(math_judge, "", *getattr(pair, "values", pair), 1.0) for pair in MATH_RIGHT]
    table += [(math_judge, "", *pair, 0.0) for pair in MATH_WRONG]
    table += [(choice_judge, "", ["B", "Paris"], *row) for row in CHOICES]
    table += [(game24_judge, "", "(10-4)*4*1", *row) for row in GAMES]
    verdicts = [(judge_it(*case), right) for judge_it, *case, right in table]
    assert len(table) > 300
    assert sum(verdict == right for verdict, right in verdicts) / len(table) >= 0.98
    assert not [case for case, (verdict, right) in zip(table, verdicts) if verdict > right]
