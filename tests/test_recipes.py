"""The recipes are commands that train.py accepts, with flags that fit together; nothing of their size can run here."""

import subprocess
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from train import Config, check

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arguments", [[], ["mix", "--tools", "Base_Generator", "Wikipedia_Search"]])
def test_a_recipe_is_a_command_of_train(recipe, arguments, tmp_path):
    """`python` is replaced by a program that writes down its arguments: the shell file itself runs."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", recipe, *arguments], env=environment, capture_output=True, text=True, check=True)
    script, *flags = done.stdout.splitlines()
    assert script == "train.py"
    (config,) = HfArgumentParser(Config).parse_args_into_dataclasses(flags)  # an unknown flag raises
    check(config)
    assert config.engine == "vllm" and config.run_dir == f"runs/{recipe.stem}-{config.task}"
    assert config.task == (arguments[0] if arguments else "tinyworld")
    text = recipe.read_text()
    assert "Measured:" in text and "GiB" in text


def test_there_is_a_recipe_for_each_tier():
    assert [path.stem for path in RECIPES] == ["0.5b-24gb", "1.5b-80gb", "3b-80gb", "7b-141gb", "7b-lora-80gb"]
