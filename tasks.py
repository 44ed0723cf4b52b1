"""Questions and answers: the bundled world, or a folder of JSONL files.

A task is a list of `Example`s for each split and a corpus to search. To add one, add a function to `TASKS`. A folder
with train.jsonl, dev.jsonl and test.jsonl, a {"question": ..., "answer": ...} on each line, works with no code:

    python train.py --task my_folder --corpus my_corpus.db        # python tools.py index articles.jsonl my_corpus.db
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm import UserError
from tinyworld.world import World
from tools import Corpus

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    question: str
    answer: str | list[str]  # several accepted answers are a list
    family: str = "all"  # a kind of question, for tables by family


def tinyworld(split: str) -> list[Example]:
    return [Example(q.question, q.answer, q.family) for q in World(seed=0).questions(split)]


TASKS: dict[str, Callable[[str], list[Example]]] = {"tinyworld": tinyworld}


def load_examples(task: str, split: str) -> list[Example]:
    """The examples of a split. `task`: a name in `TASKS`, a folder with SPLIT.jsonl, or a JSONL file for any split."""
    if task in TASKS:
        return TASKS[task](split)
    path = Path(task)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(
            f"no task {task}: {path} is not there; use one of {', '.join(TASKS)} or a folder of JSONL files"
        )
    return read_jsonl(path)


def read_jsonl(path: Path) -> list[Example]:
    """One {"question": str, "answer": str or list of str, "family": str or none} a line, or `UserError`."""
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer, family = row["question"], row["answer"], row.get("family", "all")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}:{number}: not {{"question": ..., "answer": ...}} ({type(error).__name__}: {error})'
            ) from None
        answers = answer if isinstance(answer, list) else [answer]
        if not (isinstance(question, str) and question.strip() and isinstance(family, str)):
            raise UserError(f"{path}:{number}: the question must be a text that is not empty")
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"{path}:{number}: the answer must be a text, or a list of texts, none of them empty")
        examples.append(Example(question, answer, family))
    if not examples:
        raise UserError(f"{path} holds no questions")
    return examples


def load_corpus(path: str = "") -> Corpus:
    """The corpus that Search looks into: a file made by `python tools.py index`, or the bundled world's articles."""
    if not path:
        return Corpus.from_articles(World(seed=0).articles.items())
    try:
        return Corpus.open(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
