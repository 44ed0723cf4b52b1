"""The judge: tables of answers and predictions, wrong calls, and what must hold for any text."""

from fractions import Fraction

import pytest

from agent import Memory, Trajectory
from judge import Number, normalize, parse_number, rule_judge, rules, score
from tasks import Example
from tools import UserError

CAPITAL = "What is the capital of France?"
HOW_FAR = "How far is Tolvan from Merrit?"
HOW_MANY = "How many apples are left after 3 years?"

# fmt: off
# (accepted, prediction, prediction, ...): the question does not matter.
RIGHT = [
    # text
    ("Paris", "Paris", "  paris \n", "PARIS"), ("Café", "cafe"),
    ("cafe\u0301", "caf\u00e9"),  # decomposed and composed
    ("Straße", "STRASSE"),
    ("Tokyo", "Ｔｏｋｙｏ"),  # full-width letters
    ("The Beatles", "beatles"), ("Beatles", "The Beatles."), ("apple", "an apple"), ("1960s", "the 1960s"),
    ("New York", "New\tYork"), ("Jean-Luc", "Jean Luc"), ("O'Brien", "O’Brien", "OBrien"),
    ('the "Big Apple"', "Big Apple"), ("U.S.A.", "USA"), ("St. Louis", "St Louis"), ("Yahoo!", "yahoo"),
    ("Чай-Кофе", "чай кофе"), ("Mission: Impossible", "Mission Impossible"), ("May 1, 2020", "May 1 2020"),
    ("H₂O", "H2O"), ("m²", "m^2"),
    # names and dates
    ("J.K. Rowling", "J. K. Rowling"), ("John F. Kennedy", "John F Kennedy"), ("U.S.A.", "U. S. A."),
    ("5 January 1964", "January 5, 1964", "January 5th, 1964"), ("April 30, 1971", "the 30th of April 1971"),
    ("13 June 1410", "13 Jun 1410."), ("March 19, 1666", "1666-03-19"),
    # one letter, and marks that carry meaning
    ("A", "A"), ("B", "b."), ("Vitamin A", "vitamin A"), ("C++", "c++"), ("A-", "A−"),
    # an answer that looks like a list matches itself
    ("Paris, Texas", "Paris, Texas"), ("Simon and Garfunkel", "Simon and Garfunkel"),
    ("Crime or Punishment", "crime or punishment"), ("AC/DC", "AC/DC"), ("A / B", "A/B"),
    ("1, 2, 3", "1, 2, 3", "1; 2; 3"), ("(3, 4)", "(3,4)"), ("2 Fast 2 Furious", "2 fast 2 furious"),
    # wrapping
    ("Paris", "The answer is Paris.", "the final answer is: Paris", "Answer: Paris", "Answer = Paris",
        "So, the answer is Paris.", "Therefore, the correct answer is **Paris**.", "**Paris**", "**Paris.**",
        "**Answer:** Paris", "**Answer:** **Paris**", "**Final answer: Paris**", "Answer:\nParis", "Answer:Paris",
        "**The answer is** Paris", "My answer is 'Paris'", "*Paris*", '"Paris"', "“Paris.”", "'Paris'.", "`Paris`",
        '" **Paris** "', "\\boxed{\\text{Paris}}"),
    ("5", "The final answer is $\\boxed{5}$.", "$$5$$", "\\(5\\)", "\\[ 5. \\]"),
    # numbers
    ("1234", "1,234"), ("1,234,567.5", "1234567.50"), ("12", "12.0", "१२"), ("1.50", "1.5"), ("0.5", ".5"),
    ("73", "073"), ("5", "+5"), ("-5", "−5", "–5"), ("3/4", "0.75", "6/8"), ("-3/4", "-.75"),
    ("1.5", "1 1/2", "1½", "1\\frac{1}{2}"), ("-1.5", "-1 1/2"), ("0.75", "\\boxed{\\dfrac{3}{4}}"),
    ("-0.5", "$-\\frac{1}{2}$"), ("1500000", "1.5e6", "1.5 × 10^6", "1.5×10⁶", "$1.5 \\times 10^{6}$"),
    ("0.0015", "1.5E-3"),
    # units
    ("12 km", "12.0 km", "12km"), ("1,000 people", "1000 people"), ("$5", "5 dollars", "\\$5.00"), ("-$5", "$-5"),
    ("5 euros", "€5"), ("5 pounds", "£5"), ("5 yen", "¥5"), ("50%", "50 percent", "50.0\\%"), ("90°", "90 degrees"),
    # several accepted answers
    (["Paris", "City of Light"], "City of Light"), (["12", "a dozen"], "12.0"),
]

WRONG = [
    # no answer
    ("Paris", None, "", " \n ", "...", "**", "unknown", "I don't know", "None", "The answer is", "Answer:"),
    # the question, alone or with an answer behind it
    ("Paris", CAPITAL, CAPITAL + " Paris", CAPITAL + "\nAnswer: Paris"),
    # another day, or a part of it
    ("5 January 1964", "January 6, 1964", "5 January 1965", "January 1964", "1964", "5",
        "January 5, 1964 or January 6, 1964", "1/5/1964"),
    ("1964", "January 5, 1964"), ("5", "5 January 1964"), ("31 February 1964", "March 2, 1964"),
    # several candidates
    ("Paris", "Paris, London, Rome", "Paris or London", "Paris and London", "Paris / London", "Paris\nLondon",
        "- Paris\n- London", "Paris; London", "Paris. London.", "The answer is Paris or London.",
        "Answer: London. Answer: Paris", '"Paris" or "London"', "**London** **Paris**"),
    ("1", "1; 2; 3", "1, 2, 3", "1 2 3", "1\n2\n3", "1 or 2", "1/2"), ("123", "1, 2, 3", "1 2 3"),
    ("2", "\\boxed{1} \\boxed{2}"), ("5", "5-7"), (["Paris", "London"], "Paris, London", "Rome"), (["1", "2"], "1 2"),
    # the answer inside more text
    ("Paris", "The capital of France is Paris.", "The answer is not Paris.",
        "I think the answer is Paris, because it is the seat of the government.", "Paris, France", "Not Paris",
        "Paris?!? Maybe Rome"),
    ("12", "about 12", "less than 12"),
    # a part of the accepted answer
    ("Paris, Texas", "Paris"), ("Simon and Garfunkel", "Simon"), ("AC/DC", "AC"), ("A / B", "A"),
    # near misses in text
    ("Tolvan", "Tolvans", "Tolva"), ("Tolvans", "Tolvan's"), ("Vitamin A", "Vitamin"), ("A B", "B"),
    ("Lord of the Rings", "Lord of Rings"), ("land", "The answer island"), ("A", "The"), ("C++", "C"), ("C#", "C"),
    (".NET", "net"), ("A-", "A+", "A"), ("n!", "n"), ("x-y", "x y"), ("f'", "f"), ("(0, 1]", "[0, 1]"),
    ("version 1.5", "version 15"), ("か", "が"), ("мои", "мой"),
    # near misses in numbers
    ("12", "112", "21"), ("5", "-5", "-$-5", "5!", "five", "5e1", "5x"), ("-5", "5", "--5", "+$-5"),
    ("-5", "- 5"),  # may be a bullet
    ("15", "1.5"), ("123", "1,23"), ("3.14", "3,14"), ("34", "3/4"), ("102", "10²", "10₂"), ("5.5", "1½"),
    ("11/2", "1½"), ("1/3", "0.333"), ("0.333", "0.333..."), ("1.20.3", "1.2.3"), ("1.5", "1.5.0"), ("10:30", "1030"),
    ("3:2", "3, 2", "1.5"), ("120", "5!"), ("1/2", "1/0"),
    # units
    ("12 km", "12 miles", "12", "13 km"), ("12", "12 km"), ("5 m", "5 ms"), ("$5", "€5"), ("5", "5 million"),
    ("7", "7 pm"), ("50%", "0.5", "1/2", "50"), ("50", "50%"), ("0.5", "50%", "0.5%"),
]
# fmt: on

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


def pairs(table):
    return [(accepted, prediction) for accepted, *predictions in table for prediction in predictions]


@pytest.mark.parametrize("accepted, prediction", pairs(RIGHT))
def test_right(accepted, prediction):
    assert rule_judge(HOW_FAR, accepted, prediction) == 1.0


@pytest.mark.parametrize("accepted, prediction", pairs(WRONG))
def test_wrong(accepted, prediction):
    assert rule_judge(CAPITAL, accepted, prediction) == 0.0


@pytest.mark.parametrize("question, accepted, prediction, reward", ASKED)
def test_units_that_the_question_asks_for(question, accepted, prediction, reward):
    assert rule_judge(question, accepted, prediction) == reward


@pytest.mark.parametrize("accepted", sorted({row[0] for row in RIGHT + WRONG if isinstance(row[0], str)}))
def test_an_accepted_answer_matches_itself_and_its_lead_in(accepted):
    assert rule_judge(CAPITAL, accepted, accepted) == 1.0
    assert rule_judge(CAPITAL, accepted, f"The answer is {accepted}") == 1.0


def test_the_question_and_the_answer_are_not_mixed_up():
    assert type(rule_judge(CAPITAL, "Paris", "Paris")) is float
    assert rule_judge("Paris", CAPITAL, "Paris") == 0.0
    assert rule_judge("Paris", "Paris", CAPITAL) == 0.0
    assert rule_judge("12 apples", "How many apples?", "12") == 0.0


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


# --- the rewards of many trajectories ---------------------------------------------------------------------------------

EXAMPLES = [
    Example(CAPITAL, "Paris"),
    Example("Which? A) x B) y", ["B", "y"], kind="choice"),
    Example("Half?", "1/2", kind="math"),
    Example("Use 1, 1, 1, 8.", "(1+1+1)*8", kind="game24"),
    Example(CAPITAL, "Paris", kind="test_judge.loud_judge"),
]


def loud_judge(question, answer, prediction):
    return 0.5 if prediction == f"{answer}!" else -1


def test_each_kind_has_its_rule():
    right = ["paris", "(b)", "2^{-1}", "8*(1+1+1)", "Paris!"]
    assert rules(EXAMPLES, right, None) == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert rules(EXAMPLES, ["Rome", "A", "2", "24", "Paris"], None) == [0.0, 0.0, 0.0, 0.0, -1]
    with pytest.raises(UserError, match="there is no nonsense"):
        rules([Example(CAPITAL, "Paris", kind="nonsense")], ["Paris"], None)


def trajectories(*answers):
    return [Trajectory("q", [], Memory("q"), answer) for answer in answers]


def test_score_sets_the_rewards_in_order():
    def reward(examples, predictions, frozen):
        assert [example.answer for example in examples] == ["Paris", "Paris", "1/2", "1/2"] and frozen == "engine"
        return [len(prediction) for prediction in predictions]

    examples, groups = [EXAMPLES[0], EXAMPLES[2]], [trajectories("a", "bb"), trajectories("ccc", "")]
    scored = score(examples, groups, reward, "engine")
    assert [trajectory for _, trajectory in scored] == sum(groups, [])
    assert [example for example, _ in scored] == [examples[0]] * 2 + [examples[1]] * 2
    assert [trajectory.reward for group in groups for trajectory in group] == [1.0, 2.0, 3.0, 0.0]
    assert type(groups[0][0].reward) is float


def test_a_reward_that_forgets_a_trajectory_raises():
    with pytest.raises(ValueError, match="shorter"):
        score(EXAMPLES[:1], [trajectories("a", "b")], lambda *_: [1.0], None)
