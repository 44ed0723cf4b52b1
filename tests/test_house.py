"""The house stands: eleven scripts at the top, small ones, and a lab that is built on them and never under them."""

import ast
import re
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READ = ["agent", "flow_grpo", "tools", "judge", "train", "eval", "llm"]  # the files that a reader reads
CORE = [*READ, "tree", "sandbox", "tasks", "team"]
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
README = (ROOT / "README.md").read_text()


def count_tokens(path: Path) -> int:
    """Python tokens without comments, docstrings and layout, so that squeezing lines gains nothing."""
    count, at_start, depth = 0, True, 0
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            kind = tokenize.tok_name[token.type]
            depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
            if kind == "FSTRING_END" or depth > (kind == "FSTRING_START"):
                continue  # an f-string is one token, in Python 3.12 as in 3.11
            if token.type in (*LAYOUT, tokenize.ENCODING):
                at_start = True
            elif kind in ("STRING", "FSTRING_START") and at_start:  # a docstring
                at_start = False
            else:
                count, at_start = count + 1, False
    return count


def test_eleven_scripts_at_the_top():
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(CORE) == installed


def test_the_core_can_be_read_in_an_hour():
    paths = [ROOT / f"{name}.py" for name in READ]
    assert sum(map(count_tokens, paths)) <= 15_000
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 2_200
    assert count_tokens(ROOT / "tree.py") <= 2_000  # one idea, in a file of its own
    assert count_tokens(ROOT / "team.py") <= 210
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("name", CORE)
def test_the_core_does_not_import_the_lab(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module.split(".")[0] in ("lab", "tests")]


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("tinyworld/*.py")], ids=str)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (path.name, node.name) != ("train.py", "main"):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_no_main_holds_more_than_60_names():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                assert len(names) <= 60, path


def test_the_readme_tells_the_true_length_of_each_file():
    rows = re.findall(r"`(\w+)\.py`[^|]*\| ([\d,]+) \|", README)
    assert [name for name, _ in rows] == ["agent", "flow_grpo", "tree", "train", "judge", "tools", "llm", "eval"]
    for name, lines in rows:
        assert int(lines.replace(",", "")) == len((ROOT / f"{name}.py").read_text().splitlines()), name


def test_the_backbone_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "tinyworld" / "backbone").iterdir()) <= 6e6
