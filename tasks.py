"""Questions and answers: the bundled world, a folder of JSONL files, or a benchmark file as its authors publish it.

A task is a list of `Example`s for each split and a corpus to search. To add one, add a function to `TASKS`. A folder
with train.jsonl, dev.jsonl and test.jsonl, a {"question": ..., "answer": ...} on each line, works with no code:

    python train.py --task my_folder --corpus my_corpus.db        # python tools.py index articles.jsonl my_corpus.db

One reader takes all shapes that benchmark files come in (`read_row`): `query` or `question`, one answer or several, a
list that was written as a string, options as a list, a dict or a text, and instructions for another harness at the end.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judge import RULES, game24_numbers
from llm import UserError
from tinyworld.world import World
from tools import Corpus

SPLITS = ("train", "dev", "test")
# What the authors of AgentFlow append to their questions. Our generator has its own instructions.
INSTRUCTIONS = re.compile(
    r"\s*When ready, output the final answer enclosed in <answer> and </answer> tags\..*", re.DOTALL
)


@dataclass(frozen=True)
class Example:
    question: str  # with its choices, where it has some
    answer: str | list[str]  # several accepted answers are a list
    family: str = "all"  # a kind of question, for tables by family
    kind: str = "text"  # how answers are compared: a key of `judge.RULES`
    choices: tuple[str, ...] = ()


def tinyworld(split: str) -> list[Example]:
    return [Example(q.question, q.answer, q.family) for q in World(seed=0).questions(split)]


TASKS: dict[str, Callable[[str], list[Example]]] = {"tinyworld": tinyworld}


def load_examples(task: str, split: str) -> list[Example]:
    """The examples of a split. `task`: a name in `TASKS`, a folder with SPLIT.jsonl, or a file for any split."""
    if task in TASKS:
        return TASKS[task](split)
    path = Path(task)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(
            f"no task {task}: {path} is not there; use one of {', '.join(TASKS)} or a folder of JSONL files"
        )
    return read_file(path)


def read_file(path: Path) -> list[Example]:
    """The examples of a JSONL file, or of a JSON file that holds one list; `UserError` names file and row."""
    examples = []
    for place, row in read_rows(path):
        try:
            examples.append(read_row(row))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    if not examples:
        raise UserError(f"{path} holds no questions")
    return examples


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", row) of a JSONL file; ("FILE, row N", row) of a JSON list, counted from 1."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8") from None
    if text.lstrip().startswith("[") and path.suffix == ".json":
        try:
            yield from ((f"{path}, row {n}", row) for n, row in enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg})") from None


def read_row(row: Any) -> Example:
    """One example from a row of any of the known shapes; `ValueError` says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f'a row must be {{"question": ..., "answer": ...}}, not {type(row).__name__}')
    question, family = row.get("query", row.get("question")), row.get("family", "all")
    if not isinstance(question, str) or not (question := INSTRUCTIONS.sub("", question).strip()):
        raise ValueError("the question must be a text that is not empty")
    if not isinstance(family, str):
        raise ValueError("the family must be a text")
    choices, answers = read_choices(row), read_list(row.get("answer"))
    numeric = [isinstance(answer, int | float) and not isinstance(answer, bool) for answer in answers]
    answers = [str(answer) if number else answer for answer, number in zip(answers, numeric)]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("the answer must be a text or a number, or a list of such, none of them empty")
    is_game24 = isinstance(row.get("question"), list)
    guess = "choice" if choices else "game24" if is_game24 else "math" if all(numeric) else "text"
    kind = row.get("kind", guess)
    if kind not in RULES:
        raise ValueError(f"the kind must be one of {', '.join(RULES)}, not {kind!r}")
    if kind == "choice" and not choices:
        raise ValueError("a question of kind choice needs its options")
    if choices:
        answers = accepted_choice(answers, choices)
        if not all(choice in question for choice in choices):
            question += "".join(f"\n{letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    if kind == "game24" and is_game24:
        numbers = sorted(map(str, row["question"]))
        if not all(sorted(game24_numbers(answer)) == numbers for answer in answers):
            raise ValueError(f"an answer does not use the numbers {row['question']}")
    return Example(question, answers if len(answers) > 1 else answers[0], family, kind, choices)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_list(value: Any) -> list:
    """A list as it is, a list that was written as a string, or one value."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            pass  # a text that begins and ends with brackets, such as an interval
    return value if isinstance(value, list) else [value]


def read_choices(row: dict) -> tuple[str, ...]:
    """The options without their letters, from a list, a dict by letter, or a text with one on each line."""
    options = row.get("options", row.get("choices"))
    if options is None:
        return ()
    if isinstance(options, dict):
        options = [options[letter] for letter in sorted(options)]
    options = read_list(options)
    if len(options) == 1 and isinstance(options[0], str):
        options = [line for line in options[0].splitlines() if line.strip()]
    if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f"the options must be 2 to {len(LETTERS)} texts, none of them empty")
    marks = [rf"\s*\(?{letter}[).:]\s*" for letter in LETTERS]
    if all(re.match(mark, option) for mark, option in zip(marks, options)):
        options = [re.sub(f"^{mark}", "", option) for mark, option in zip(marks, options)]
    return tuple(option.strip() for option in options)


def accepted_choice(answers: list[str], choices: tuple[str, ...]) -> list[str]:
    """[letter, content] of the right choice, which the row names by either."""
    letters = LETTERS[: len(choices)]
    for answer in answers:
        letter = re.fullmatch(r"\(?([A-Z])[).:]?", answer.strip())
        if answer.strip() in choices:
            index = choices.index(answer.strip())
        elif letter and letter[1] in letters:
            index = letters.index(letter[1])
        else:
            raise ValueError(f"the answer {answer!r} is none of the options")
    return [letters[index], choices[index]]


def load_corpus(path: str = "") -> Corpus:
    """The corpus that Search looks into: a file made by `python tools.py index`, or the bundled world's articles."""
    if not path:
        return Corpus.from_articles(World(seed=0).articles.items())
    try:
        return Corpus.open(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
