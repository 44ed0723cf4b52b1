"""Benchmark files in the shapes of their publishers, and the fetching of the paper's data from a server here."""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import hf_hub_download

from judge import RULES
from lab import prepare
from lab.prepare import read_file, read_row
from tasks import Example, load_examples
from tools import UserError, find

ROOT = Path(__file__).parents[2]
INSTRUCTION = (
    "When ready, output the final answer enclosed in <answer> and </answer> tags. "
    "Do not generate any content after the </answer> tag."
)


def reward(example: Example, prediction: str) -> float:
    return find(example.kind, RULES)(example.question, example.answer, prediction)


# --- rows -------------------------------------------------------------------------------------------------------------

LETTERED = Example("Which?\nA) red\nB) blue", ["B", "blue"], kind="choice")
SHAPES = [  # as published benchmarks write their rows
    ({"query": "Who?", "image": None, "answer": "Ann", "pid": 0}, Example("Who?", "Ann")),
    (
        {"idx": 0, "question": f"Find $m+n$.{INSTRUCTION}", "query": f"Find $m+n$.{INSTRUCTION}", "answer": 33},
        Example("Find $m+n$.", "33", kind="math"),
    ),
    ({"question": "How much?", "answer": 0.5}, Example("How much?", "0.5", kind="math")),
    ({"question": "How many?", "answer": [2, "two"]}, Example("How many?", ["2", "two"])),
    ({"query": f"Who?{INSTRUCTION}", "answer": ["james madison"]}, Example("Who?", "james madison")),
    ({"query": "Who?", "answer": "['Ann', 'Ann B.']"}, Example("Who?", ["Ann", "Ann B."])),
    ({"query": "Where?", "answer": "[0, 1)"}, Example("Where?", "[0, 1)")),
    ({"query": "Where?", "answer": "[0, 1]"}, Example("Where?", "[0, 1]")),  # not one of two numbers
    ({"query": "Where?", "answer": "x", "kind": "math", "family": "sets"}, Example("Where?", "x", "sets", "math")),
    (
        {"question": [1, 1, 1, 8], "query": "Make 24 of 1, 1, 1, 8.", "answer": ["(1+1+1)×8"]},
        Example("Make 24 of 1, 1, 1, 8.", "(1+1+1)×8", kind="game24"),
    ),
    (
        {"question": [3, 3, 8, 8], "query": "Make 24 of 3, 3, 8, 8.", "answer": ["8/(3-8/3)", "8 / (3 - (8 / 3))"]},
        Example("Make 24 of 3, 3, 8, 8.", ["8/(3-8/3)", "8 / (3 - (8 / 3))"], kind="game24"),
    ),
    (
        {"question": "Make 24 of 1, 1, 1 and 8.", "answer": "8*(1+1+1)", "kind": "game24"},
        Example("Make 24 of 1, 1, 1 and 8.", "8*(1+1+1)", kind="game24"),
    ),
    ({"question": "Which?", "options": ["red", "blue"], "answer": "B"}, LETTERED),
    ({"question": "Which?", "options": ["red", "blue"], "answer": ["B", "blue"]}, LETTERED),
    ({"question": "Which?", "options": ["red", "blue"], "answer": "B. blue"}, LETTERED),
    ({"question": "Which?", "options": ["A. red", "B. blue"], "answer": "(B)"}, LETTERED),
    ({"question": "Which?", "choices": ["A. red\n\n", "B.  blue\n"], "answer": "B. blue\n"}, LETTERED),
    ({"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "blue"}, LETTERED),
    ({"question": "Which?", "options": "['red', 'blue']", "answer": "B"}, LETTERED),
    ({"question": "Which?", "options": "['A. red', 'B. blue']", "answer": "B) blue"}, LETTERED),
    ({"question": "Which?", "choices": "A) red\nB) blue", "answer": "B."}, LETTERED),
    ({"question": "Which?", "choices": "Choices:\n(A) red\n\n(B) blue\n", "answer": "(B) blue"}, LETTERED),
    ({"question": "Which?", "choices": "red\nblue\n", "answer": "blue"}, LETTERED),
    ({"question": "Which?\nA) red\nB) blue", "options": ["red", "blue"], "answer": "B"}, LETTERED),
    ({"question": "Which?\nA) red\nB) blue", "answer": ["B", "blue"], "kind": "choice"}, LETTERED),  # plain already
    (  # the options stand in the question, but not as options
        {"question": "How many of 1 and 2?", "options": ["2", "1"], "answer": "A"},
        Example("How many of 1 and 2?\nA) 2\nB) 1", ["A", "2"], kind="choice"),
    ),
    (  # an option of two lines
        {"question": "Which?", "options": "A. x is 1,\ny is 2\nB. neither", "answer": "B"},
        Example("Which?\nA) x is 1,\ny is 2\nB) neither", ["B", "neither"], kind="choice"),
    ),
    (  # a first letter that is no mark
        {"question": "Which?", "options": "E. coli\nB. subtilis\nyeast", "answer": "yeast"},
        Example("Which?\nA) E. coli\nB) B. subtilis\nC) yeast", ["C", "yeast"], kind="choice"),
    ),
    (  # two options with the same content
        {"question": "Which?", "options": ["red", "red", "blue"], "answer": "red"},
        Example("Which?\nA) red\nB) red\nC) blue", ["A", "red"], kind="choice"),
    ),
    ({"question": "Who?", "choices": None, "answer": "Ann"}, Example("Who?", "Ann")),
    ({"question": "Who?", "options": [], "answer": "Ann"}, Example("Who?", "Ann")),
]


@pytest.mark.parametrize("row, example", SHAPES)
def test_the_shapes_of_benchmarks(tmp_path, row, example):
    assert read_row(row) == example
    for accepted in [example.answer] if isinstance(example.answer, str) else example.answer:
        assert reward(example, accepted) == 1.0
    prepare.write_split(tmp_path / "test.jsonl", [example])
    assert load_examples(str(tmp_path), "test") == [example]
    assert read_file(tmp_path / "test.jsonl") == [example]


def gpqa_row(right: int, contents: list[str]) -> dict:
    """As the authors of AgentFlow publish GPQA: every option has its letter, and so has the answer."""
    choices = [f"{letter}. {content}" for letter, content in zip("ABCD", contents)]
    question = "What is the ratio of their masses, A/B?"
    query = "\n".join([question, "Choices:", *choices])
    return dict(pid="0", question=question, choices=choices, answer_idx=right, answer=choices[right], query=query)


@pytest.mark.parametrize(
    "contents",
    [
        ["0.9", "0.7", "0.1", "0.3"],
        ["- (15/16)E", "-(7/16) E", "-(63/64) E", "(63/128) E"],
        ["A = 1, B = 2", " A = 2, B = 1", "A. = 1", "B"],
        [r"\frac{q}{4\pi}", r"\frac{q}{2\pi}" + "\n\n", "2n^{-N} ", "4>3>2"],
        ["C", "D", "A", "B"],
    ],
)
def test_every_option_of_the_authors_gpqa(contents):
    for right in range(4):
        row = gpqa_row(right, contents)
        example = read_row(row)
        assert example == Example(row["query"].strip(), ["ABCD"[right], contents[right].strip()], kind="choice")
        for index, option in enumerate(row["choices"]):
            assert reward(example, option) == float(index == right)
            assert reward(example, "ABCD"[index]) == float(index == right)


@pytest.mark.parametrize(
    "row, message",
    [
        (["Who?", "Ann"], "not list"),
        ({"query": "", "answer": "Ann"}, "the question must be a text"),
        ({"question": INSTRUCTION, "answer": "Ann"}, "the question must be a text"),
        ({"question": 5, "answer": "Ann"}, "the question must be a text"),
        ({"question": "Who?"}, "not NoneType"),
        ({"question": "Who?", "answer": True}, "not bool"),
        ({"question": "Who?", "answer": {"a": 1}}, "not dict"),
        ({"question": "Who?", "answer": []}, "the answer must be"),
        ({"question": "Who?", "answer": ["Ann", ""]}, "none of them empty"),
        ({"question": "Who?", "answer": "Ann", "family": 3}, "family and kind must be texts"),
        ({"question": "Who?", "answer": "Ann", "kind": ["text"]}, "family and kind must be texts"),
        ({"question": "Who?", "answer": "Ann", "kind": "song"}, "the kind must be one of"),
        ({"question": "\ud800", "answer": "Ann"}, "surrogates not allowed"),
        ({"question": "Which?", "answer": "Paris", "kind": "choice"}, r"must be \[letter, content\]"),
        ({"question": "Which?", "answer": "C", "options": ["x", "y"]}, "must name one of the options"),
        ({"question": "Which?", "answer": "B. x", "options": ["x", "y"]}, "must name one of the options"),
        ({"question": "Which?", "answer": ["A", "B"], "options": ["x", "y"]}, "must name one of the options"),
        ({"question": "Which?", "answer": ["A", "y"], "options": ["x", "y"]}, "must name one of the options"),
        ({"question": "Which?", "answer": "A", "options": ["B", "A"]}, "must name one of the options"),  # which?
        ({"question": "Which?", "answer": "A", "options": ["x"]}, "2 to 26 texts"),
        ({"question": "Which?", "answer": "A", "options": ["x"] * 27}, "2 to 26 texts"),
        ({"question": "Which?", "answer": "A", "options": [1, 2]}, "2 to 26 texts"),
        ({"question": "Which?", "answer": "A", "options": "A. x B. y"}, "2 to 26 texts"),
        ({"question": "Which?", "answer": "A", "options": ["x", ""]}, "no option may be empty"),
        ({"question": "Which?", "answer": "A", "options": ["A. x", "B. "]}, "no option may be empty"),
        ({"question": "Which?", "answer": "B", "options": {"B": "x", "C": "y"}}, "must be A, B, ..., not B, C"),
        ({"question": [1, 2, 3, 4], "answer": ["1*2*3*4"]}, "the question must be a text"),
        ({"question": [1, 2, 3, 4], "query": "24?", "answer": ["1*2*3*5"]}, "does not make 24"),
        ({"question": [1, 2, 3, 4], "query": "24?", "answer": ["1+2+3+4"]}, "does not make 24"),
        ({"question": [1, 2, 3, 4], "query": "24?", "answer": ["2*3*4"]}, "does not make 24"),
        ({"question": [1, 2, 3, 4], "query": "24?", "answer": ["1*2*3*4", "Paris"]}, "'Paris' does not make 24"),
        ({"question": [1, 2, 3, 4], "query": "24?", "answer": "4/(1+2-3)"}, "does not make 24"),
        ({"question": "Using 1 1 1 8 make 24", "answer": "24", "kind": "game24"}, "does not make 24"),
        ({"question": "Using 1 1 1 8 make 24", "answer": "3*8", "kind": "game24"}, "does not make 24"),
        ({"question": "Using 1 1 1 8 make 24", "answer": "Paris", "kind": "game24"}, "'Paris' does not make 24"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path, row, message):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"query": "Who?", "answer": "Ann"}, row], indent=4))
    if row != {"question": "\ud800", "answer": "Ann"}:  # the whole file is refused for that
        with pytest.raises(UserError, match=rf"^{path}, row 2: .*{message}"):
            read_file(path)
    with pytest.raises(ValueError, match=message):
        read_row(row)


def test_files_of_both_forms(tmp_path):
    rows = [{"query": "Who?", "answer": "Ann"}, {"query": "How many?", "answer": 3}]
    expected = [Example("Who?", "Ann"), Example("How many?", "3", kind="math")]
    listed, lines = tmp_path / "listed", tmp_path / "lines.json"
    listed.write_text("\n" + json.dumps(rows, indent=4))
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert read_file(listed) == read_file(lines) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[\n{"query": "Who?", "answer": "Ann"},\n{"query": "Who?"', "bench.json: .*line 3"),
        (b'{"query": "Who?", "answer": "Ann"}\n{"query": "Who?"', "bench.json:2: "),
        (b'{"query": "Who?", "answer": "Ann"}\n\n{"query": "Who?"}', "bench.json:3: the answer must be"),
        (b'[{"query": "\\ud800", "answer": "Ann"}]', "bench.json: .*surrogates"),
        (b'[{"query": "\xff", "answer": "Ann"}]', "bench.json: .*can't decode"),
        (b"[" * 100_000, "bench.json: it is nested too deeply"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "bench.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_file(path)


# --- a server of files ------------------------------------------------------------------------------------------------


class Site(ThreadingHTTPServer):
    """Files by path, with redirects and tokens, and with the headers of the Hugging Face hub."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects, self.gated, self.seen = {}, {}, set(), []
        self.cut = False  # the next file stops halfway
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        site.seen.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        if self.path in site.gated and self.headers["Authorization"] != "Bearer good-token":
            return self.answer(403 if self.headers["Authorization"] else 401, {"X-Error-Code": "GatedRepo"})
        commit = re.search("[0-9a-f]{40}|$", self.path)[0]
        if self.path in site.redirects:
            file = site.files[site.redirects[self.path][1]]
            headers = {"X-Linked-ETag": f'"{checksum(file)}"', "X-Linked-Size": len(file), "X-Repo-Commit": commit}
            return self.answer(302, {"Location": "".join(site.redirects[self.path]), **headers})
        if self.path not in site.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = site.files[self.path]
        headers = {"ETag": f'"{checksum(body)}"', "X-Repo-Commit": commit}
        self.answer(200, headers, body)

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if self.server.cut else body)
            self.server.cut = False

    def log_message(self, *args):
        pass


def checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The site is both publishers: the hub through its own client, and the authors' repository."""
    site = Site()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(prepare, "hf_hub_download", partial(hf_hub_download, endpoint=site.url))
    sources = {}
    for task, files in prepare.SOURCES.items():
        sources[task] = {url.replace("https://raw.githubusercontent.com", site.url): files[url] for url in files}
    monkeypatch.setattr(prepare, "SOURCES", sources)
    yield site
    site.shutdown()
    site.server_close()


def paths_of(task: str) -> list[str]:
    """Where the publishers have the files of a task."""
    paths = []
    for source in prepare.SOURCES[task]:
        if "@" in source:
            repo, revision, name = re.fullmatch("(.+)@([0-9a-f]{40})/(.+)", source).groups()
            paths.append(f"/datasets/{repo}/resolve/{revision}/{name}")
        else:
            paths.append(re.sub("https?://[^/]+", "", source))
    return paths


def publish(site: Site, task: str, *files: bytes, known: bool = True) -> None:
    site.files.update(zip(paths_of(task), files, strict=True))
    sums = [checksum(file) if known else "" for file in files]
    prepare.SOURCES[task] = dict(zip(prepare.SOURCES[task], sums))


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    prepare.main()


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The one line of a command that ends with code 2."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1
    return error


def rows_of(count: int) -> list[dict]:
    return [{"query": f"What is {n} + {n}?{INSTRUCTION}", "answer": [str(2 * n)], "pid": n} for n in range(count)]


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


# --- the paper's data -------------------------------------------------------------------------------------------------


def test_the_table():
    """The mix and the ten benchmarks, all at fixed revisions."""
    assert set(prepare.SOURCES) == {
        *("mix", "bamboogle", "2wiki", "hotpotqa", "musique", "gaia", "aime24", "amc23", "gameof24", "gpqa", "medqa")
    }
    for sources in prepare.SOURCES.values():
        for source, sha256 in sources.items():
            assert re.search(r"[/@][0-9a-f]{40}/", source) and re.fullmatch("([0-9a-f]{64})?", sha256)


def test_a_benchmark_is_fetched_by_name(site, monkeypatch, capsys):
    publish(site, "bamboogle", json.dumps(rows_of(125)).encode())
    run(monkeypatch, "bamboogle")
    assert capsys.readouterr().out == "data/bamboogle/test.jsonl: 125 questions\n"
    examples = load_examples("data/bamboogle", "test")
    assert len(examples) == 125 and examples[3] == Example("What is 3 + 3?", "6")
    run(monkeypatch, "bamboogle", "elsewhere")
    assert load_examples("elsewhere", "test") == examples
    assert not list(Path().rglob("*.partial"))


def test_of_a_long_benchmark_the_first_hundred(site):
    publish(site, "musique", json.dumps(rows_of(200)).encode())
    prepare.prepare("musique", Path("musique"))
    assert [example.answer for example in load_examples("musique", "test")] == [str(2 * n) for n in range(100)]


def test_multiple_choice_and_the_game_of_24(site):
    medqa = {"query": "Which?\nA. x\nB. y\nChoose the correct option.", "options": {"A": "x", "B": "y"}, "answer": "B"}
    publish(site, "medqa", json.dumps([medqa]).encode())
    game24 = {"question": [1, 1, 1, 8], "query": "24?", "answer": ["(1+1+1)×8"]}
    publish(site, "gameof24", json.dumps([game24]).encode())
    for task in ("medqa", "gameof24"):
        prepare.prepare(task, Path(task))
    assert load_examples("medqa", "test") == [Example(medqa["query"], ["B", "y"], kind="choice")]
    assert load_examples("gameof24", "test") == [Example("24?", "(1+1+1)×8", kind="game24")]


GAIA_ROW = {"Question": "Who?", "Final answer": "[1, 2]", "Level": "2", "file_name": "", "task_id": "x"}


def test_gaia_without_the_questions_about_files(site):
    publish(site, "gaia", parquet([GAIA_ROW, {**GAIA_ROW, "file_name": "x.png"}, {**GAIA_ROW, "Question": "Where?"}]))
    prepare.prepare("gaia", Path("gaia"))
    assert load_examples("gaia", "test") == [Example(q, "[1, 2]", "level 2") for q in ("Who?", "Where?")]


def test_gpqa_options_in_an_order_of_their_own(site):
    file = io.StringIO(newline="")
    names = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    writer = csv.DictWriter(file, [*names, "High-level domain"])
    writer.writeheader()
    wrong = ["A", "wrong, 1", 'a "wrong" 2']
    for n in range(20):
        values = [f"Which,\r\nof {n}?", f" right {n}\n" if n else "C", *wrong]
        writer.writerow({**dict(zip(names, values)), "High-level domain": "Physics"})
    publish(site, "gpqa", file.getvalue().encode())
    prepare.prepare("gpqa", Path("gpqa"))
    examples = load_examples("gpqa", "test")
    assert {example.answer[0] for example in examples} == set("ABCD")
    for n, example in enumerate(examples):
        letter, content = example.answer
        assert content == (f"right {n}" if n else "C") and example.family == "Physics" and example.kind == "choice"
        assert example.question.startswith(f"Which,\r\nof {n}?\nA) ") and f"\n{letter}) {content}" in example.question
        assert all(option in example.question for option in wrong)
        assert reward(example, f"({letter})") == 1.0 and reward(example, "wrong, 1") == 0.0


def publish_mix(site: Site) -> None:
    nq = [{"id": f"train_{n}", "question": f"who is {n}", "golden_answers": [f"Ann {n}", f"A. {n}"]} for n in range(80)]
    nq += [{"question": "who is  7", "golden_answers": ["Bob"]}, {"question": "who?", "golden_answers": []}]
    math = [{"prompt": [{"content": f"Find $x_{n}$.", "role": "user"}], "solution": f"$[0, {n}]$"} for n in range(60)]
    nq = "".join(json.dumps(row) + "\n" for row in nq).encode()
    publish(site, "mix", nq, parquet(math[:50]), parquet(math[50:]))


def test_the_training_mix(site, capsys):
    publish_mix(site)
    prepare.prepare("mix", Path("mix"))
    splits = {split: load_examples("mix", split) for split in ("train", "dev", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 96, "dev": 12, "test": 12}
    for examples in splits.values():
        assert sum(example.family == "search" for example in examples) == len(examples) / 2
        assert [example.family for example in examples] != sorted(example.family for example in examples)
    questions = [example.question for examples in splits.values() for example in examples]
    assert len(set(questions)) == len(questions) == 120
    for example in splits["train"]:
        n = re.search(r"\d+", example.question)[0]
        search = Example(f"who is {n}", [f"Ann {n}", f"A. {n}"], "search")
        assert example in (search, Example(f"Find $x_{n}$.", f"[0, {n}]", "math", "math"))
    assert "search: 80 questions; 2 rows repeat one or have no usable answer" in capsys.readouterr().out

    prepare.prepare("mix", Path("again"))
    for path in Path("mix").glob("*.jsonl"):
        assert path.read_bytes() == Path("again", path.name).read_bytes()


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_another_file_than_was_published_is_not_used(site, monkeypatch, capsys):
    for task in ("2wiki", "gaia"):
        file = json.dumps(rows_of(9)).encode() if task == "2wiki" else parquet([GAIA_ROW])
        publish(site, task, file)
        [path] = paths_of(task)
        site.files[path] = file + b" "
        for _ in range(2):
            message = f"arrived damaged (sha256 {checksum(file + b' ')}, not {checksum(file)}): give the command again"
            assert message in refused(monkeypatch, capsys, task)
            assert not [
                path for path in Path("data", task).rglob("*.*") if path.suffix in (".json", ".jsonl", ".parquet")
            ]
        site.files[path] = file
        run(monkeypatch, task)


def test_a_download_from_the_hub_that_stops_goes_on(site):
    publish_mix(site)
    site.cut = True
    prepare.prepare("mix", Path("mix"))
    nq = paths_of("mix")[0]
    assert [(command, path) for command, path, _ in site.seen].count(("GET", nq)) == 2
    assert Path("mix/downloads/nq/train.jsonl").read_bytes() == site.files[nq]
    site.seen.clear()
    prepare.prepare("mix", Path("mix"))
    assert not site.seen  # it is there


def test_a_gated_set_needs_the_token_and_no_one_else_gets_it(site, monkeypatch, capsys):
    publish(site, "gaia", parquet([GAIA_ROW]))
    [path] = paths_of("gaia")
    site.gated.add(path)
    advice = "accept the terms on https://huggingface.co/datasets/gaia-benchmark/GAIA, then set HF_TOKEN\n"
    assert refused(monkeypatch, capsys, "gaia").endswith(advice)
    monkeypatch.setenv("HF_TOKEN", "bad-token")
    assert refused(monkeypatch, capsys, "gaia").endswith(advice)
    monkeypatch.setenv("HF_TOKEN", "good-token")
    site.redirects[path] = (f"http://localhost:{site.server_port}", "/storage")  # another host, as the hub's storage is
    site.files["/storage"] = site.files.pop(path)
    run(monkeypatch, "gaia")
    assert len(load_examples("data/gaia", "test")) == 1
    assert [path for _, path, _ in site.seen][-1] == "/storage"
    assert not any("authorization" in headers for _, path, headers in site.seen if path == "/storage")
    assert not any(b"good-token" in file.read_bytes() for file in Path("data").rglob("*") if file.is_file())


def test_servers_that_do_not_answer(site, monkeypatch, capsys):
    assert "404" in refused(monkeypatch, capsys, "medqa")
    assert "404" in refused(monkeypatch, capsys, "gpqa")
    prepare.SOURCES["medqa"] = {"http://127.0.0.1:1/data.json": ""}
    assert "127.0.0.1" in refused(monkeypatch, capsys, "medqa")
    Path("taken").write_text("")
    publish(site, "amc23", json.dumps(rows_of(9)).encode())
    assert "taken" in refused(monkeypatch, capsys, "amc23", "taken")
    publish(site, "amc23", b"<html>Sign in</html>", known=False)
    assert "data/amc23/downloads/data.json:1: " in refused(monkeypatch, capsys, "amc23")
    publish(site, "amc23", json.dumps(rows_of(9)).encode(), known=False)
    run(monkeypatch, "amc23")


def test_an_error_of_the_hubs_client_is_one_line(site, monkeypatch, capsys):
    def fail(*args, **options):
        raise prepare.HTTPError("timed out\n\nTry later.")

    monkeypatch.setattr(prepare, "hf_hub_download", fail)
    assert "gpqa_diamond.csv: timed out Try later.\n" in refused(monkeypatch, capsys, "gpqa")


@pytest.mark.parametrize(
    "task, files",
    [
        ("gaia", [b"PAR1 and no more"]),
        ("gaia", [parquet([{"question": "Who?"}])]),
        ("gaia", [parquet([{**GAIA_ROW, "Final answer": ""}])]),
        ("gpqa", [b"Question,Answer\nWho?,Ann\n"]),
        ("gpqa", [b"Question,Correct Answer\nWho?\n"]),
        ("gpqa", [b"\xff"]),
        ("mix", [b"[1]\n", parquet([]), parquet([])]),
    ],
)
def test_published_files_of_another_shape(site, monkeypatch, capsys, task, files):
    publish(site, task, *files)
    assert f"{task} has an unknown shape (" in refused(monkeypatch, capsys, task)
    assert not list(Path("data", task).glob("*.jsonl"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_mirror_of_the_environment(site):
    names = ["Question", "Correct Answer", "High-level domain", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    publish(site, "gpqa", f"{','.join(names)}\nWhich?,a,Physics,b,c,d\n".encode(), known=False)
    environment = {**os.environ, "HF_ENDPOINT": site.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "lab.prepare", "gpqa", Path("gpqa").resolve()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "gpqa/test.jsonl: 1 questions" in done.stdout
    fetched = [(command, path) for command, path, _ in site.seen if path.startswith("/datasets")]
    [path] = paths_of("gpqa")
    assert fetched == [("HEAD", path), ("GET", path)]


def test_a_file_of_your_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bench.json").write_text(json.dumps([{"query": "Où?", "answer": "Là"}, gpqa_row(1, ["x", "y", "z", "w"])]))
    run(monkeypatch, "bench.json", "mine")
    run(monkeypatch, "bench.json", "mine", "--split", "train")
    assert capsys.readouterr().out == "mine/test.jsonl: 2 questions\nmine/train.jsonl: 2 questions\n"
    examples = load_examples("mine", "test")
    assert examples == load_examples("mine", "train") and examples[0] == Example("Où?", "Là")
    rows = [json.loads(line) for line in Path("mine/test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {
        "question": examples[1].question,
        "answer": ["B", "y"],
        "family": "all",
        "kind": "choice",
    }

    assert "mine/test.jsonl is the published file itself" in refused(monkeypatch, capsys, "mine/test.jsonl", "mine")
    assert "there is no nowhere: name one of mix, gaia, " in refused(monkeypatch, capsys, "nowhere")
    assert "and a folder" in refused(monkeypatch, capsys, "bench.json")
    Path("bench.json").write_text(json.dumps([{"query": "Where?", "answer": ""}]))
    assert "bench.json, row 1: the answer" in refused(monkeypatch, capsys, "bench.json", "mine")
    for nothing in ("[]", "\n"):
        Path("bench.json").write_text(nothing)
        assert "mine/test.jsonl would be empty" in refused(monkeypatch, capsys, "bench.json", "mine")
    assert "there is no mine: name one of" in refused(monkeypatch, capsys, "mine", "other")
    Path("bench.json").write_text(json.dumps([{"query": "Where?", "answer": "There"}]))
    assert "Errno" in refused(monkeypatch, capsys, "bench.json", "bench.json")
    Path("mine/train.jsonl").unlink()
    Path("mine/train.jsonl").mkdir()
    assert "Is a directory" in refused(monkeypatch, capsys, "bench.json", "mine", "--split", "train")
    assert load_examples("mine", "test") == examples
