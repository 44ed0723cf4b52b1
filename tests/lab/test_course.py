"""The course kit: blanks by name, the way back, and an exam with no marks for blanks and all for the originals."""

import asyncio
import inspect
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lab.course import body_lines, make_kit, replace_body
from lab.exam import ROOT, STEPS, TESTS, hold_exam, steps_of_tests
from tools import UserError


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "kit"
    make_kit(out)
    return out


def put_back(kit, functions):
    """The student's work, done with the originals."""
    for name in functions:
        original, copy = ((folder / STEPS[name]).read_text() for folder in (ROOT, kit))
        body = original.splitlines(keepends=True)[body_lines(original, name)]
        (kit / STEPS[name]).write_text(replace_body(copy, name, body))


def exam(kit, *steps) -> dict[str, tuple[int, int]]:
    """(passed, total) of each function, from the table that a student sees."""
    command = [sys.executable, "-m", "lab.exam", *map(str, steps)]
    text = subprocess.run(command, cwd=kit, capture_output=True, text=True, check=True).stdout
    return {name: (int(passed), int(total)) for name, passed, total in re.findall(r"(\w+) +(\d+) of (\d+)", text)}


@pytest.mark.parametrize("step, name", [*enumerate(STEPS, start=1)])
def test_a_blank_keeps_signature_and_docstring(kit, step, name):
    blank = runpy.run_path(str(kit / STEPS[name]))[name]
    original = runpy.run_path(str(ROOT / STEPS[name]))[name]
    assert inspect.getdoc(blank) == inspect.getdoc(original)
    parameters = inspect.signature(original).parameters
    assert [*inspect.signature(blank).parameters] == [*parameters]
    required = [None for parameter in parameters.values() if parameter.default is parameter.empty]
    with pytest.raises(NotImplementedError, match=f"step {step}: write {name}"):
        result = blank(*required)
        asyncio.run(result)


def test_comments_of_a_body_go_and_the_rest_stays():
    lines = ["A = 1", "def idea(x):", '    """Half."""', "    # divide", "    return x / 2  # by 2", "", "B = 2", ""]
    blank = replace_body("\n".join(lines), "idea", ["    raise NotImplementedError\n"])
    assert blank.split("\n") == [*lines[:3], "    raise NotImplementedError", *lines[5:]]


def test_all_other_files_are_the_projects(kit):
    for path in kit.rglob("*.*"):
        if path.is_file() and path.relative_to(kit).as_posix() not in STEPS.values():
            assert path.read_bytes() == (ROOT / path.relative_to(kit)).read_bytes()
    assert {f"{path.stem}.py" for path in ROOT.glob("*.py")} <= {path.name for path in kit.iterdir()}


def test_a_kit_has_what_a_run_needs(kit):
    """The scripts of the lab that the core names, except those of a flag that no page of the course mentions."""
    named = {module for path in ROOT.glob("*.py") for module in re.findall(r'find\("lab\.(\w+)\.', path.read_text())}
    flags = {"http_engine", "vllm_engine", "torchrun", "track"}
    assert named - flags >= {"ask", "curves", "paired"} and flags < named
    assert all((kit / "lab" / f"{module}.py").exists() for module in named - flags)
    assert "lab.report" in (kit / "walkthrough.md").read_text() and (kit / "lab" / "live.html").exists()


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        make_kit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_kit_that_begins_later_has_the_first_steps(tmp_path):
    make_kit(tmp_path, first=7)
    assert (tmp_path / "flow_grpo.py").read_text() == (ROOT / "flow_grpo.py").read_text()
    assert (tmp_path / "agent.py").read_text().count("NotImplementedError") == 2


def test_a_test_belongs_to_the_last_step_it_needs():
    source = """
def helper(): return flow_grpo_loss(row_weights([1]))
def fixture(): return helper
class Script:
    def run(self): return agent.solve()
def test_two(): assert broadcast_to_turns(group_advantages(x), n)
def test_six(fixture): token_weights()
def test_eight(): Script()
def test_none(): plant(mask="row_weights", row_weights=1)
"""
    assert steps_of_tests(source) == {"test_two": 2, "test_six": 6, "test_eight": 8}


def test_each_step_has_tests_of_its_own():
    steps = [steps_of_tests((ROOT / "tests" / file).read_text()).values() for file in TESTS]
    assert set().union(*steps) == set(range(1, len(STEPS) + 1))


def test_the_page_names_true_steps_and_tests():
    page = (ROOT / "docs" / "course.md").read_text()
    rows = re.findall(r"\| (\d) \| `(\w+)\.(\w+)` \|", page)
    assert [(int(step), name, f"{module}.py") for step, module, name in rows] == [
        (step, name, file) for step, (name, file) in enumerate(STEPS.items(), start=1)
    ]
    step_of = {}
    for file in TESTS:
        step_of |= steps_of_tests((ROOT / "tests" / file).read_text())
    named = re.findall(r"\| (\d) \|[^|]*\| `(test_\w+)` \|", page)
    assert len(named) > 5 and all(step_of[test] == int(step) for step, test in named)


def test_the_exam_gives_nothing_for_blanks_and_all_for_the_originals(kit):
    marks = exam(kit)
    assert [*marks] == [*STEPS] and all(passed == 0 < total for passed, total in marks.values()), marks
    cheap = [*STEPS][:4]
    put_back(kit, cheap)
    assert exam(kit, 1, 2, 3, 4) == {name: (marks[name][1], marks[name][1]) for name in cheap}
    put_back(kit, [*STEPS][4:])
    for file in STEPS.values():
        assert (kit / file).read_text() == (ROOT / file).read_text()


def test_a_file_that_python_cannot_read_is_one_line(monkeypatch):
    def collect(arguments, plugins):
        longrepr = "flow_grpo.py:75: in <module>\nE   SyntaxError: invalid syntax"
        plugins[0].pytest_collectreport(SimpleNamespace(failed=True, longrepr=longrepr))
        return pytest.ExitCode.INTERRUPTED

    monkeypatch.setattr(pytest, "main", collect)
    with pytest.raises(UserError, match="cannot start: SyntaxError: invalid syntax; python -m pytest"):
        hold_exam([1])
