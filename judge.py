"""Was the answer right? The reward of a trajectory, by rules.

A reward is any function `(question, answer, prediction) -> float`. `RULES`, at the end, has one for each kind of
question (`Example.kind`), so another reward is another function. `judge_llm.py` asks a language model where they say 0.

    text     rule_judge    the whole text or number, as below
    math     math_judge    the same, else equal as mathematics: math-verify, in a process that is killed when it is slow
    choice   choice_judge  the letter of the right choice, its content, or both
    game24   game24_judge  any expression over the given numbers, each once, that is 24

`rule_judge` returns 1.0 or 0.0. It compares the *whole* prediction with each accepted answer and never looks for
one inside the other. So several candidates ("Paris or London", "1; 2; 3"), a sentence that contains the answer, an
added detail ("Paris, France"), "unknown", and the question with or without more text all earn 0 (unless that very
text is accepted), with no list of tricks to keep up to date. A policy finds every false positive, and a false
negative only slows it down: in doubt the rules say 0, and a spelling that should count belongs among the accepted
answers.

Both sides are treated alike, so an accepted answer always matches itself, commas, slashes and "and" included:
- Wrapping goes: "The answer is X.", "Final answer: X", **X**, "X", `X`, $X$, \\(X\\), \\boxed{X}, one full stop.
- Spelling is evened out: Unicode form, case, accents on Latin letters, a leading a/an/the, white space, and the
  punctuation of prose. What can carry meaning stays: C++ and C#, A- and A+, n! and n, 3:2, x-y, f'.
- Numbers are compared by exact value: 1,234 = 1234.0, 3/4 = 0.75, 1.5e6 = 1500000, but 1/3 is not 0.333 and 3,14 is
  not 3.14. Leading zeros do not count.
- The rest of a number is its unit: $5 = 5 dollars, 50% = 50 percent. Two units must be the same. One side may
  leave its unit out only where the question asks for that unit ("How many apples ...", "..., in km?", "What percent
  ...?"). A percent is such a unit: 50% is never 0.5, and is 50 only where a percentage is asked for.
- Whole dates are compared as days: 5 January 1964 = January 5th, 1964 = 1964-01-05. 1/5/1964 is text: which is it?

`rule_judge` does not read number words (five, million), convert units, do algebra, know synonyms, or tell MW from mW.
A wrong *prediction* earns 0; a wrong *call* (no accepted answer, a value of the wrong type) raises.
"""

import ast
import json
import re
import select
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime
from fractions import Fraction
from typing import NamedTuple

LETTER = r"[^\W\d_]"
SAME_CHARACTER = str.maketrans("‐‒–—−⁄’‘“”", "-----/''\"\"")
WRAPPERS = [(mark, mark) for mark in ("**", "*", '"', "'", "`", "$$", "$")]
WRAPPERS += [("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"), ("\\text{", "}")]
LEAD_IN = re.compile(
    r"""(?: \** (?:(?:so|thus|hence|therefore),?\ )? (?:(?:the|my)\ )? (?:(?:final|correct)\ )?
    answer (?:\ is\b:?|\ ?[:=]) (?:\*\*)? \ ? )+""",
    re.VERBOSE | re.IGNORECASE,
)
DATE_FORMS = ("%d %B %Y", "%B %d %Y", "%d %b %Y", "%b %d %Y", "%Y-%m-%d")
UNIT_WORDS = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "%": "percent", "°": "degree"}
NUMBER = re.compile(
    r"""(?P<sign>[+-]?) (?P<currency>[$€£¥]?) (?P<inner_sign>[+-]?)
    (?: (?:(?P<whole>\d+)\ )? (?P<numerator>\d+) / (?P<denominator>0*[1-9]\d*)
      | (?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)
        (?:(?:e|\ ?(?:[x×*]|\\times)\ ?10\^) \{?(?P<exponent>[+-]?\d{1,3})\}?)?
    ) (?![\d.,:/^_-])  # 1.2.3, 10:30, 1/2/2020 and 5-7 are no numbers with a unit
    """,
    re.VERBOSE,
)


class Number(NamedTuple):
    value: Fraction
    unit: str  # "" where none is written


def fold(text: str) -> str:
    """One spelling for what differs in Unicode, case, accents, LaTeX or white space alone."""
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
        for left, right in WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            # '"Paris" or "London"' is not one quoted answer.
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner.strip()
        if lead_in := LEAD_IN.match(text):
            text = text[lead_in.end() :]
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
    # Python refuses to convert very long digit strings; those are compared as text.
    if match is None or len(text) > 200 or (match["sign"] and match["inner_sign"]):
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    else:
        value = int(match["whole"] or 0) + Fraction(int(match["numerator"]), int(match["denominator"]))
    if "-" in (match["sign"], match["inner_sign"]):
        value = -value
    units = (match["currency"], drop_prose_marks(text[match.end() :]))
    unit = " ".join(UNIT_WORDS.get(unit, unit) for unit in units if unit)
    return Number(value, re.sub(r"(?<=[a-z]{3})s$", "", unit))  # apples = apple, but ms is not m


def parse_date(text: str) -> date | None:
    """The day that a text names with its month in words or as YYYY-MM-DD, else None."""
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\bof\b", "", normalize(text))
    for form in DATE_FORMS if re.search(r"\b\d{4}\b", text) else ():
        with suppress(ValueError):
            return datetime.strptime(" ".join(text.split()), form).date()
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
    if left is None or right is None or left.value != right.value:
        return False
    return left.unit == right.unit or ("" in (left.unit, right.unit) and asks_for(question, left.unit or right.unit))


def rule_judge(question: str, answer: str | list[str], prediction: str | None) -> float:
    """1.0 if the prediction is one of the accepted answers, else 0.0; None is a missing answer."""
    accepted = [answer] if isinstance(answer, str) else answer
    if not isinstance(question, str):
        raise TypeError(f"question must be a str, not {type(question).__name__}")
    if not isinstance(accepted, list) or not all(isinstance(item, str) for item in accepted):
        raise TypeError(f"answer must be a str or a list of str, not {answer!r}")
    if not accepted or not all(normalize(item) for item in accepted):
        raise ValueError(f"every question needs at least one accepted answer and none may be empty, got {answer!r}")
    if not isinstance(prediction, str | None):
        raise TypeError(f"prediction must be a str or None, not {type(prediction).__name__}")
    return float(prediction is not None and any(same_answer(question, item, prediction) for item in accepted))


# --- multiple choice --------------------------------------------------------------------------------------------------


def choice_judge(question: str, answer: list[str], prediction: str | None) -> float:
    """1.0 for the letter of the right choice, its content, or both: B, (b), "B) Paris", Paris. `answer` is
    [letter, content]."""
    letter, content = answer
    named = re.fullmatch(r"(?:(?:option|choice) )?\(?([a-z])(?:[).:]+ ?(.*))?", unwrap(prediction or ""))
    if named and (named[1] == letter.lower() or not named[2]):  # a letter alone is the letter, whatever the contents
        return float(named[1] == letter.lower() and (not named[2] or same_answer(question, content, named[2])))
    return rule_judge(question, content, prediction)


# --- the game of 24 ---------------------------------------------------------------------------------------------------


def game24_judge(question: str, answer: str | list[str], prediction: str | None) -> float:
    """1.0 for any expression with the numbers of an accepted one, each once, whose value is 24, listed or not."""
    numbers = game24_numbers(answer if isinstance(answer, str) else answer[0])
    try:
        value, used = evaluate_expression(prediction or "")
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(value == 24 and sorted(used) == sorted(numbers))


def game24_numbers(expression: str) -> list[str]:
    return re.findall(r"\d+", expression)


def evaluate_expression(text: str) -> tuple[Fraction, list[str]]:
    """Exact value and numbers of + - * / ( ) over integers, read with `ast` and never executed; else `ValueError`."""
    nested = True
    while nested:  # from the inside out, and each in brackets: 12*12/\frac{3}{2} is 96
        text, nested = re.subn(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\times|\\cdot|×|·", "*", unwrap(text).translate(str.maketrans("{}[]", "()()")))
    text = re.sub(r"\s*=\s*24$", "", re.sub(r"\\div|÷", "/", text))
    used = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int(number)) if type(number) is int:
                used.append(str(number))
                return Fraction(number)
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.Div(), right):
                return value(left) / value(right)
        raise ValueError("only + - * / and integers")

    if len(text) > 100:
        raise ValueError("too long")
    try:
        return value(ast.parse(text, mode="eval").body), used
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an expression") from None


# --- mathematics ------------------------------------------------------------------------------------------------------


class MathWorker:
    """`math-verify` in a process of its own. SymPy evaluates what it reads and may simplify for hours, so the process
    gets none of our environment, a limit on its memory, and is killed when a verdict takes longer than `limit_s`."""

    def __init__(self, limit_s: float = 5.0):
        self.limit_s, self.process = limit_s, None

    def same(self, accepted: list[str], prediction: str) -> bool:
        """Is an expression equal to one of the accepted? What cannot be read, or not in time, is not."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self._start()
        self.process.stdin.write(json.dumps([accepted, prediction]).encode() + b"\n")
        self.process.stdin.flush()
        verdict = self._read_line(self.limit_s)
        if verdict is None:  # too slow, or it ran out of memory
            self.close()
        return verdict == b"1"

    def _start(self) -> None:
        command = [sys.executable, "-I", __file__, "--math-worker"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        # A session of its own: Ctrl-C is for the trainer, which still has verdicts to ask for before it stops.
        self.process = subprocess.Popen(command, **pipes, env={}, cwd="/", start_new_session=True)
        if self._read_line(60.0) != b"ready":
            self.close()
            raise RuntimeError("the mathematics judge does not start: pip install math-verify")

    def _read_line(self, limit_s: float) -> bytes | None:
        ready = select.select([self.process.stdout], [], [], limit_s)[0]
        return (self.process.stdout.readline().strip() or None) if ready else None

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def serve_math() -> None:
    """The worker's side: a JSON pair [list of accepted, prediction] a line in, 1 or 0 a line out."""
    import logging
    import resource
    import signal
    from dataclasses import replace
    from functools import lru_cache

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # of texts it cannot read
    if sys.platform != "darwin":  # which refuses it
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    # Not its plain expressions: SymPy reads those with eval(). Not its units: 2m and 3ab would be 2 and 3.
    normalization = replace(LatexExtractionConfig().normalization_config, units=False)
    latex = [LatexExtractionConfig(normalization_config=normalization)]

    @lru_cache(4096)  # the rollouts of a question share its accepted answers, and often their predictions
    def read(text: str) -> list:
        return parse(f"${text}$", latex, "no_fallback", parsing_timeout=None)

    def same(gold: list, target: list) -> bool:
        return bool(gold and target) and verify(gold, target, timeout_seconds=None)

    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(60)  # ends this process even inside SymPy: whoever has asked and would kill it may be gone
        accepted, prediction = json.loads(line)
        print(int(any(same(read(text), read(prediction)) for text in accepted)), flush=True)
        signal.alarm(0)


MATH = MathWorker()


def marks(text: str) -> tuple[bool, int]:
    """Is it in percent, and how many derivatives does it name?"""
    return re.search(r"%|\bpercent|\bpct\b", text, re.IGNORECASE) is not None, text.count("'") + text.count(r"\prime")


def is_number(text: str) -> bool:
    number = parse_number(text)
    return number is not None and not number.unit


def math_judge(question: str, answer: str | list[str], prediction: str | None) -> float:
    """1.0 if the rules or math-verify find the prediction equal to an accepted answer: 1/2 = \\frac{1}{2} = 2^{-1}."""
    by_rules = rule_judge(question, answer, prediction)
    if by_rules or not prediction or len(prediction) > 300:
        return by_rules
    text = unwrap(prediction, str.strip)
    if re.search(r"\b(?:or|and)\b|[;?]", text):  # candidates to choose from are no answer
        return 0.0
    accepted = [unwrap(item, str.strip) for item in ([answer] if isinstance(answer, str) else answer)]
    # math-verify takes 12 % for 12 and for 0.12, and f'(0) for f(0). Where a percent sign may be left out, the rules
    # have said so.
    accepted = [item for item in accepted if marks(item) == marks(text)]
    if is_number(text):  # the rules are exact about two numbers, and most wrong answers are one
        accepted = [item for item in accepted if not is_number(item)]
    return float(bool(accepted) and MATH.same(accepted, text))


RULES = {"text": rule_judge, "math": math_judge, "choice": choice_judge, "game24": game24_judge}

if __name__ == "__main__" and sys.argv[1:] == ["--math-worker"]:
    serve_math()
