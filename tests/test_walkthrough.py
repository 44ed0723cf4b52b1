"""The walkthrough is true: its blocks and those of the solutions run, and print what stands below them."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOLUTIONS = sorted((ROOT / "docs" / "solutions").glob("*.md"))


def run_blocks(path: Path, names: dict) -> None:
    """Execute the Python blocks of a page in one session, and compare what each prints with the text below it."""
    page = path.read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") > 0
    for code, expected in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, path.name, "exec"), names)
        assert printed.getvalue() == expected


@pytest.fixture(scope="module")
def session():
    names = {}
    with contextlib.chdir(ROOT):
        run_blocks(ROOT / "walkthrough.md", names)
    return names


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.name)
def test_a_solution_prints_what_it_says(path, session):
    with contextlib.chdir(ROOT):
        run_blocks(path, dict(session))


def test_each_exercise_has_its_solution():
    page = (ROOT / "walkthrough.md").read_text()
    numbers = re.findall(r"^(\d)\. \*\*", page, re.MULTILINE)
    assert numbers == list("123456789") == [path.stem for path in SOLUTIONS]
    assert re.findall(r"\]\((docs/solutions/\d\.md)\)", page) == [f"docs/solutions/{n}.md" for n in numbers]


def test_a_wrong_digit_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(f'{2 / 3:.4f}')\n```\n\n```text\n0.6666\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page, {})
