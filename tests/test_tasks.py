"""Readers of questions and the fetching of the paper's data: what is accepted, and one clear line for what is not."""

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest

import tasks
from judge import RULES
from llm import UserError
from tasks import PREPARED, Example, load_corpus, load_examples, plain_row, prepare, read_row


def test_the_bundled_task():
    assert [len(load_examples("tinyworld", split)) for split in ("train", "dev", "test")] == [4000, 200, 500]
    assert load_corpus().search("Zilath")[0][0] == "Zilath"


def test_a_folder_of_jsonl(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "Who?", "answer": ["A", "B"], "family": "who"}]
    (tmp_path / "dev.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    expected = [Example("1 + 1?", "2"), Example("Who?", ["A", "B"], "who")]
    assert load_examples(str(tmp_path), "dev") == load_examples(str(tmp_path / "dev.jsonl"), "test") == expected
    with pytest.raises(UserError, match="train.jsonl is not there"):
        load_examples(str(tmp_path), "train")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '"text"',
        "{}",
        '{"question": "q"}',
        '{"question": "", "answer": "a"}',
        '{"question": 5, "answer": "a"}',
        '{"question": "q", "answer": true}',
        '{"question": "q", "answer": null}',
        '{"question": "q", "answer": {"a": 1}}',
        '{"question": "q", "answer": "a", "kind": "song"}',
        '{"question": "q", "answer": "Paris", "kind": "choice"}',
        '{"question": "q", "answer": "C", "options": ["x", "y"]}',
        '{"question": "q", "answer": ["A", "B"], "options": ["x", "y"]}',
        '{"question": "q", "answer": ["A", "y"], "options": ["x", "y"]}',
        '{"question": "q", "answer": "A", "options": ["x"]}',
        '{"question": "q", "answer": "A", "options": ["x", ""]}',
        '{"question": [1, 2, 3, 4], "query": "24?", "answer": ["1*2*3*5"]}',
        '{"question": [1, 2, 3, 4], "answer": ["1*2*3*4"]}',
        '{"question": "q", "answer": []}',
        '{"question": "q", "answer": ["a", ""]}',
        '{"question": "q", "answer": " . "}',
        '{"question": "q", "answer": "a", "family": 3}',
        '{"question": "q", "answer": "a"',
        b'{"question": "\xff", "answer": "a"}',
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"question": "q", "answer": "a"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    )
    with pytest.raises(UserError, match=r"bad\.jsonl:2: "):
        load_examples(str(path), "test")


def test_no_such_task_or_corpus(tmp_path):
    with pytest.raises(UserError, match="no task nowhere"):
        load_examples("nowhere", "test")
    with pytest.raises(UserError, match="python tools.py index"):
        load_corpus(str(tmp_path / "none.db"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        load_examples(str(tmp_path / "empty.jsonl"), "test")


INSTRUCTION = (
    "When ready, output the final answer enclosed in <answer> and </answer> tags. "
    "Do not generate any content after the </answer> tag."
)
LETTERED = Example("Which?\nA) red\nB) blue", ["B", "blue"], kind="choice", choices=("red", "blue"))
SHAPES = [  # as published benchmarks write their rows
    ({"query": "Who?", "image": None, "answer": "Ann", "pid": 0}, Example("Who?", "Ann")),
    (
        {"idx": 0, "question": f"Find $m+n$.{INSTRUCTION}", "query": f"Find $m+n$.{INSTRUCTION}", "answer": 33},
        Example("Find $m+n$.", "33", kind="math"),
    ),
    ({"question": "How much?", "answer": 0.5}, Example("How much?", "0.5", kind="math")),
    ({"query": f"Who?{INSTRUCTION}", "answer": ["james madison"]}, Example("Who?", "james madison")),
    ({"query": "Who?", "answer": "['Ann', 'Ann B.']"}, Example("Who?", ["Ann", "Ann B."])),
    ({"query": "Where?", "answer": "[0, 1)"}, Example("Where?", "[0, 1)")),
    ({"query": "Where?", "answer": "[0, 1]"}, Example("Where?", "[0, 1]")),  # not one of two numbers
    ({"query": "Where?", "answer": "x", "kind": "math"}, Example("Where?", "x", kind="math")),
    (
        {"question": [1, 1, 1, 8], "query": "Make 24.", "answer": ["(1+1+1)×8"]},
        Example("Make 24.", "(1+1+1)×8", kind="game24"),
    ),
    ({"question": "Which?", "options": ["red", "blue"], "answer": "B"}, LETTERED),
    ({"question": "Which?", "options": ["red", "blue"], "answer": ["B", "blue"]}, LETTERED),
    ({"question": "Which?", "options": ["A. red", "B. blue"], "answer": "(B)"}, LETTERED),
    ({"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "blue"}, LETTERED),
    ({"question": "Which?", "options": "['red', 'blue']", "answer": "B"}, LETTERED),
    ({"question": "Which?", "choices": "A) red\nB) blue", "answer": "B."}, LETTERED),
    ({"question": "Which?\nA) red\nB) blue", "options": ["red", "blue"], "answer": "B"}, LETTERED),
    (  # the options stand in the question, but not as options
        {"question": "How many of 1 and 2?", "options": ["2", "1"], "answer": "A"},
        Example("How many of 1 and 2?\nA) 2\nB) 1", ["A", "2"], kind="choice", choices=("2", "1")),
    ),
]


@pytest.mark.parametrize("row, example", SHAPES)
def test_the_shapes_of_benchmarks(tmp_path, row, example):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([row, row], indent=4))
    assert load_examples(str(path), "test") == [example, example]
    accepted = example.answer if isinstance(example.answer, str) else example.answer[-1]
    assert RULES[example.kind](example.question, example.answer, accepted) == 1.0
    assert read_row(json.loads(json.dumps(plain_row(example)))) == example


def test_a_damaged_row_of_a_list_is_named(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"query": "Who?", "answer": "Ann"}] * 6 + [{"query": "Who?", "answer": ""}]))
    with pytest.raises(UserError, match=r"bench\.json, row 7: the answer must be"):
        load_examples(str(path), "test")
    path.write_text('[\n{"query": "Who?", "answer": "Ann"},\n{"query": "Who?"')
    with pytest.raises(UserError, match=r"bench\.json:3: not JSON"):
        load_examples(str(path), "test")


# --- python tasks.py prepare NAME -------------------------------------------------------------------------------------


class Site(ThreadingHTTPServer):
    """A server of files that knows ranges, redirects and tokens, as the publishers' do."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects, self.gated, self.seen = {}, {}, set(), []
        self.cut = self.without_ranges = False  # send half a body; ignore ranges
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        site.seen.append((self.path, dict(self.headers)))
        if self.path in site.gated and self.headers["Authorization"] != "Bearer good-token":
            return self.answer(403 if self.headers["Authorization"] else 401)
        if self.path in site.redirects:
            return self.answer(302, {"Location": site.redirects[self.path]})
        if self.path not in site.files:
            return self.answer(404)
        body, ranged = site.files[self.path], re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if not ranged or site.without_ranges:
            return self.answer(200, {}, body)
        start = int(ranged[1])
        if start >= len(body):
            return self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
        self.answer(206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, body[start:])

    def answer(self, status, headers=None, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.server.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "PREPARED", dict(PREPARED))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    site = Site()
    yield site
    site.shutdown()
    site.server_close()


def publish(site, name, *files, pinned=True):
    """Put files under the paths that the publishers have them at, and their checksums into the table."""
    for url, file in zip(PREPARED[name], files, strict=True):
        site.files[urlsplit(url).path] = file
    sums = [hashlib.sha256(file).hexdigest() if pinned else "" for file in files]
    tasks.PREPARED[name] = dict(zip(PREPARED[name], sums))


def rows_of(count):
    return [{"query": f"What is {n} + {n}?{INSTRUCTION}", "answer": [str(2 * n)], "pid": n} for n in range(count)]


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def test_the_table():
    """The mix and the ten benchmarks, all at fixed revisions."""
    assert set(PREPARED) == {
        *("mix", "bamboogle", "2wiki", "hotpotqa", "musique", "gaia", "aime24", "amc23", "gameof24", "gpqa", "medqa")
    }
    for sources in PREPARED.values():
        for url, sha256 in sources.items():
            assert re.match(r"https://\S+/[0-9a-f]{40}/\S+$", url) and re.fullmatch("([0-9a-f]{64})?", sha256)
        assert len({Path(url).name for url in sources}) == len(sources)


def test_a_benchmark_is_fetched_once_and_found_by_name(site, capsys):
    publish(site, "bamboogle", json.dumps(rows_of(125)).encode())
    with pytest.raises(UserError, match="bamboogle is not prepared: python tasks.py prepare bamboogle"):
        load_examples("bamboogle", "test")
    prepare("bamboogle", mirror=site.url + "/")
    examples = load_examples("bamboogle", "test")
    assert len(examples) == 125 and examples[3] == Example("What is 3 + 3?", "6")
    assert "data/bamboogle/test.jsonl: 125 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="data/bamboogle/train.jsonl is not there: bamboogle has test"):
        load_examples("bamboogle", "train")
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd="data/bamboogle/downloads").returncode == 0
    prepare("bamboogle", mirror=site.url)
    assert len(site.seen) == 1


def test_of_a_long_benchmark_the_first_hundred(site):
    publish(site, "musique", json.dumps(rows_of(200)).encode())
    prepare("musique", mirror=site.url)
    assert [example.answer for example in load_examples("musique", "test")] == [str(2 * n) for n in range(100)]


def test_multiple_choice_and_the_game_of_24(site):
    medqa = {"query": "Which?\nA. x\nB. y\nChoose the correct option.", "options": {"A": "x", "B": "y"}, "answer": "B"}
    publish(site, "medqa", json.dumps([medqa]).encode())
    publish(
        site, "gameof24", json.dumps([{"question": [1, 1, 1, 8], "query": "24?", "answer": ["(1+1+1)×8"]}]).encode()
    )
    prepare("medqa", mirror=site.url)
    prepare("gameof24", mirror=site.url)
    assert load_examples("medqa", "test") == [Example(medqa["query"], ["B", "y"], kind="choice", choices=("x", "y"))]
    assert load_examples("gameof24", "test") == [Example("24?", "(1+1+1)×8", kind="game24")]


def test_gaia_without_the_questions_about_files(site, monkeypatch):
    row = {"Question": "Who?", "Final answer": "[1, 2]", "Level": "2", "file_name": "", "task_id": "x"}
    publish(site, "gaia", parquet([row, {**row, "file_name": "x.png"}, {**row, "Question": "How many?"}]))
    prepare("gaia", mirror=site.url)
    assert load_examples("gaia", "test") == [Example(q, "[1, 2]", "level 2") for q in ("Who?", "How many?")]


def test_gpqa_options_in_an_order_of_their_own(site):
    file = io.StringIO(newline="")
    names = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    writer = csv.DictWriter(file, [*names, "High-level domain"])
    writer.writeheader()
    for n in range(20):
        values = [f"Which,\r\nof {n}?", f" right {n}\n", "wrong, 1", 'a "wrong" 2', "wrong 3"]
        writer.writerow({**dict(zip(names, values)), "High-level domain": "Physics"})
    publish(site, "gpqa", file.getvalue().encode())
    prepare("gpqa", mirror=site.url)
    examples = load_examples("gpqa", "test")
    assert {example.answer[0] for example in examples} == set("ABCD")
    for n, example in enumerate(examples):
        assert example.answer[1] == f"right {n}" and example.family == "Physics" and len(set(example.choices)) == 4
        assert example.question.startswith(f"Which,\r\nof {n}?\nA) {example.choices[0]}\nB) ")
        assert RULES[example.kind](example.question, example.answer, f"({example.answer[0]})") == 1.0


def publish_mix(site, questions=60, pinned=True):
    nq = [{"id": f"train_{n}", "question": f"who is {n}", "golden_answers": [f"Ann {n}", f"A. {n}"]} for n in range(80)]
    nq += [{"question": "who is  7", "golden_answers": ["Bob"]}, {"question": "who?", "golden_answers": []}]
    math = [
        {"prompt": [{"content": f"Find $x_{n}$.", "role": "user"}], "solution": f"$[0, {n}]$"} for n in range(questions)
    ]
    nq = "".join(json.dumps(row) + "\n" for row in nq).encode()
    publish(site, "mix", nq, parquet(math[:50]), parquet(math[50:]), pinned=pinned)


def test_the_training_mix(site, capsys):
    publish_mix(site)
    prepare("mix", mirror=site.url)
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
    assert "NQ: 80 questions; 2 rows repeat one or have no usable answer" in capsys.readouterr().out

    first = {path.name: path.read_bytes() for path in Path("data/mix").glob("*.jsonl")}
    prepare("mix", Path("again"), mirror=site.url)
    assert first == {path.name: path.read_bytes() for path in Path("again/mix").glob("*.jsonl")}


def test_a_download_that_stops_is_continued(site):
    file = json.dumps(rows_of(3000)).encode()
    publish(site, "hotpotqa", file)
    site.cut = True
    with pytest.raises(UserError, match=r"data\.json: stopped by \w+; the same command continues the download"):
        prepare("hotpotqa", mirror=site.url)
    part = Path("data/hotpotqa/downloads/data.json.part")
    size = part.stat().st_size
    assert len(file) / 3 < size <= len(file) / 2 and file.startswith(part.read_bytes())
    site.cut = False
    prepare("hotpotqa", mirror=site.url)
    assert site.seen[1][1]["Range"] == f"bytes={size}-" and len(site.seen) == 2
    assert part.with_suffix("").read_bytes() == file and not part.exists()


@pytest.mark.parametrize("kept", ["half", "whole", "more"])
@pytest.mark.parametrize("without_ranges", [True, False])
def test_whatever_is_left_of_a_download_the_file_gets_whole(site, kept, without_ranges):
    file = json.dumps(rows_of(9)).encode()
    publish(site, "amc23", file, pinned=False)
    site.without_ranges = without_ranges
    part = Path("data/amc23/downloads/data.json.part")
    part.parent.mkdir(parents=True)
    part.write_bytes({"half": file[:100], "whole": file, "more": file + b"more"}[kept])
    prepare("amc23", mirror=site.url)
    assert Path("data/amc23/downloads/data.json").read_bytes() == file


@pytest.mark.parametrize("pinned", [True, False])
def test_a_damaged_download_is_named_and_fetched_again(site, pinned):
    publish(site, "2wiki", json.dumps(rows_of(9)).encode(), pinned=pinned)
    prepare("2wiki", mirror=site.url)
    file = Path("data/2wiki/downloads/data.json")
    file.write_bytes(file.read_bytes().replace(b"What", b"Wait"))
    with pytest.raises(UserError, match=r"^data/2wiki/downloads/data\.json is damaged \(sha256 \w+, not \w+\)[^\n]*$"):
        prepare("2wiki", mirror=site.url)
    prepare("2wiki", mirror=site.url)
    assert b"What" in file.read_bytes()


def test_a_list_of_checksums_that_was_cut_is_made_again(site):
    publish(site, "2wiki", json.dumps(rows_of(9)).encode(), pinned=False)
    prepare("2wiki", mirror=site.url)
    sums = Path("data/2wiki/downloads/SHA256SUMS")
    whole = sums.read_text()
    for cut in ("", whole[:20], whole[:64], whole[:66]):
        sums.write_text(cut)
        prepare("2wiki", mirror=site.url)
        assert sums.read_text() == whole


def test_another_file_than_was_published_is_not_used(site):
    publish(site, "2wiki", json.dumps(rows_of(9)).encode())
    path = urlsplit(next(iter(PREPARED["2wiki"]))).path
    site.files[path] = json.dumps(rows_of(10)).encode()
    for _ in range(2):
        with pytest.raises(UserError, match=r"data\.json is damaged"):
            prepare("2wiki", mirror=site.url)
    assert not list(Path("data/2wiki").rglob("*.json*"))


@pytest.mark.parametrize("name, files", [("amc23", 1), ("mix", 3), ("gaia", 1), ("gpqa", 1)])
@pytest.mark.parametrize("body", [b"<html>Sign in</html>", b"", parquet([{"other": 1}]), b'{"other": 1}'])
def test_an_unexpected_file_is_named_and_its_checksum_is_not_kept(site, name, files, body):
    publish(site, name, *[body] * files, pinned=False)
    with pytest.raises(UserError, match=rf"^data/{name}/downloads.*; remove data/{name}/downloads to fetch it again$"):
        prepare(name, mirror=site.url)
    assert not list(Path("data").rglob("SHA256SUMS")) and not list(Path("data").rglob("test.jsonl"))
    with pytest.raises(UserError, match="is not prepared"):
        load_examples(name, "test")


def test_a_gated_set_needs_the_token_and_no_one_else_gets_it(site, monkeypatch):
    row = {"Question": "Who?", "Final answer": "Ann", "Level": "1", "file_name": ""}
    publish(site, "gaia", parquet([row]))
    path = urlsplit(next(iter(PREPARED["gaia"]))).path
    site.gated.add(path)
    page = f"{site.url}/datasets/gaia-benchmark/GAIA is gated and HF_TOKEN"
    with pytest.raises(UserError, match=f"^{page} is not set: accept its terms there, then set your token$"):
        prepare("gaia", mirror=site.url)
    monkeypatch.setenv("HF_TOKEN", "bad-token")
    with pytest.raises(UserError, match=f"^{page} was refused: accept its terms there, then set your token$"):
        prepare("gaia", mirror=site.url)
    Path("netrc").write_text("machine 127.0.0.1 login me password other")
    monkeypatch.setenv("NETRC", "netrc")
    monkeypatch.setenv("HF_TOKEN", "good-token")
    site.redirects[path] = f"http://localhost:{site.server_port}/storage"  # another host, as the publisher's storage is
    site.files["/storage"] = site.files.pop(path)
    prepare("gaia", mirror=site.url)
    assert [path for path, _ in site.seen][-1] == "/storage" and "Authorization" not in site.seen[-1][1]
    assert not any(b"good-token" in file.read_bytes() for file in Path("data").rglob("*") if file.is_file())
    publish_mix(site)
    site.seen.clear()
    prepare("mix", mirror=site.url)  # open to all
    assert len(site.seen) == 3 and not any("Authorization" in headers for _, headers in site.seen)


def test_servers_that_do_not_answer(site, monkeypatch):
    with pytest.raises(UserError, match=r"data\.json: the server says 404$"):
        prepare("medqa", mirror=site.url)
    with pytest.raises(UserError, match=r"data\.json: stopped by ConnectionError; the same command continues"):
        prepare("medqa", mirror="http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", "secret\ntoken")
    with pytest.raises(UserError, match="stopped by InvalidHeader") as raised:
        prepare("gaia", mirror=site.url)
    assert "secret" not in str(raised.value)
    Path("taken").write_text("")
    with pytest.raises(UserError, match="^cannot write to taken/medqa: "):
        prepare("medqa", Path("taken"), mirror=site.url)


def test_the_command(site, monkeypatch, capsys):
    path = urlsplit(next(iter(PREPARED["amc23"]))).path
    site.files[path] = json.dumps(rows_of(40)).encode()
    monkeypatch.setattr(sys, "argv", ["tasks.py", "prepare", "amc23", "--to", "elsewhere", "--mirror", site.url])
    tasks.main()
    assert len(load_examples("elsewhere/amc23", "test")) == 40
    assert capsys.readouterr().out == "elsewhere/amc23/test.jsonl: 40 questions\n"
    monkeypatch.setattr(sys, "argv", ["tasks.py", "prepare", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        tasks.main()
    output = capsys.readouterr()
    assert output.err == f"tasks.py: no task nowhere to prepare: use one of {', '.join(PREPARED)}\n" and not output.out


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match="no task nowhere: use one of tinyworld, mix, .*bamboogle.*, a folder of JSONL"):
        load_examples("nowhere", "test")
