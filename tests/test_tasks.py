"""Readers of questions: what is accepted, and one clear line for what is not."""

import json

import pytest

from judge import RULES
from llm import UserError
from tasks import Example, load_corpus, load_examples


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
        '{"question": "q", "answer": "A", "options": ["x"]}',
        '{"question": "q", "answer": "A", "options": ["x", ""]}',
        '{"question": [1, 2, 3, 4], "query": "24?", "answer": ["1*2*3*5"]}',
        '{"question": [1, 2, 3, 4], "answer": ["1*2*3*4"]}',
        '{"question": "q", "answer": []}',
        '{"question": "q", "answer": ["a", ""]}',
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
    ({"query": "Where?", "answer": "x", "kind": "math"}, Example("Where?", "x", kind="math")),
    (
        {"question": [1, 1, 1, 8], "query": "Make 24.", "answer": ["(1+1+1)×8"]},
        Example("Make 24.", "(1+1+1)×8", kind="game24"),
    ),
    ({"question": "Which?", "options": ["red", "blue"], "answer": "B"}, LETTERED),
    ({"question": "Which?", "options": ["A. red", "B. blue"], "answer": "(B)"}, LETTERED),
    ({"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "blue"}, LETTERED),
    ({"question": "Which?", "options": "['red', 'blue']", "answer": "B"}, LETTERED),
    ({"question": "Which?", "choices": "A) red\nB) blue", "answer": "B."}, LETTERED),
    ({"question": "Which?\nA) red\nB) blue", "options": ["red", "blue"], "answer": "B"}, LETTERED),
]


@pytest.mark.parametrize("row, example", SHAPES)
def test_the_shapes_of_benchmarks(tmp_path, row, example):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([row, row], indent=4))
    assert load_examples(str(path), "test") == [example, example]
    accepted = example.answer if isinstance(example.answer, str) else example.answer[-1]
    assert RULES[example.kind](example.question, example.answer, accepted) == 1.0


def test_a_damaged_row_of_a_list_is_named(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"query": "Who?", "answer": "Ann"}] * 6 + [{"query": "Who?", "answer": ""}]))
    with pytest.raises(UserError, match=r"bench\.json, row 7: the answer must be"):
        load_examples(str(path), "test")
    path.write_text('[\n{"query": "Who?", "answer": "Ann"},\n{"query": "Who?"')
    with pytest.raises(UserError, match=r"bench\.json:3: not JSON"):
        load_examples(str(path), "test")
