"""Questions from JSON lines and the articles that Search looks into: what is accepted, and one clear line for what is
not."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tasks
from tasks import Corpus, Example, index, load_corpus, load_examples, read_row
from tools import UserError

# --- questions --------------------------------------------------------------------------------------------------------


def test_the_bundled_task():
    assert [len(load_examples("tinyworld", split)) for split in ("train", "dev", "test")] == [4000, 200, 500]
    assert [len(load_examples("tinyworld-hard", split)) for split in ("train", "dev", "test")] == [2668, 134, 334]
    for task in ("tinyworld", "tinyworld-hard"):
        assert load_corpus(task).search("Zilath")[0][0] == "Zilath"


PLAIN = [
    ({"question": "1 + 1?", "answer": "2"}, Example("1 + 1?", "2")),
    ({"question": "1 + 1?", "answer": 2}, Example("1 + 1?", "2")),
    ({"question": "1 / 4?", "answer": [0.25, "1/4"]}, Example("1 / 4?", ["0.25", "1/4"])),
    ({"question": "Who?", "answer": ["Ann"], "pid": 7}, Example("Who?", "Ann")),
    ({"question": "Who?", "answer": ["Ann", "Ann B."], "family": "who"}, Example("Who?", ["Ann", "Ann B."], "who")),
    ({"question": "Where?", "answer": "[0, 1]", "kind": "math"}, Example("Where?", "[0, 1]", kind="math")),
    (
        {"question": "Which?\nA) red\nB) blue", "answer": ["B", "blue"], "kind": "choice"},
        Example("Which?\nA) red\nB) blue", ["B", "blue"], kind="choice"),
    ),
    (
        {"question": "Who?", "answer": "Ann", "kind": "judge.rule_judge"},
        Example("Who?", "Ann", kind="judge.rule_judge"),
    ),
]


@pytest.mark.parametrize("row, example", PLAIN)
def test_a_plain_row(row, example):
    assert read_row(row) == example


def test_a_folder_of_json_lines(tmp_path):
    """Empty lines and the line ends of other systems do no harm, and no character of a text ends a line."""
    rows = [json.dumps(row, ensure_ascii=False) for row, _ in PLAIN]
    rows.append('{"question": "a\u2028b\u0085c", "answer": "\u2028é"}')
    (tmp_path / "dev.jsonl").write_bytes("\r\n".join([*rows[:3], "", *rows[3:], " "]).encode())
    examples = [example for _, example in PLAIN]
    assert load_examples(str(tmp_path), "dev") == [*examples, Example("a\u2028b\u0085c", "\u2028é")]
    with pytest.raises(UserError, match=r"there is no .*train\.jsonl; name tinyworld, tinyworld-hard, or a folder"):
        load_examples(str(tmp_path), "train")


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b'{"question": "q", "answer": "a"',
        b'{"question": "q", "answer": "a"} {}',
        b'{"question": "\xff", "answer": "a"}',
        b'{"question": "q \\ud800", "answer": "a"}',
        b'{"question": "q", "answer": "a", "other": "\\udfff"}',
        b"[" * 100_000,
        b'{"question": ' + b'{"a": ' * 100_000,
        b"[1, 2]",
        b'"text"',
        b"null",
        b"{}",
        b'{"question": "q"}',
        b'{"question": "", "answer": "a"}',
        b'{"question": " ", "answer": "a"}',
        b'{"question": 5, "answer": "a"}',
        b'{"question": ["q"], "answer": "a"}',
        b'{"question": "q", "answer": true}',
        b'{"question": "q", "answer": null}',
        b'{"question": "q", "answer": {"a": 1}}',
        b'{"question": "q", "answer": []}',
        b'{"question": "q", "answer": [["a"]]}',
        b'{"question": "q", "answer": ["a", ""]}',
        b'{"question": "q", "answer": " . "}',
        b'{"question": "q", "answer": "a", "family": 3}',
        b'{"question": "q", "answer": "a", "kind": 3}',
        b'{"question": "q", "answer": "a", "kind": null}',
        b'{"question": "q", "answer": "a", "kind": ["text"]}',
        b'{"question": "q", "answer": "a", "kind": {"text": 1}}',
        b'{"question": "q", "answer": "a", "kind": "song"}',
        b'{"question": "q", "answer": "a", "kind": "os.system"}',
        b'{"question": "q", "answer": "Paris", "kind": "choice"}',
        b'{"question": "q", "answer": ["A", "x", "y"], "kind": "choice"}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    good, path = b'{"question": "q", "answer": "a"}\n', tmp_path / "test.jsonl"
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(UserError, match=r"^[^\n]*test\.jsonl:2: [^\n]+$"):
        load_examples(str(tmp_path), "test")


def test_an_unknown_judge_is_refused_before_the_run():
    for kind in ("no_such_module.my_judge", "judge.no_such_judge", "_judge"):
        with pytest.raises(ValueError, match=f"there is no {kind}.*module.function"):
            read_row({"question": "q", "answer": "a", "kind": kind})


def test_no_such_task(tmp_path):
    with pytest.raises(
        UserError, match=r"--task nowhere: there is no nowhere/test\.jsonl; name tinyworld, tinyworld-hard, or a folder"
    ):
        load_examples("nowhere", "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        load_examples(str(tmp_path), "test")


# --- articles ---------------------------------------------------------------------------------------------------------

ARTICLES = [
    ("Veldoria", "Veldoria is a country. Its capital is Marn."),
    ("Marn", "Marn is the capital of Veldoria. Veldoria, Veldoria, Veldoria."),
    ("Ötztal", "A valley."),
    ("Twin", "same"),
    ("Twin", "same"),
]


def test_search_ranks_the_named_article_first():
    corpus = Corpus.from_articles(ARTICLES)
    assert len(corpus) == len(ARTICLES)
    assert corpus.search("What is the capital of Veldoria?") == [ARTICLES[0]]
    assert [title for title, _ in corpus.search("veldoria", k=5)] == ["Veldoria", "Marn"]
    assert corpus.search("otztal")[0][0] == "Ötztal"
    assert corpus.search("the")[0][0] == "Marn"  # nothing but stop words


def test_search_is_deterministic():
    twins = [(f"Twin {i}", "equal text") for i in range(20)]
    assert all(Corpus.from_articles(twins).search("twin", k=20) == twins for _ in range(3))


LEGAL = [
    "",
    '"',
    '""',
    "'",
    "*",
    "^",
    "-",
    "a*",
    "NEAR(a b, 2)",
    "title:",
    "title : x",
    "a AND",
    "OR",
    "NOT",
    "(",
    "((",
    "a_b _",
    "²",
    "\0",
    "\ud800",
    "☃",
    "x' OR 1=1; --",
    "{title text}: x",
    "a+b",
    " ".join(map(str, range(5000))),
    "q" * 100_000,
]


@pytest.mark.parametrize("query", LEGAL)
def test_any_text_is_a_legal_query(query):
    assert Corpus.from_articles([("Nothing", "zzz")]).search(query) == []


def test_search_is_fast():
    text = "City {0} is the capital of country {1}. " * 10
    corpus = Corpus.from_articles((f"City {i}", text.format(i, i % 7)) for i in range(300))
    start = time.process_time()
    for i in range(1000):
        assert corpus.search(f"capital of country City {i % 300}")
    assert time.process_time() - start < 2


def test_corpus_from_another_thread():
    corpus, found = Corpus.from_articles(ARTICLES), []
    thread = threading.Thread(target=lambda: found.extend(corpus.search("Marn")))
    thread.start()
    thread.join()
    assert found == [ARTICLES[1]]


def test_the_corpus_of_a_folder_is_read_only(tmp_path):
    folder = tmp_path / "a task?#%"
    folder.mkdir()
    Corpus.from_articles(ARTICLES, str(folder / "corpus.db")).connection.close()
    corpora = [load_corpus(str(folder)) for _ in range(2)]  # any number of runs
    assert [corpus.search("Marn") for corpus in corpora] == [[ARTICLES[1]]] * 2
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        corpora[0].connection.execute("DELETE FROM articles")
    assert os.listdir(folder) == ["corpus.db"]


def test_a_corpus_that_cannot_be_searched(tmp_path):
    path = tmp_path / "corpus.db"
    message = (
        rf"Search needs {path} \(.+\): make it by `python tasks\.py index articles\.jsonl {path}`, or leave Search"
    )
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path))
    assert load_corpus(str(tmp_path), needed=False) is None and not path.exists()
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE other (x)").connection.close()
    for wrong in ("not a database " * 100).encode(), b"", (tmp_path / "other.db").read_bytes():
        path.write_bytes(wrong)
        for needed in (True, False):  # a broken one is a mistake either way
            with pytest.raises(UserError, match=message):
                load_corpus(str(tmp_path), needed)


# --- python tasks.py index --------------------------------------------------------------------------------------------


def write_articles(path: Path) -> Path:
    path.write_text("".join(json.dumps({"title": title, "text": text, "id": 7}) + "\n" for title, text in ARTICLES))
    return path


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, tasks.__file__, *map(str, arguments)], capture_output=True, text=True)


def test_the_index_command(tmp_path):
    source = write_articles(tmp_path / "articles.jsonl")
    done = command("index", source, tmp_path / "corpus.db")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{tmp_path}/corpus.db: 5 articles\n"
    assert load_corpus(str(tmp_path)).search("Veldoria") == [ARTICLES[0]]
    assert command().returncode == 2 and "--help says more" in command("indx", "a", "b").stderr


def test_index_refuses_in_one_line(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    for source, target in ((bad, "corpus.db"), (tmp_path / "none.jsonl", "corpus.db"), (bad, "no_folder/corpus.db")):
        done = command("index", source, tmp_path / target)
        assert done.returncode == 2 and done.stderr.startswith("tasks.py: ") and len(done.stderr.splitlines()) == 1
        assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"3",
        b'{"title": "x"}',
        b'{"title": "x", "text": 3}',
        b"\xff",
        b'{"title": null, "text": "x"}',
        b'{"title": "\\ud800", "text": "x"}',
        b"[" * 100_000,
    ],
)
def test_index_names_the_malformed_line(tmp_path, line):
    good, source = b'{"title": "a", "text": "b"}\n', tmp_path / "articles.jsonl"
    source.write_bytes(good * 15 + b"\n" + line + b"\n" + good)
    with pytest.raises(UserError, match=rf"^{source}:17: [^\n]+$"):
        index(source, tmp_path / "corpus.db")
    assert os.listdir(tmp_path) == ["articles.jsonl"]


def test_index_replaces_a_corpus_only_by_a_whole_one(tmp_path):
    Corpus.from_articles(ARTICLES[:1], str(tmp_path / "corpus.db")).connection.close()
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError):
        index(tmp_path / "bad.jsonl", tmp_path / "corpus.db")
    assert len(load_corpus(str(tmp_path))) == 1
    assert index(write_articles(tmp_path / "articles.jsonl"), tmp_path / "corpus.db") == 5
    assert len(load_corpus(str(tmp_path))) == 5
    assert set(os.listdir(tmp_path)) == {"corpus.db", "bad.jsonl", "articles.jsonl"}


def test_index_never_overwrites_its_own_input(tmp_path):
    source = write_articles(tmp_path / "articles.jsonl")
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    for target in (source, tmp_path / "link"):
        with pytest.raises(UserError, match="is the file of articles itself"):
            index(source, target)
    assert source.read_bytes() == before and len(os.listdir(tmp_path)) == 2
