"""Readers of questions: what is accepted, and one clear line for what is not."""

import json

import pytest

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
        '{"question": "q", "answer": 5}',
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
