"""The walkthrough is true: its blocks, as cells of the notebook, and those of the solutions print what stands below."""

import asyncio
import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from lab.notebook import BLOCK, NOTEBOOK, notebook

ROOT = Path(__file__).parent.parent
SOLUTIONS = sorted((ROOT / "docs" / "solutions").glob("*.md"))


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Each Python block of a page, and the text below it."""
    blocks = BLOCK.findall(page)
    assert len(blocks) == page.count("```python") > 0
    return blocks


def cells_of(path: Path) -> list[tuple[str, str]]:
    """Each code cell of a notebook, and its output."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in cells]
    return [("".join(cell["source"]), output) for cell, output in zip(cells, outputs)]


def run_blocks(blocks: list[tuple[str, str]], names: dict) -> None:
    """Execute the blocks in one session, and compare what each prints with what it should."""
    for code, expected in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "a block", "exec"), names)
        assert printed.getvalue() == expected


@pytest.fixture(scope="module")
def session():
    """The notebook, begun where Jupyter begins: in its own folder."""
    names = {}
    with contextlib.chdir(NOTEBOOK.parent), pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "run", asyncio.run)  # the first cell replaces it: put it back at the end
        run_blocks(cells_of(NOTEBOOK), names)
    return names


def test_the_notebook_is_what_the_command_writes():
    assert NOTEBOOK.read_text() == notebook()
    blocks = blocks_of((ROOT / "walkthrough.md").read_text())
    assert [(code.strip("\n"), printed) for code, printed in blocks] == cells_of(NOTEBOOK)[1:]


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.name)
def test_a_solution_prints_what_it_says(path, session):
    with contextlib.chdir(ROOT):
        run_blocks(blocks_of(path.read_text()), dict(session))


def test_each_exercise_has_its_solution():
    page = (ROOT / "walkthrough.md").read_text()
    numbers = re.findall(r"^(\d)\. \*\*", page, re.MULTILINE)
    assert numbers == list("123456789") == [path.stem for path in SOLUTIONS]
    assert re.findall(r"\]\((docs/solutions/\d\.md)\)", page) == [f"docs/solutions/{n}.md" for n in numbers]


def test_a_wrong_digit_is_noticed():
    blocks = blocks_of("```python\nprint(f'{2 / 3:.4f}')\n```\n\n```text\n0.6666\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(blocks, {})
