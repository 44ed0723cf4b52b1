"""The exam of the course: of the project's tests that need a step's function, how many pass?

    python -m lab.exam          # all steps, one row for each
    python -m lab.exam 1 2      # steps 1 and 2

A test needs a function if its code names it, or the code of a fixture or helper that it uses. It counts for the last
step that it needs. So a student who has written steps 1 to N, and nothing else, can pass rows 1 to N.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

import tasks
from eval import one_line_errors
from tools import UserError

ROOT = Path(__file__).parent.parent
STEPS = {  # function: its file, in the order in which a student writes them
    "group_advantages": "flow_grpo.py",
    "broadcast_to_turns": "flow_grpo.py",
    "row_weights": "flow_grpo.py",
    "token_weights": "flow_grpo.py",
    "token_logprobs": "flow_grpo.py",
    "flow_grpo_loss": "flow_grpo.py",
    "parse_plan": "agent.py",
    "solve": "agent.py",
}
TESTS = ["test_flow_grpo.py", "test_agent.py", "test_replies.py"]


def names_in(node: ast.AST) -> set[str]:
    """The names that a piece of code reads or takes as arguments: a test takes its fixtures in this way."""
    nodes = list(ast.walk(node))
    names = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    return names | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def steps_of_tests(source: str) -> dict[str, int]:
    """The tests of a file, each with the last step that it needs. Tests that need none are left out."""
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    parts = {node.name: names_in(node) for node in ast.parse(source).body if isinstance(node, definitions)}
    steps = {}
    for test in parts:
        seen, names = set(), {test}
        while new := names - seen:
            seen |= new
            names = names.union(*(parts.get(name, ()) for name in new))
        needed = [step for step, function in enumerate(STEPS, start=1) if function in names]
        if test.startswith("test_") and needed:
            steps[test] = max(needed)
    return steps


class Marks:
    """A plugin of pytest that counts the passed and the failed tests of each step."""

    def __init__(self, step_of: dict[str, int]):
        self.step_of = step_of
        self.passed, self.failed = Counter(), Counter()
        self.first_failed: dict[int, str] = {}
        self.broken = ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # the student's file cannot be imported
            self.broken = str(report.longrepr).splitlines()[-1].removeprefix("E").strip()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid.split("[")[0] in self.step_of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.split("[")[0]
        if report.failed:
            self.failed[self.step_of[test]] += 1
            self.first_failed.setdefault(self.step_of[test], test)
        elif report.when == "call" and report.passed:
            self.passed[self.step_of[test]] += 1


def hold_exam(steps: list[int]) -> Marks:
    """Run the tests of these steps, without pytest's own output."""
    step_of, files = {}, [f"tests/{name}" for name in TESTS]
    for file in files:
        found = steps_of_tests((ROOT / file).read_text(encoding="utf-8"))
        step_of |= {f"{file}::{test}": step for test, step in found.items() if step in steps}
    marks = Marks(step_of)
    code = pytest.main(["-n", "0", "-p", "no:terminal", "-p", "no:cacheprovider", *files], plugins=[marks])
    if marks.broken:
        raise UserError(f"the tests cannot start: {marks.broken}; python -m pytest -n 0 says where")
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return marks


def main() -> None:
    parser = tasks.Parser(description="Run the exam of the course and print a row for each step.")
    parser.add_argument("steps", type=int, nargs="*", metavar="STEP", help="steps to run; none: all")
    with one_line_errors():
        steps = sorted(set(parser.parse_args().steps)) or list(range(1, len(STEPS) + 1))
        if not 1 <= steps[0] <= steps[-1] <= len(STEPS):
            raise UserError(f"there are steps 1 to {len(STEPS)}")
        marks = hold_exam(steps)
        functions = [*STEPS]
        print(f"{'step':4}  {'function':18}  {'passed':9}  first test that fails")
        for step in steps:
            passed = f"{marks.passed[step]} of {marks.passed[step] + marks.failed[step]}"
            row = f"{step:4}  {functions[step - 1]:18}  {passed:9}  {marks.first_failed.get(step, '')}"
            print(row.rstrip())
        if marks.first_failed:
            print("python -m pytest -n 0 TEST shows why a test fails")


if __name__ == "__main__":
    main()
