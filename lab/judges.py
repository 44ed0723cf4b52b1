"""Rules for three more kinds of question (`judge.RULES` names them).

    choice   the letter of the right choice, its content, or both
    game24   any expression over the given numbers, each once, that is 24
    math     the same as text, else equal as mathematics: math-verify, in a process that is killed when it is slow

Mathematics is compared exactly: 0.333333 is not 1/3. If the accepted answer is itself a decimal of three digits or
more, its written precision counts for values that no decimal can write: 1.41 accepts \\sqrt{2}.
"""

import ast
import json
import re
import select
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

from judge import parse_number, rule_judge, same_answer, unwrap

WORKER = Path(__file__).with_name("math_worker.py")

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
    listed = re.sub(r"=\s*24\s*$", "", answer if isinstance(answer, str) else answer[0])
    numbers = re.findall(r"\d+", listed)
    try:
        value, used = evaluate_expression(prediction or "")
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(value == 24 and sorted(used) == sorted(numbers))


def evaluate_expression(text: str) -> tuple[Fraction, list[str]]:
    """Exact value and numbers of + - * / ( ) over integers, read with `ast` and never executed; else `ValueError`."""
    nested = True
    while nested:  # from the inside out, and each in brackets: 12*12/\frac{3}{2} is 96
        text, nested = re.subn(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\times|\\cdot|[x×·∗⋅•]", "*", unwrap(text).translate(str.maketrans("{}[]", "()()")))
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
        command = [sys.executable, "-I", str(WORKER)]
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


MATH = MathWorker()
TEXT = re.compile(r"(?:\\[, ])?\\(?:text|mathrm)\{([^{}]*\w[^{}]*)\}")  # 5\text{ cm} is 5 cm


def marks(text: str) -> tuple[bool, int]:
    """Is it in percent, and how many derivatives does it name?"""
    return re.search(r"%|\bpercent|\bpct\b", text, re.IGNORECASE) is not None, text.count("'") + text.count(r"\prime")


def is_number(text: str) -> bool:
    number = parse_number(text)
    return number is not None and not number.unit


def is_word(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z ]{3,}", text) is not None


def is_list(text: str) -> bool:
    """Several values, as in `1, 2`: not a point, a set, an interval or 1,234."""
    return "," in text and not re.search(r"[(\[]|\\\{", text) and not is_number(text)


def math_judge(question: str, answer: str | list[str], prediction: str | None) -> float:
    """1.0 if the rules or math-verify find the prediction equal to an accepted answer: 1/2 = \\frac{1}{2} = 2^{-1}."""
    if not prediction:
        return 0.0
    accepted = [answer] if isinstance(answer, str) else answer
    if rule_judge(question, [TEXT.sub(r" \1", item) for item in accepted], TEXT.sub(r" \1", prediction)):
        return 1.0
    text, accepted = unwrap(prediction, str.strip), [unwrap(item, str.strip) for item in accepted]
    if len(text) > 300 or re.search(r"[;?]", text):
        return 0.0
    # `1 or 2` are candidates to choose from, and no answer, unless the answer is a list: then all of it must be named.
    joined = re.sub(r"(?:\s*,)?\s*(?:\\text\{\s*(?:or|and)\s*\}|\b(?:or|and)\b)\s*", ", ", text)
    if joined != text:
        accepted = [item for item in accepted if is_list(item)]
    # math-verify takes 12 % for 12 and for 0.12, and f'(0) for f(0). The rules know if a percent sign may be left out.
    accepted = [item for item in accepted if marks(item) == marks(joined)]
    # The rules have compared two numbers exactly, and two words: math-verify reads east as e·a·s·t, which is seat.
    for decided in (is_number, is_word):
        if decided(joined):
            accepted = [item for item in accepted if not decided(item)]
    return float(bool(accepted) and MATH.same(accepted, joined))
