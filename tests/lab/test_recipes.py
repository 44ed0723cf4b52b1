"""The recipes are commands that train.py accepts, with flags that fit together; nothing of their size can run here."""

import subprocess
from pathlib import Path

import pytest

from eval import Flags
from tools import find_tools
from train import Config, choose_precision

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
MIX = ["data/mix", "--tools", "Base_Generator", "Python_Coder", "lab.web.Wikipedia_Search"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arguments", [[], MIX], ids=["tinyworld", "mix"])
def test_a_recipe_is_a_command_of_train(recipe, arguments, tmp_path):
    """`python` is replaced by a program that writes down its arguments: the shell file itself runs."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([recipe, *arguments], env=environment, capture_output=True, text=True, check=True)
    script, *flags = done.stdout.splitlines()
    assert script == "train.py"
    (config,) = Flags(Config).parse_args_into_dataclasses(flags)  # an unknown flag raises
    assert choose_precision(config, "cuda").autocast == (config.dtype == "auto")
    assert config.task == (arguments[0] if arguments else "tinyworld")
    search = "Wikipedia_Search" if arguments else "Search"
    assert list(find_tools(config.tools)) == ["Base_Generator", "Python_Coder", search]
    assert config.engine == "vllm" and config.run_dir == f"runs/{recipe.stem}-{Path(config.task).name}"
    text = recipe.read_text()
    assert "Measured:" in text and "GiB" in text and " ".join(arguments) in text


def test_there_is_a_recipe_for_each_tier():
    table = (ROOT / "recipes" / "README.md").read_text()
    assert [path.stem for path in RECIPES] == ["0.5b-24gb", "1.5b-80gb", "3b-80gb", "7b-141gb", "7b-lora-80gb"]
    assert all(f"recipes/{path.name}" in table for path in RECIPES)
