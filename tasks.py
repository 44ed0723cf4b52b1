"""Questions and answers from JSON lines, and the articles that Search looks into.

A task is a folder. It needs no code:

    my_task/train.jsonl, dev.jsonl, test.jsonl    {"question": "...", "answer": "..."} on each line
    my_task/corpus.db                             made by `python tasks.py index articles.jsonl my_task/corpus.db`

The answer is a text or a number, or a list of accepted ones. Two more fields are optional: `family`, for tables by kind
of question, and `kind`, for how answers are compared (a key of `judge.RULES`, or module.name_judge). Articles are
{"title": "...", "text": "..."} on each line. `lab/prepare.py` makes such folders of the files that benchmarks publish.
"""

import argparse
import json
import math
import os
import random
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from judge import RULES, normalize
from tinyworld.world import FAMILIES, HARD_FAMILIES, World
from tools import UserError, find


@dataclass(frozen=True)
class Example:
    question: str  # with its choices, if it has some
    answer: str | list[str]  # a list: several accepted answers, or a choice's letter and content
    family: str = "all"  # a kind of question, for tables by family
    kind: str = "text"  # how answers are compared


# --- questions --------------------------------------------------------------------------------------------------------


@cache
def bundled_world() -> World:
    return World(seed=0)


def tinyworld(split: str, families: tuple[str, ...] = FAMILIES, world: World | None = None) -> list[Example]:
    """Questions of the bundled world, or of another one."""
    questions = (world or bundled_world()).questions(split, families)
    return [Example(q.question, q.answer, q.family) for q in questions]


TASKS: dict[str, Callable[[str], list[Example]]] = {
    "tinyworld": tinyworld,
    "tinyworld-hard": partial(tinyworld, families=HARD_FAMILIES),  # with --max_turns 7
}


def load_examples(task: str, split: str, count: int = 0) -> list[Example]:
    """The first `count` examples of a split (0: all), from `TASKS` or a folder with SPLIT.jsonl. `UserError` names file
    and line."""
    if task in TASKS:
        return TASKS[task](split)[: count or None]
    path = Path(task) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"--task {task}: there is no {path}; name {', '.join(TASKS)}, or a folder with SPLIT.jsonl")
    examples = [at(place, read_row, row) for place, row in read_lines(path)]
    if not examples:
        raise UserError(f"{path} holds no questions")
    return examples[: count or None]


def questions_of_step(train_set: list[Example], step: int, count: int, seed: int) -> list[Example]:
    """`count` questions of an endless stream, shuffled anew each epoch. They depend on seed and step alone, so
    a run that continues needs no other state."""
    n, first = len(train_set), (step - 1) * count
    epochs = range(first // n, (first + count - 1) // n + 1)
    order = [i for epoch in epochs for i in random.Random(f"{seed} epoch {epoch}").sample(range(n), n)]
    return [train_set[i] for i in order[first % n : first % n + count]]


def read_row(row: Any) -> Example:
    """One example; `ValueError` says what is wrong with its row."""
    if not isinstance(row, dict):
        raise ValueError(f'a row must be {{"question": ..., "answer": ...}}, not {type(row).__name__}')
    question, family, kind = row.get("question"), row.get("family", "all"), row.get("kind", "text")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question must be a text that is not empty")
    if not isinstance(family, str) or not isinstance(kind, str):
        raise ValueError("family and kind must be texts")
    answers = row.get("answer")
    answers = list(map(as_text, answers if isinstance(answers, list) else [answers]))
    if not answers or not all(map(normalize, answers)):
        raise ValueError("the answer must be a text or a number, or a list of such, none of them empty")
    if kind not in RULES and not kind.endswith("_judge"):  # so that data cannot call just any function
        raise ValueError(f"the kind must be one of {', '.join(RULES)}, or module.name_judge, not {kind!r}")
    try:
        find(kind, RULES, 3)
    except UserError as error:
        raise ValueError(str(error)) from None
    if kind == "choice" and (len(answers) != 2 or not re.fullmatch("[A-Z]", answers[0])):
        raise ValueError("the answer of a choice must be [letter, content]")
    return Example(question, answers if len(answers) > 1 else answers[0], family, kind)


def as_text(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer must be a text or a number, or a list of such, not {type(answer).__name__}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError("the answer is too large a number")
    return str(answer)


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE:LINE", value) for each line of JSON. A malformed line is a `UserError`."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, at(place, parse, line)


def append(path: Path, *rows: dict) -> None:
    """Add rows to a file of JSON lines."""
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_kept(path: Path, item: Callable[[dict], Any], mistake: str) -> list:
    """What `append` has written: item(row) of each row. A last line that a kill has cut off is dropped, from the file
    too. If the file is not one of ours, it stays as it is, and `UserError` names the mistake."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        kept = [item(json.loads(line)) for line in whole.splitlines()]
        if data[len(whole) : len(whole) + 1] not in (b"", b"{"):
            raise ValueError("its end is none of ours")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} {mistake.format(error=error)}") from None
    if whole != data:
        os.truncate(path, len(whole))  # to write the file anew would put its rows at risk
    return kept


def keep_steps(path: Path, done: int) -> None:
    """Drop the rows of a run's log that come after step `done`: these steps run again."""
    rows = read_kept(path, lambda row: (row["step"] <= done, row), "is damaged ({error}): mend or remove it")
    if missing := set(range(1, done + 1)) - {row["step"] for _, row in rows}:
        print(f"{path} lacks {len(missing)} of {done} steps; the run goes on, but its log keeps this hole")
    kept = [row for by_then, row in rows if done and by_then]
    if len(kept) < len(rows):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def write_atomically(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


def parse(line: bytes) -> Any:
    try:
        row = json.loads(line.decode(), parse_constant=refuse, object_pairs_hook=once)
        json.dumps(row, ensure_ascii=False).encode()  # refuses a lone surrogate: JSON allows it, tokenizers do not
        return row
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def once(pairs: list[tuple[str, Any]]) -> dict:
    """The object with these fields, if no name hides another."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a name stands twice in {', '.join(name for name, _ in pairs)}")
    return row


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def at(place: str, read: Callable, value: Any) -> Any:
    """read(value); a `ValueError` becomes a `UserError` that names the place."""
    try:
        return read(value)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


# --- articles ---------------------------------------------------------------------------------------------------------

# Nearly every article has these words. They rank nothing, and cost most of the time of a search.
STOP_WORDS = set("a an and are at by did do does for from how in is of on or that the to was what which who".split())


class Corpus:
    """Articles (title, text) in SQLite's full-text index, ranked by BM25."""

    def __init__(self, place: str, read_only: bool = False):
        uri = f"file:{quote(place)}?mode=ro" if read_only else f"file:{quote(place)}"
        # One thread at a time uses it, but not always the same one.
        self.connection = sqlite3.connect(uri, uri=True, check_same_thread=False)

    @classmethod
    def from_articles(cls, articles: Iterable[tuple[str, str]], place: str = ":memory:") -> "Corpus":
        corpus = cls(place)
        with corpus.connection:
            corpus.connection.execute("CREATE VIRTUAL TABLE articles USING fts5(title, text)")
            corpus.connection.executemany("INSERT INTO articles VALUES (?, ?)", articles)
        return corpus

    def search(self, query: str, k: int = 1) -> list[tuple[str, str]]:
        """The k best (title, text). Any text is a legal query: its words are quoted, then joined by OR."""
        words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))[:64]  # FTS5 bounds the depth of a query
        match = " OR ".join(f'"{word}"' for word in [w for w in words if w not in STOP_WORDS] or words)
        # A title counts tenfold: a query that names a thing wants its own article, not one that mentions it.
        ranked = """SELECT title, text FROM articles WHERE articles MATCH ?
                    ORDER BY bm25(articles, 10.0, 1.0), rowid LIMIT ?"""
        return self.connection.execute(ranked, (match, k)).fetchall() if words else []

    def __len__(self) -> int:
        return self.connection.execute("SELECT count(*) FROM articles").fetchone()[0]


def load_corpus(task: str = "tinyworld", needed: bool = True) -> Corpus | None:
    """The articles of the bundled world, or the corpus.db of a task's folder. If there is none: `UserError` if it is
    needed, else None."""
    if task in TASKS:
        return Corpus.from_articles(bundled_world().articles.items())
    path = Path(task) / "corpus.db"
    if not path.exists() and not needed:
        return None
    try:
        corpus = Corpus(str(path), read_only=True)  # so that any number of runs can share it
        corpus.search("a")
        if not len(corpus):
            raise sqlite3.Error("it holds no articles")
        return corpus
    except sqlite3.Error as error:
        advice = f"make it by `python tasks.py index articles.jsonl {path}`, or leave Search out of --tools"
        raise UserError(f"Search needs {path} ({error}): {advice}") from None


def read_article(row: Any) -> tuple[str, str]:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("title", "text")):
        raise ValueError('not {"title": "...", "text": "..."}')
    if not row["title"].strip() and not row["text"].strip():
        raise ValueError("title and text are empty")
    return row["title"], row["text"]


def index(articles: Path, path: Path) -> int:
    """Make the corpus at `path` from a file of articles -> number of articles. The corpus is built beside its place and
    moved there when it is whole, so nobody sees half a corpus."""
    if path.exists() and path.samefile(articles):
        raise UserError(f"{path} is the file of articles itself: name another file for the corpus")
    if path.exists() and not (path.is_file() and path.read_bytes()[:13] == b"SQLite format"):
        raise UserError(f"{path} is no corpus: name another file, or remove it")
    unfinished = Path(f"{path}.partial-{os.getpid()}")
    rows = (at(place, read_article, row) for place, row in read_lines(articles))
    try:
        corpus = Corpus.from_articles(rows, str(unfinished))
        count = len(corpus)
        if not count:
            raise UserError(f"{articles} holds no articles")
        corpus.connection.close()
        unfinished.replace(path)
        return count
    finally:
        unfinished.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """One that says a mistake in one line."""

    def error(self, message: str) -> None:
        sys.exit(print(f"{self.prog}: {message}; --help says more", file=sys.stderr) or 2)


if __name__ == "__main__":
    parser = Parser(description="Make the corpus that Search looks into.")
    parser.add_argument("command", choices=["index"])
    parser.add_argument("articles", type=Path, help='JSON lines, {"title": "...", "text": "..."} each')
    parser.add_argument("corpus", type=Path, help="file to make, such as my_task/corpus.db")
    arguments = parser.parse_args()
    try:
        print(f"{arguments.corpus}: {index(arguments.articles, arguments.corpus)} articles")
    except (UserError, OSError, sqlite3.Error) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
