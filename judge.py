"""Was the answer right? The reward of a trajectory, by rules.

`RULES` has a function `(question, answer, prediction) -> float` for each kind of question (`Example.kind`):

    text     rule_judge    the whole text or number, as below
    choice   choice_judge  in lab/judges.py: the letter of the right choice, its content, or both
    math     math_judge    in lab/judges.py: the same as text, else equal as mathematics
    game24   game24_judge  in lab/judges.py: any expression that has each given number once and equals 24

A row of a task may name another rule as its kind, such as my_rules.date_judge. (The name must end in _judge. A kind
imports its module: read the kinds of a file that you do not trust.) `--reward` replaces `rules`: see `score`.

`rule_judge` compares the *whole* prediction with each accepted answer and never looks for one inside the other. So it
needs no list of tricks. All of these earn 0: several candidates ("Paris or London"), a sentence that contains the
answer, an added detail ("Paris, France"), "unknown", and the question itself. A policy finds every false positive, but
a false negative only slows it down. So the rules say 0 when in doubt. If another spelling should count, add it to the
accepted answers. `tasks.read_row` checks that there is at least one and that none is empty.

The rules treat both sides alike, so an accepted answer always matches itself, even with commas, slashes or "and" in it:
- They drop wrapping: "The answer is X.", "Final answer: X", **X**, "X", `X`, $X$, \\(X\\), \\boxed{X}, one full stop.
- They even out spelling: Unicode form, case, accents on Latin letters, a leading a/an/the, white space, and the
  punctuation of prose. They keep what can carry meaning: C++ and C#, A- and A+, n! and n, 3:2, x-y, f'.
- They compare numbers by exact value: 1,234 = 1234.0, 3/4 = 0.75, 1.5e6 = 1500000, but 1/3 is not 0.333 and 3,14 is
  not 3.14. Leading zeros do not count.
- The text beside a number is its unit: $5 = 5 dollars, 50% = 50 percent. Two units must be the same. One side may
  leave its unit out only if the question asks for that unit ("How many apples ...", "..., in km?", "What percent
  ...?"). Percent is a unit too: 50% is never 0.5, and is 50 only if the question asks for percent.
- They compare whole dates as days: 5 January 1964 = January 5th, 1964 = 1964-01-05. 1/5/1964 is ambiguous: text.

`rule_judge` does not read number words (five, million), convert units, do algebra, know synonyms, or tell MW from mW.
"""

import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime
from fractions import Fraction
from typing import Any, NamedTuple

from team import team
from tools import find

LETTER = r"[^\W\d_]"
SAME_CHARACTER = str.maketrans("‐‒–—−⁄’‘“”", "-----/''\"\"")
WRAPPERS = ("** **", "* *", '" "', "' '", "` `", "$$ $$", "$ $", "\\( \\)", "\\[ \\]", "\\boxed{ }", "\\text{ }")
LEAD_IN = re.compile(
    r"""^(?: \** (?:(?:so|thus|hence|therefore),?\ )? (?:(?:the|my)\ )? (?:(?:final|correct)\ )?
    answer (?:\ is\b:?|\ ?[:=]) (?:\*\*)? \ ? )+""",
    re.VERBOSE | re.IGNORECASE,
)
DATE_FORMS = ("%d %B %Y", "%B %d %Y", "%d %b %Y", "%b %d %Y", "%Y-%m-%d")
UNIT_WORDS = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "%": "percent", "°": "degree"}
NUMBER = re.compile(
    r"""(?![+-][$€£¥]?[+-]) (?P<sign>[+-]? (?P<currency>[$€£¥]?) [+-]?)  # -$5 or $-5, but not -$-5
    (?: (?:(?P<whole>\d+)\ )? (?P<fraction>\d+/0*[1-9]\d*)
      | (?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)
        (?:(?:e|\ ?(?:[x×*]|\\times)\ ?10\^) \{?(?P<exponent>[+-]?\d{1,3})\}?)?
    ) (?![\d.,:/^_-])  # 1.2.3, 10:30, 1/2/2020 and 5-7 are no numbers with a unit
    """,
    re.VERBOSE,
)


class Number(NamedTuple):
    value: Fraction
    unit: str  # "" if none is written


def fold(text: str) -> str:
    """Even out what is only spelling: Unicode form, case, accents, LaTeX, white space."""
    # Plain compatibility folding would read 10² as 102, 10₂ as 102, and 1½ or 1\frac{1}{2} as 11/2.
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", r"^\g<0>", text)
    text = re.sub(r"(?<=\d)(?=[₀-₉])", "_", text)
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞]|\\[dt]?frac)", " ", text)
    text = unicodedata.normalize("NFKD", text).casefold()
    # Latin letters only: in other scripts a mark makes another letter (Cyrillic и and й, Japanese か and が).
    text = re.sub(r"(?<=[a-z])[\u0300-\u036f]+", "", text)
    text = unicodedata.normalize("NFC", text).translate(SAME_CHARACTER)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return " ".join(re.sub(r"\\([$%])", r"\1", text).split())


def unwrap(text: str, spelling: Callable[[str], str] = fold) -> str:
    """The folded text without what models put around an answer: a lead-in, emphasis, quotes, a full stop."""
    text, before = spelling(text), None
    while text != before:
        before = text
        text = re.sub(r"(?<!\.)\.$", "", text)  # one full stop only: 0.333... is not 0.333
        for left, right in map(str.split, WRAPPERS):
            inner = text[len(left) : len(text) - len(right)]
            # '"Paris" or "London"' is not one quoted answer.
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner.strip()
        text = LEAD_IN.sub("", text)
    return text


def drop_prose_marks(text: str) -> str:
    """Remove punctuation and articles where they cannot carry meaning: beside words, not beside digits or symbols."""
    text = re.sub(rf"(?<=\b{LETTER}\.) (?={LETTER}(?:\.|$))", "", text)  # J. K. = J.K.
    text = re.sub(r"(?<=\w)\.(?!\d)", "", text)
    text = re.sub(rf"(?<={LETTER}{{2}})[!?]+", "", text)
    text = re.sub(rf"'(?={LETTER}{{2}})|\"(?={LETTER})|(?<={LETTER})\"", "", text)
    text = re.sub(rf"[,;]|(?<=\w):(?!\d)|(?<={LETTER}{{2}})-(?={LETTER}{{2}})", " ", text)
    text = re.sub(r" ?/ ?", "/", " ".join(text.split()))
    return re.sub(r"^(?:the|an?) (?=[^\W_]{2})", "", text)  # leading only: "Vitamin A" keeps its A


def normalize(text: str) -> str:
    """The text in the form in which two answers are compared."""
    return drop_prose_marks(unwrap(text))


def parse_number(text: str) -> Number | None:
    """The exact value and the unit of a text that starts with a number, else None."""
    text = unwrap(text)
    match = NUMBER.match(text)
    # Python refuses to convert very long digit strings, so they are compared as text.
    if match is None or len(text) > 200:
        return None
    if match["fraction"]:
        value = int(match["whole"] or 0) + Fraction(match["fraction"])
    else:
        value = Fraction(f"{match['decimal'].replace(',', '')}e{match['exponent'] or 0}")
    if "-" in match["sign"]:
        value = -value
    units = (match["currency"], drop_prose_marks(text[match.end() :]))
    unit = " ".join(UNIT_WORDS.get(unit, unit) for unit in units if unit)
    return Number(value, re.sub(r"(?<=[a-z]{3})s$", "", unit))  # apples = apple, but ms is not m


def parse_date(text: str) -> date | None:
    """The day that a text names with its month in words or as YYYY-MM-DD, else None."""
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\bof\b", "", normalize(text))
    for form in DATE_FORMS:
        with suppress(ValueError):
            return datetime.strptime(text.strip(), form).date()
    return None


def asks_for(question: str, unit: str) -> bool:
    """Does the question name this unit as the one to answer in?"""
    # A single letter may be a variable: "a polynomial in x" does not make 3x equal to 3.
    asked = rf"\b(?:how many|number of|in|what|what is the) {re.escape(unit)}s?(?!\w)"
    return len(unit) > 1 and re.search(asked, fold(question).replace("percentage", "percent")) is not None


def same_answer(question: str, accepted: str, prediction: str) -> bool:
    if normalize(accepted) == normalize(prediction):
        return True
    if day := parse_date(accepted):
        return day == parse_date(prediction)
    left, right = parse_number(accepted), parse_number(prediction)
    if not (left and right) or left.value != right.value:
        return False
    return left.unit == right.unit or ("" in (left.unit, right.unit) and asks_for(question, left.unit or right.unit))


def rule_judge(question: str, answer: str | list[str], prediction: str | None) -> float:
    """1.0 if the prediction is one of the accepted answers, else 0.0; None is a missing answer."""
    accepted = [answer] if isinstance(answer, str) else answer
    return float(prediction is not None and any(same_answer(question, item, prediction) for item in accepted))


RULES: dict[str, Callable | str] = {
    "text": rule_judge,
    "choice": "lab.judges.choice_judge",
    "math": "lab.judges.math_judge",
    "game24": "lab.judges.game24_judge",
}

# --- the rewards of many trajectories ---------------------------------------------------------------------------------


def rules(examples: list, predictions: list[str], frozen: Any) -> list[float]:
    """The default of `--reward`: judge each prediction by the rule for its kind of question."""
    return [
        find(example.kind, RULES)(example.question, example.answer, prediction)
        for example, prediction in zip(examples, predictions)
    ]


def score(examples: list, groups: list[list], reward: Callable, frozen: Any) -> list[tuple]:
    """Set the reward of each trajectory in groups [question][sample] -> pairs (example, trajectory), in order.

    `reward(examples, predictions, frozen) -> list of float` sees all of them at once, or the share of its process.
    `frozen` is the engine of the frozen modules, so a language model can be the judge without a second copy of its
    weights.
    """
    pairs = [(example, trajectory) for example, group in zip(examples, groups) for trajectory in group]
    mine = team().share(pairs)
    rewards = reward([example for example, _ in mine], [trajectory.answer for _, trajectory in mine], frozen)
    for (_, trajectory), value in zip(pairs, team().gather(rewards), strict=True):
        trajectory.reward = float(value)
    return pairs
