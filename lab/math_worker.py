"""The process behind `lab.judges.MathWorker`: it reads a JSON pair [accepted answers, prediction] per line and answers
each with 1 or 0 on a line.

It is run by its path, without our environment, and imports nothing of ours: SymPy evaluates what it reads.
"""

import json
import logging
import re
import resource
import signal
import sys
from dataclasses import replace
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase, Set, Symbol
from sympy.core.relational import Relational

DECIMAL = re.compile(r"(\^?)(?<![\d.])((?:\d{1,3}(?:,\d{3})+|\d*)\.(\d+))(?![\d.])")
DIGITS = 1000  # in which two values that are not simplified to the same must agree; math-verify takes 15

logging.disable()  # math-verify reports every text that it cannot read
if sys.platform != "darwin":  # macOS refuses this limit
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
# No plain expressions: SymPy reads them with eval(). No units: math-verify would read 2m and 3ab as 2 and 3.
normalization = replace(LatexExtractionConfig().normalization_config, units=False)
latex = [LatexExtractionConfig(normalization_config=normalization)]


@lru_cache(4096)  # the rollouts of a question share its accepted answers, and often their predictions
def read(text: str) -> list:
    return parse(f"${text}$", latex, "no_fallback", parsing_timeout=None)


def as_fractions(text: str) -> str:
    r"""0.25 becomes \frac{025}{100}: math-verify compares fractions exactly, and decimals after rounding."""

    def fraction(found: re.Match) -> str:
        number = rf"\frac{{{re.sub('[.,]', '', found[2])}}}{{{10 ** len(found[3])}}}"
        return f"{found[1]}{{{number}}}" if found[1] else number  # x^0.5 is x^{0.5}

    return DECIMAL.sub(fraction, text)


def solved_for(expression: Basic | MatrixBase) -> set[Symbol] | None:
    """The variables that stand alone on a side of its equations and inequalities; None if one of them has none."""
    variables = set()
    for relation in expression.atoms(Relational):
        left, right = relation.args
        alone = {side for side, other in ((left, right), (right, left)) if side.is_Symbol and not other.has(side)}
        if not alone:
            return None
        variables |= alone
    return variables


def rounds_to(accepted: str, target: Basic | MatrixBase) -> bool:
    """Is the accepted answer a decimal, and the target an irrational number that rounds to it?"""
    if not re.fullmatch(r"-?\d*\.\d+", accepted) or len(accepted.lstrip("-0.").replace(".", "")) < 3:
        return False  # two digits agree by chance too often: 0.8 is not pi/4
    places = len(accepted.partition(".")[2])
    irrational = getattr(target.doit(), "is_rational", None) is False
    return irrational and verify(read(accepted), target, float_rounding=places, timeout_seconds=None)


def same(accepted: str, prediction: str) -> bool:
    gold, target = read(as_fractions(accepted)), read(as_fractions(prediction))
    if not gold or not target:
        return False
    # math-verify would solve x^2 < x, which may be the question itself, and find it equal to (0, 1).
    wanted, given = solved_for(gold[0]), solved_for(target[0])
    is_solution = wanted or (wanted is not None and isinstance(gold[0], Set))
    if is_solution and (given is None or (wanted and not given <= wanted)):
        return False
    equal = verify(gold, target, numeric_precision=DIGITS, allow_set_relation_comp=True, timeout_seconds=None)
    return equal or rounds_to(accepted, target[0])


print("ready", flush=True)
for line in sys.stdin:
    signal.alarm(60)  # ends this process even inside SymPy: whoever asked, and would kill it, may be gone
    accepted, prediction = json.loads(line)
    print(int(any(same(text, prediction) for text in accepted)), flush=True)
    signal.alarm(0)
