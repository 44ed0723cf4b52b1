"""The course kit: a copy of the project in which the functions that carry the ideas are left for the student to write.

    python -m lab.course OUT              # all eight steps are blank; `python -m lab.exam` in OUT is the exam
    python -m lab.course OUT --first 5    # steps 1 to 4 are given

A blank keeps signature and docstring, and its body raises `NotImplementedError`. Blanks are made from the code by name,
so there is no second copy that could grow old. docs/course.md is the lecturer's page.
"""

import ast
import shutil
from pathlib import Path

import tasks
from eval import one_line_errors
from lab.exam import ROOT, STEPS, TESTS
from tools import UserError

# What a student needs to read the core, write the steps, train and look into the run.
KIT = """*.py tinyworld/*.* tinyworld/backbone/* lab/__init__.py lab/ask.py lab/exam.py lab/curves.py
    lab/paired.py lab/report.* lab/live.html
    tests/conftest.py README.md walkthrough.md docs/metrics.md docs/*.png
    requirements.txt pyproject.toml Makefile LICENSE .gitignore""".split()


def body_lines(source: str, name: str) -> slice:
    """The lines of a function's body, without its docstring."""
    (node,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    return slice(node.body[0].end_lineno, node.end_lineno)


def replace_body(source: str, name: str, body: list[str]) -> str:
    lines = source.splitlines(keepends=True)
    lines[body_lines(source, name)] = body
    return "".join(lines)


def make_kit(out: Path, first: int = 1) -> None:
    """Copy the project into `out`, with blanks from step `first` on."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a new folder")
    for pattern in [*KIT, *(f"tests/{file}" for file in TESTS)]:
        for path in ROOT.glob(pattern):
            copy = out / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for step, (name, file) in enumerate(STEPS.items(), start=1):
        if step >= first:
            blank = [f'    raise NotImplementedError("step {step}: write {name}")\n']
            source = (out / file).read_text(encoding="utf-8")
            (out / file).write_text(replace_body(source, name, blank), encoding="utf-8")


def main() -> None:
    parser = tasks.Parser(description="Write a course kit: the project with the functions of the steps left blank.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the kit, new or empty")
    steps = range(1, len(STEPS) + 1)
    parser.add_argument("--first", type=int, default=1, choices=steps, help="first step that is blank (default 1)")
    arguments = parser.parse_args()
    with one_line_errors():
        make_kit(arguments.out, arguments.first)
        print(f"{arguments.out} is blank from step {arguments.first} on; run the exam there: python -m lab.exam")


if __name__ == "__main__":
    main()
