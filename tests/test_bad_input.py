"""Bad input: one line on stderr that says what is wrong, exit code 2, nothing accepted in silence, nothing lost.

All in this process, with the models left out where a refusal must come before they load: what is accepted although it
should not be ends in `Accepted`, which no handler of ours catches, before anything is rolled out or trained.
"""

import dataclasses
import errno
import io
import json
import logging
import os
import re
import runpy
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import agent
import eval as evaluation
import llm
import train
from eval import run_main
from lab import bench, benchmark, paper, prepare, pretrain, report
from sandbox import Sandbox
from tasks import Corpus

ROOT = Path(__file__).parent.parent
BACKBONE = ROOT / "tinyworld" / "backbone"
GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'
ARTICLE = b'{"title": "t", "text": "x"}\n'
ABOVE = 1e9  # the technical top of every range without one of its own


class Accepted(BaseException):
    """The script would have gone on with the bad input."""


def cases(table: dict[str, Any]) -> list:
    """Parameters with readable ids."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), id=name) for name, v in table.items()]


@dataclass
class Script:
    """A command, and the flags that make it small."""

    name: str
    main: Callable
    config: type
    flags: str = ""

    def run(self) -> None:
        run_main(self.main, self.config)


SMALL = "--task {task} --tools Base_Generator --device cpu --max_turns 1 --max_tokens 8 --engine_memory 0.3 {more}"
TINY = f"--model {BACKBONE} --questions_per_step 1 --group_size 2 --steps 2 --eval_every 1 --kl_coef 0"
TRAIN = Script("train", train.main, train.Config, SMALL.format(task="{task}", more=TINY))
FEW = f"--planners {BACKBONE} --frozen_model {BACKBONE} --output="
EVAL = Script("eval", evaluation.main, evaluation.EvalConfig, SMALL.format(task="{task}", more=FEW))
BENCH = Script("bench", bench.main, bench.BenchConfig, TRAIN.flags + " --output=")
ALL = EVAL.flags.replace("--task {task}", "--tasks {task}")
BENCHMARK = Script("benchmark", benchmark.main, benchmark.BenchmarkConfig, ALL)
PAPER = Script("paper", paper.main, paper.PaperConfig, "--out out")
PRETRAIN = Script("pretrain", pretrain.main, pretrain.PretrainConfig, "--out out")
SCRIPTS = (TRAIN, EVAL, BENCH, BENCHMARK, PAPER, PRETRAIN)


@dataclass
class Plain(Script):
    """A command that parses its words itself."""

    config: type = None

    def run(self) -> None:
        self.main()


INDEX = Plain("tasks", lambda: runpy.run_path(str(ROOT / "tasks.py"), run_name="__main__"))
REPORT = Plain("report", report.main)
PREPARE = Plain("prepare", prepare.main)


# --- the harness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of a few questions, without articles."""
    folder = tmp_path_factory.mktemp("task") / "sums"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_bytes(GOOD * 2)
    return folder


@pytest.fixture(scope="module")
def box():
    return Sandbox(level="process")  # made once: its trial takes longer than most of the tests


@pytest.fixture(scope="module")
def finished(task, box, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Sandbox", lambda: box)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TRAIN.flags.format(task=task).split(), "--run_dir", "run"])
        TRAIN.run()
    return folder / "run"


def files(folder: Path) -> dict[str, bytes]:
    """All that the folder holds, but the lock of a run, which is empty."""
    names = {path: str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "lock"}
    return {name: path.read_bytes() for path, name in names.items() if path.is_file()}


def accepted(what: str) -> Callable:
    def stop(*_, **__):
        raise Accepted(what)

    return stop


@pytest.fixture
def refuses(tmp_path, monkeypatch, capsys, task, box):
    """Give a script some words: it must refuse them in one line that has `said` in it, and leave all files alone.

    `models` says whether a model may load before. Nothing may be rolled out or trained, except if `rollout` is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in (evaluation, bench):
        monkeypatch.setattr(module, "Sandbox", lambda *_: box)

    def call(script: Script, words: str, said: str, models=False, rollout=False, keeps=True, code=2) -> str:
        if not models:
            for module in (llm, train):
                monkeypatch.setattr(module, "load_model", accepted("a model loads"))
            monkeypatch.setattr(pretrain, "new_model", accepted("a model is made"))
            monkeypatch.setattr(pretrain, "train_stage", accepted("a model is trained"))
            monkeypatch.setattr(paper, "do_all", accepted("the runs begin"))
            monkeypatch.setattr(bench, "make_shape", accepted("a model is made"))
        if not rollout:
            monkeypatch.setattr(agent.AgentSystem, "rollout", accepted("questions are rolled out"))
            monkeypatch.setattr(benchmark.KeepingSystem, "rollout", accepted("questions are rolled out"))
        monkeypatch.setattr(train, "update_policy", accepted("the policy is trained"))
        for library in ("transformers", "huggingface_hub"):
            for handler in logging.getLogger(library).handlers:
                if type(handler) is logging.StreamHandler:  # it took the stderr of its import
                    monkeypatch.setattr(handler, "stream", sys.stderr)
        flags = script.flags.format(task=task)
        monkeypatch.setattr(sys, "argv", [f"{script.name}.py", *flags.split(), *words.split()])
        before = files(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            script.run()
        written = capsys.readouterr().err
        # A progress bar wipes itself out with carriage returns.
        lines = [line.rsplit("\r", 1)[-1] for line in written.removesuffix("\n").split("\n")]
        assert stopped.value.code == code and "Traceback" not in written, written
        assert len(lines) == 1 and re.match(rf"{script.name}\.py: .*{said}", lines[0]), written
        after = files(tmp_path)
        if keeps:
            assert {name: after.get(name) for name in before} == before
            new = {Path(name).name for name in after.keys() - before.keys()}
            assert new <= {"config.json"}, new  # of a run that may start again with other flags
        return lines[0]

    yield call
    shutil.rmtree(tmp_path)


# --- flags ------------------------------------------------------------------------------------------------------------


def outside() -> dict[str, tuple[Script, str, str]]:
    """Values below and above the range of each flag that has one, from the configs themselves."""
    found = {}
    for script in SCRIPTS:
        for flag in dataclasses.fields(script.config):
            low, high = flag.metadata.get("low"), flag.metadata.get("high", ABOVE)
            if low is None or (script in (BENCH, BENCHMARK) and flag.name not in script.config.__annotations__):
                continue  # the others are tested at the script that has them first
            if flag.type in (float, "float"):
                values = [low - 0.5, -float("inf"), "nan", "inf", high * 1.001]
            else:
                values = [low - 1, -(10**12), int(high) + 1, 10**30]
            for value in values:
                found[f"{script.name} {flag.name} {value}"] = script, f"--{flag.name}={value}", f"--{flag.name} "
    return found


@pytest.mark.parametrize("script, words, said", cases(outside()))
def test_a_number_outside_its_range(refuses, script, words, said):
    assert "out of range" in refuses(script, words, said)


def test_every_number_has_a_range():
    """Any number that a flag takes has a smallest value, so no flag is left out above."""
    lacking = [
        f"{script.name} --{flag.name}"
        for script in SCRIPTS
        for flag in dataclasses.fields(script.config)
        if flag.type in (int, float, "int", "float") and flag.metadata.get("low") is None
    ]
    assert not lacking, lacking


SENSELESS = {
    "no step": (TRAIN, "--steps 0", "--steps 0"),
    "a group of one": (TRAIN, "--group_size 1", "--group_size 1"),
    "no question": (TRAIN, "--questions_per_step 0", "--questions_per_step"),
    "no turn": (EVAL, "--max_turns 0", "--max_turns 0"),
    "no token": (EVAL, "--max_tokens 0", "--max_tokens 0"),
    "no trial": (EVAL, "--trials 0", "--trials 0"),
    "no update": (TRAIN, "--updates_per_step 0", "--updates_per_step 0"),
    "greedy training": (TRAIN, "--temperature 0", "nothing to compare"),
    "nearly greedy training": (TRAIN, "--temperature 1e-300", "--temperature"),
    "a bound that stops learning from failures": (TRAIN, "--dual_clip 1", "--dual_clip 1.0: must be above 1"),
    "a clip above one": (TRAIN, "--clip_low 1.5", "--clip_low"),
    "more than the GPU": (TRAIN, "--engine_memory 1.5", "--engine_memory"),
    "equal trials": (BENCHMARK, "--trials 2 --temperature 0", "are all the same"),
    "rounding": (TRAIN, "--dtype bfloat16", "loses small updates to rounding"),
    "one layer": (PRETRAIN, "--layers 1", "--layers"),
    "stage zero": (PRETRAIN, "--from_stage 0", "--from_stage"),
    "stage three": (PRETRAIN, "--from_stage 3", "--from_stage"),
    "a share of nothing": (PRETRAIN, "--share -1", "--share"),
    "a share of nan": (PRETRAIN, "--share nan", "--share"),
    "no rows": (PRETRAIN, "--rows_per_step 0", "--rows_per_step"),
    "a rate of nan": (PRETRAIN, "--lr nan", "--lr"),
    "an endless rate": (PRETRAIN, "--muon_lr inf", "--muon_lr"),
}


@pytest.mark.parametrize("script, words, said", cases(SENSELESS))
def test_a_senseless_number(refuses, script, words, said):
    refuses(script, words, said)


def test_a_temperature_of_nearly_nothing_is_greedy():
    """1e-40 is no zero in float32, but what is divided by it is infinite."""
    tokens, logprobs = llm.sample(
        torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1e-40]), torch.tensor([[0.5]]).double()[0]
    )
    assert tokens.tolist() == [1] and logprobs.isfinite().all()


WRONG = {
    "a word as a number": (TRAIN, "--steps ten", "--steps.*ten"),
    "a fraction of a step": (TRAIN, "--steps 1.5", "--steps.*1.5"),
    "nan steps": (TRAIN, "--steps nan", "--steps.*nan"),
    "nothing as a number": (TRAIN, "--seed=", "--seed"),
    "two numbers": (TRAIN, "--seed 1,2", "--seed.*1,2"),
    "a word as a rate": (TRAIN, "--learning_rate high", "--learning_rate.*high"),
    "maybe": (TRAIN, "--decay maybe", "--decay.*maybe"),
    "a number as a choice": (TRAIN, "--aggregation 1", "--aggregation.*1"),
    "no such device": (TRAIN, "--device tpu", "--device.*tpu.*cuda"),
    "no such number format": (TRAIN, "--dtype float8", "--dtype.*float8"),
    "no such optimizer": (TRAIN, "--optimizer sgd", "--optimizer.*sgd"),
    "no such engine": (EVAL, "--engine llama.cpp", "--engine.*vllm"),
    "no such split": (EVAL, "--split val", "--split.*val.*dev"),
    "no tools": (EVAL, "--tools", "--tools"),
    "no planners": (EVAL, "--planners", "--planners"),
    "a flag without its value": (EVAL, "--task", "--task"),
    "no such size": (PAPER, "--scale huge", "--scale.*huge"),
    "no tasks": (BENCHMARK, "--tasks", "--tasks"),
    "a word as a count": (BENCH, "--in_flight many", "many"),
}


@pytest.mark.parametrize("script, words, said", cases(WRONG))
def test_a_value_of_the_wrong_kind(refuses, script, words, said):
    refuses(script, words, said)


UNKNOWN = {
    "a flag": (TRAIN, "--no_such_flag 1", "unknown: --no_such_flag 1.*--help"),
    "two flags": (EVAL, "--foo --bar 2", "unknown: --foo --bar 2"),
    "a flag of another script": (EVAL, "--steps 3", "unknown: --steps 3"),
    "a bare word": (TRAIN, "runs/x", "unknown: runs/x"),
    "a short flag": (TRAIN, "-s 3", "unknown: -s 3"),
    "half a flag": (TRAIN, "--learning_rat 1", "--learning_rat"),
    "half of two flags": (TRAIN, "--question 1", "--question"),
    "a shape": (BENCH, "--shape gpt-5", "--shape gpt-5"),
    "a run of the paper": (PAPER, "--run nothing", "--run nothing.*--plan"),
}


@pytest.mark.parametrize(
    "script, words, said",
    cases(UNKNOWN),
)
def test_an_unknown_flag(refuses, script, words, said):
    refuses(script, words, said)


# --- names of functions, devices and places ---------------------------------------------------------------------------


NAMES = {
    "tool": "--tools Sarch",
    "second tool": "--tools Python_Coder Sarch",
    "tool without a name": "--tools json",
    "tool in no module": "--tools no_such_module.Tool",
    "tool that is no function": "--tools tools.TOOLS",
    "tool that is a module": "--tools os.path",
    "tool that does not wait": "--tools json.dumps",
    "tool without a description": "--tools my_own.silent",
    "tool whose arguments have no names": "--tools my_own.total",
    "tool of a file that has an error": "--tools my_broken.Tool",
    "tool twice": "--tools Base_Generator Base_Generator",
    "reward": "--reward nonsense",
    "reward in no module": "--reward lab.no_such.reward",
    "reward with two dots": "--reward judge..rules",
    "reward with a dot before": "--reward .judge.rules",
    "reward with a dot behind": "--reward judge.",
    "reward of a dot": "--reward .",
    "reward of nothing": "--reward=",
    "reward that takes other arguments": "--reward os.system",
    "reward that is no function": "--reward judge.RULES",
    "reward that is a module": "--reward os.path",
    "task": "--task nowhere",
    "task of nothing": "--task=",
    "task that is a file": f"--task {ROOT / 'README.md'}",
    "task with a long name": f"--task {'n' * 300}",
}


@pytest.mark.parametrize(
    "words",
    cases(
        NAMES,
    ),
)
@pytest.mark.parametrize("script", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_name_that_is_not_there(refuses, tmp_path, monkeypatch, script, words):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_own", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    total = 'async def total(env, *numbers: int):\n    """Adds numbers."""\n    return str(sum(numbers))\n'
    (tmp_path / "my_own.py").write_text(f"async def silent(env, query: str):\n    return query\n\n\n{total}")
    (tmp_path / "my_broken.py").write_text("def Tool(:\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    bad = re.split("[= ]", words)[-1]
    refuses(script, words, re.escape(bad[:200]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("script", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_device_that_is_not_there(refuses, script, device):
    refuses(script, f"--device {device}", f"(?i:{device})", models=True)


MISSING = {
    "vllm": (EVAL, "--engine vllm", "vllm.*requirements-gpu.txt"),
    "peft": (TRAIN, "--lora_rank 8", "peft.*requirements-gpu.txt"),
    "torchao": (TRAIN, "--optimizer adamw8bit", "torchao.*requirements-gpu.txt"),
}


@pytest.mark.parametrize("package", MISSING)
def test_a_package_that_is_not_there(refuses, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    script, words, said = MISSING[package]
    monkeypatch.setattr(train, "open_engines", lambda *_: (None, None))
    refuses(script, words, said, models=True)


URLS = {
    "no name": ("http://127.0.0.1:9/v1", "names no model: write http://127.0.0.1:9/v1#NAME"),
    "empty name": ("http://127.0.0.1:9/v1#", "names no model: write http://127.0.0.1:9/v1#NAME"),
    "no host": ("http://#x", "http://"),
    "no host but a path": ("http:///v1#x", "http:///v1"),
    "half an IPv6 address": ("http://[::1#x", r"http://\[::1"),
    "a port of letters": ("http://127.0.0.1:port/v1#x", "127.0.0.1:port"),
    "a port too high": ("http://127.0.0.1:99999/v1#x", "127.0.0.1:99999"),
    "a host that is none": ("http://a_b!/v1#x", "a_b!"),
    "nothing listens": ("http://127.0.0.1:9/v1#x", "127.0.0.1:9"),
    "nothing listens to TLS": ("https://127.0.0.1:9/v1#x", "127.0.0.1:9"),
    "another scheme": ("ftp://127.0.0.1/v1#x", "ftp://127.0.0.1/v1#x"),
    "no scheme": ("127.0.0.1:9/v1#x", "127.0.0.1:9/v1#x"),
}


@pytest.mark.parametrize("url, said", cases(URLS))
def test_an_address_of_a_server(refuses, url, said):
    start = time.monotonic()
    refuses(EVAL, f"--frozen_model {url}", said, models="://" not in url or url.startswith("ftp"))
    assert time.monotonic() - start < 3


def test_a_planner_behind_a_url_cannot_be_trained(refuses):
    refuses(TRAIN, "--model http://127.0.0.1:9/v1#x", "http://127.0.0.1:9/v1", models=True)


JUDGES = {
    "no URL": ({"JUDGE_MODEL": "some/folder"}, "JUDGE_MODEL=some/folder"),
    "no name": ({"JUDGE_MODEL": "http://127.0.0.1:9/v1"}, "names no model"),
    "no tokens": ({"JUDGE_TOKENS": "0"}, "JUDGE_TOKENS=0"),
    "words as tokens": ({"JUDGE_TOKENS": "many"}, "JUDGE_TOKENS=many"),
}


@pytest.mark.parametrize("settings, said", cases(JUDGES))
def test_the_settings_of_the_judge(refuses, monkeypatch, settings, said):
    monkeypatch.delitem(sys.modules, "lab.judge_llm", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    refuses(EVAL, "--reward lab.judge_llm.reward", said)


# --- the folder of a task ---------------------------------------------------------------------------------------------


def row(**fields) -> bytes:
    return json.dumps(fields).encode()


NO_ANSWER = "the answer must be a text or a number"
LINES = {
    "not JSON": (b"not json", ""),
    "half an object": (b'{"question": "q", "answer": "a"', ""),
    "two objects": (b'{"question": "q", "answer": "a"} {}', "Extra data"),
    "a comma too many": (b'{"question": "q", "answer": "a",}', ""),
    "not UTF-8": (b'{"question": "\xff", "answer": "a"}', "utf-8"),
    "binary": (b"\x00\x01\x02", ""),
    "lone surrogate": (b'{"question": "\\ud800", "answer": "a"}', "surrogate"),
    "lone surrogate in a key": (b'{"question": "q", "answer": "a", "\\udfff": 1}', "surrogate"),
    "deep list": (b"[" * 100_000, "nested too deeply"),
    "deep answer": (b'{"question": "q", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "NaN": (b'{"question": "q", "answer": NaN}', "NaN"),
    "-Infinity": (b'{"question": "q", "answer": [1, -Infinity]}', "-Infinity"),
    "a number beyond floats": (b'{"question": "q", "answer": 1e400}', "number"),
    "a number of 5,000 digits": (b'{"question": "q", "answer": 1' + b"0" * 5000 + b"}", "digits"),
    "a list": (b"[1, 2]", "a row must be"),
    "a text": (b'"text"', "a row must be"),
    "null": (b"null", "a row must be"),
    "no fields": (b"{}", "the question must be a text"),
    "no question": (row(answer="a"), "the question must be a text"),
    "no answer": (row(question="q"), NO_ANSWER),
    "question twice": (b'{"question": "a", "question": "b", "answer": "x"}', "question"),
    "answer twice": (b'{"question": "a", "answer": "x", "answer": "y"}', "answer"),
    "empty question": (row(question=" ", answer="a"), "the question must be a text that is not empty"),
    "question as a number": (row(question=5, answer="a"), "the question must be a text"),
    "question as a list": (row(question=["q"], answer="a"), "the question must be a text"),
    "boolean answer": (row(question="q", answer=True), f"{NO_ANSWER}.*bool"),
    "boolean in a list": (row(question="q", answer=["a", False]), f"{NO_ANSWER}.*bool"),
    "null answer": (row(question="q", answer=None), NO_ANSWER),
    "answer as an object": (row(question="q", answer={"a": 1}), f"{NO_ANSWER}.*dict"),
    "empty answer": (row(question="q", answer=""), "none of them empty"),
    "answer of marks": (row(question="q", answer=" . "), "none of them empty"),
    "empty list": (row(question="q", answer=[]), "none of them empty"),
    "empty answer in a list": (row(question="q", answer=["a", ""]), "none of them empty"),
    "list in a list": (row(question="q", answer=[["a"]]), f"{NO_ANSWER}.*list"),
    "family as a number": (row(question="q", answer="a", family=3), "family and kind must be texts"),
    "kind as a list": (row(question="q", answer="a", kind=["text"]), "family and kind must be texts"),
    "kind as null": (row(question="q", answer="a", kind=None), "family and kind must be texts"),
    "unknown kind": (row(question="q", answer="a", kind="song"), "the kind must be one of text.*song"),
    "kind that is a function": (row(question="q", answer="a", kind="os.system"), "the kind must be one of"),
    "kind in no module": (row(question="q", answer="a", kind="no_module.my_judge"), "there is no no_module.my_judge"),
    "kind in no function": (row(question="q", answer="a", kind="judge.my_judge"), "there is no judge.my_judge"),
    "kind with a dot before": (row(question="q", answer="a", kind=".my.x_judge"), "there is no .my.x_judge"),
    "kind of dots": (row(question="q", answer="a", kind="..x_judge"), "there is no ..x_judge"),
    "choice without letter": (row(question="q", answer="Paris", kind="choice"), "must be .letter, content"),
    "choice of three": (row(question="q", answer=["A", "x", "y"], kind="choice"), "must be .letter, content"),
}


@pytest.mark.parametrize(
    "line, said",
    cases(
        LINES,
    ),
)
def test_a_line_of_a_task(refuses, tmp_path, line, said):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "test.jsonl").write_bytes(GOOD + line + b"\n" + GOOD)
    refuses(EVAL, "--task my", rf"my/test\.jsonl:2: .*{said}")


FILES = {
    "empty": (b"", "holds no questions"),
    "blank": (b"\n \r\n", "holds no questions"),
    "utf-16": ("\ufeffx\n".encode("utf-16"), r"test\.jsonl:1: "),
    "a mark of byte order": (b"\xef\xbb\xbf" + GOOD, r"test\.jsonl:1: .*BOM"),
    "zipped": (b"\x1f\x8b\x08" + bytes(100), r"test\.jsonl:1: "),
    "zeros": (bytes(1000), r"test\.jsonl:1: "),
    "one list": (b"[" + GOOD.strip() + b"]", r"test\.jsonl:1: a row must be"),
    "one pretty object": (json.dumps(json.loads(GOOD), indent=1).encode(), r"test\.jsonl:1: "),
}


@pytest.mark.parametrize("data, said", cases(FILES))
def test_a_file_of_a_task(refuses, tmp_path, data, said):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "test.jsonl").write_bytes(data)
    refuses(EVAL, "--task my", said)


@pytest.mark.parametrize("kind", ["missing", "folder", "dangling link", "link to itself"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_split_that_is_no_file(refuses, task, tmp_path, kind, split):
    shutil.copytree(task, tmp_path / "my")
    path = tmp_path / "my" / f"{split}.jsonl"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif "link" in kind:
        path.symlink_to("nowhere" if kind == "dangling link" else path)
    refuses(TRAIN, "--task my", rf"there is no my/{split}\.jsonl")


def database(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        connection = sqlite3.connect(path)
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()

    return make


def half_corpus(path: Path) -> None:
    Corpus.from_articles([(f"t{i}", "word " * 50) for i in range(2000)], str(path)).connection.close()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CORPORA = {
    "missing": lambda path: None,
    "garbage": lambda path: path.write_bytes(b"not a database " * 100),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": Path.mkdir,
    "cut in half": half_corpus,
    "another table": database("CREATE TABLE other (x)"),
    "a table without an index": database("CREATE TABLE articles (title, text)", "INSERT INTO articles VALUES (1, 2)"),
    "other columns": database("CREATE VIRTUAL TABLE articles USING fts5(a, b)", "INSERT INTO articles VALUES (1, 2)"),
    "no articles": database("CREATE VIRTUAL TABLE articles USING fts5(title, text)"),
}


@pytest.mark.parametrize(
    "make",
    cases(
        CORPORA,
    ),
)
@pytest.mark.parametrize("script", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_corpus_that_cannot_be_searched(refuses, task, tmp_path, script, make):
    shutil.copytree(task, tmp_path / "my")
    make(tmp_path / "my" / "corpus.db")
    refuses(script, "--task my --tools Search", r"Search needs my/corpus\.db .*python tasks\.py index")


# --- python tasks.py index --------------------------------------------------------------------------------------------


@pytest.fixture
def articles(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ARTICLE * 3)
    (tmp_path / "soft").symlink_to("a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "hard")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "test.jsonl").write_bytes(GOOD)
    (tmp_path / "none.jsonl").write_bytes(b"\n")


COMMANDS = {
    "onto itself": ("index a.jsonl a.jsonl", "is the file of articles itself"),
    "onto a link to itself": ("index a.jsonl soft", "is the file of articles itself"),
    "onto a hard link": ("index a.jsonl hard", "is the file of articles itself"),
    "from a link": ("index soft hard", "is the file of articles itself"),
    "from nowhere": ("index nowhere c.db", "nowhere"),
    "from a folder": ("index folder c.db", "folder"),
    "onto a folder": ("index a.jsonl folder", "folder"),
    "into no folder": ("index a.jsonl nowhere/c.db", ""),
    "into a file": ("index a.jsonl notes.txt/c.db", ""),
    "onto another file": ("index a.jsonl notes.txt", "notes.txt"),
    "onto the questions": ("index a.jsonl test.jsonl", "test.jsonl"),
    "no articles": ("index none.jsonl c.db", "none.jsonl.*no articles|no articles"),
    "of questions": ("index test.jsonl c.db", r"test\.jsonl:1: not .\"title\""),
    "nothing": ("", "required|usage"),
    "one file": ("index a.jsonl", "corpus"),
    "three files": ("index a.jsonl c.db d.db", "d.db"),
    "another command": ("indx a.jsonl c.db", "indx"),
}


@pytest.mark.parametrize(
    "words, said",
    cases(
        COMMANDS,
    ),
)
def test_the_index_command(refuses, articles, words, said):
    refuses(INDEX, words, said)


BAD_ARTICLES = {
    "half an object": (b"{", ""),
    "a list": (b"[]", "title"),
    "a number": (b"3", "title"),
    "no text": (b'{"title": "x"}', "title"),
    "text as a number": (b'{"title": "x", "text": 3}', "title"),
    "title as null": (b'{"title": null, "text": "x"}', "title"),
    "title twice": (b'{"title": "x", "title": "y", "text": "x"}', "title"),
    "nothing in it": (b'{"title": "", "text": " "}', "title"),
    "lone surrogate": (b'{"title": "\\ud800", "text": "x"}', "surrogate"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "not UTF-8": (b"\xff", "utf-8"),
    "NaN": (b'{"title": "x", "text": "y", "z": NaN}', "NaN"),
}


@pytest.mark.parametrize(
    "line, said",
    cases(
        BAD_ARTICLES,
    ),
)
def test_an_article(refuses, articles, tmp_path, line, said):
    """A corpus that is there already stays as it is."""
    (tmp_path / "bad.jsonl").write_bytes(ARTICLE + line + b"\n" + ARTICLE)
    Corpus.from_articles([("old", "corpus")], str(tmp_path / "c.db")).connection.close()
    refuses(INDEX, "index bad.jsonl c.db", rf"bad\.jsonl:2: .*{said}")


# --- places for output ------------------------------------------------------------------------------------------------


OUTPUTS = {
    "a folder": "folder",
    "this folder": ".",
    "in no folder": "nowhere/x.json",
    "in a file": "notes.txt/x.json",
    "a link to nowhere": "link",
    "a long name": "n" * 300,
}


@pytest.mark.parametrize("place", cases(OUTPUTS))
@pytest.mark.parametrize("script", [EVAL, BENCH], ids=["eval", "bench"])
def test_a_place_for_figures(refuses, request, tmp_path, script, place):
    """It shows before a model loads, not after hours of evaluation."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere/x.json")
    refuses(script, f"--output {place}", "")


def test_a_place_for_figures_of_a_benchmark(refuses, tmp_path):
    (tmp_path / "folder").mkdir()
    refuses(BENCHMARK, "--output folder", "--output folder is a folder")


class Full(io.TextIOBase):
    """A stdout on a full disk, which fails when its buffer is written."""

    def write(self, text):
        return len(text)

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full(refuses, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: ({}, []))
    monkeypatch.setattr(evaluation, "table", lambda *_: "")
    refuses(EVAL, "--output=", "No space left on device", models=True)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_a_disk_that_is_full_under_the_index_command(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ARTICLE)
    command = [sys.executable, str(ROOT / "tasks.py"), "index", "a.jsonl", "c.db"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "tasks.py: [Errno 28] No space left on device\n"


# --- model folders ----------------------------------------------------------------------------------------------------

TEMPLATE, WEIGHTS, CONFIG = "chat_template.jinja", "model.safetensors", "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
Change = Callable[[Path], Any]


def put(name: str, data: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for path in map(folder.joinpath, names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def halve(name: str) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def fields(name: str, **values: Any) -> Change:
    """Other values in a JSON file; None removes the field."""

    def change(folder: Path) -> None:
        new = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in new.items() if value is not None}))

    return change


def weights(edit: Callable[[dict], Any], name: str = WEIGHTS) -> Change:
    def change(folder: Path) -> None:
        state = load_file(folder / name)
        edit(state)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})

    return change


def drop(part: str) -> Callable[[dict], None]:
    def edit(state: dict) -> None:
        for key in [key for key in state if part in key]:
            del state[key]

    return edit


def shorten(part: str) -> Callable[[dict], None]:
    def edit(state: dict) -> None:
        key = next(key for key in state if part in key)
        state[key] = state[key][:-1]

    return edit


def empty(folder: Path) -> None:
    remove(*os.listdir(folder))(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_BASE = json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "./nowhere"})
LEFT_OUT = "<|user|>hello<|assistant|>"
ONLY_SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
MODELS = {
    "no template": remove(TEMPLATE),
    "empty template": put(TEMPLATE, ""),
    "template with a syntax error": put(TEMPLATE, "{% for m in %}"),
    "template that leaves the message out": put(TEMPLATE, LEFT_OUT),
    "template for system messages": put(TEMPLATE, ONLY_SYSTEM),
    "template that changes the message": put(TEMPLATE, "{{ messages[0].content | upper }}"),
    "template that refuses": put(TEMPLATE, "{{ raise_exception('no users') }}"),
    "template that refuses without a word": put(TEMPLATE, "{{ raise_exception('') }}"),
    "template that divides by zero": put(TEMPLATE, "{{ 1 / 0 }}"),
    "template not in UTF-8": put(TEMPLATE, b"\xff\xfe"),
    "no tokenizer": remove(*TOKENIZER),
    "no words": remove("tokenizer.json"),
    "tokenizer of garbage": put("tokenizer.json", "garbage"),
    "half a tokenizer": halve("tokenizer.json"),
    "settings of garbage": put("tokenizer_config.json", "{"),
    "settings as a list": put("tokenizer_config.json", "[]"),
    "no config": remove(CONFIG),
    "empty config": put(CONFIG, "{}"),
    "config of garbage": put(CONFIG, "{"),
    "config as a list": put(CONFIG, "[]"),
    "unknown type": fields(CONFIG, model_type="frobnicate"),
    "type of another family": fields(CONFIG, model_type="t5", architectures=["T5Model"]),
    "type without our names": fields(CONFIG, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "a layer too many": fields(CONFIG, num_hidden_layers=4, layer_types=None),
    "other heads": fields(CONFIG, num_attention_heads=3),
    "a larger vocabulary": fields(CONFIG, vocab_size=1000),
    "positions as a word": fields(CONFIG, max_position_embeddings="many"),
    "no weights": remove(WEIGHTS),
    "half the weights": halve(WEIGHTS),
    "empty weights": put(WEIGHTS, b""),
    "zeros for weights": put(WEIGHTS, bytes(5000)),
    "a pointer for weights": put(WEIGHTS, POINTER),
    "weights without a part": weights(drop("mlp")),
    "weights without a layer": weights(drop("layers.2.")),
    "weights of another shape": weights(shorten("mlp.up")),
    "embeddings of another shape": weights(shorten("embed")),
    "an index without its files": both(
        remove(WEIGHTS), put(f"{WEIGHTS}.index.json", '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')
    ),
    "an empty folder": empty,
    "a file": a_file,
    "an adapter alone": both(empty, put("adapter_config.json", NO_BASE)),
    "a broken adapter alone": both(empty, put("adapter_config.json", "{")),
}


@pytest.mark.parametrize(
    "change",
    cases(
        MODELS,
    ),
)
def test_a_model_folder(refuses, tmp_path, change):
    shutil.copytree(BACKBONE, tmp_path / "my")
    change(tmp_path / "my")
    line = refuses(EVAL, "--frozen_model ./my", r"(cannot load a model from \./my|\./my needs a chat template)", True)
    assert len(line) > 50 and not line.endswith(":")  # the reason is in it


@pytest.mark.parametrize("name", ["./nowhere", "/dev/null", "nowhere", "no/where", "a/b/c"])
@pytest.mark.parametrize("flag", ["--model", "--frozen_model"])
def test_a_model_that_is_not_there(refuses, flag, name):
    refuses(TRAIN, f"{flag} {name}", f"cannot load a model from {name}", models=True)


def test_a_run_without_a_checkpoint_is_no_planner(refuses, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "my")
    shutil.rmtree(tmp_path / "my" / "checkpoint")
    refuses(EVAL, "--planners ./my", "cannot load a model from ./my", models=True)


LONG = {
    "completions": ("--max_tokens 5000", lambda folder: None),
    "prompts": ("--max_tokens 8", fields(CONFIG, max_position_embeddings=20)),
    "memory": ("--max_turns 3 --max_tokens 30", fields(CONFIG, max_position_embeddings=60)),
}


@pytest.mark.parametrize("words, change", cases(LONG))
@pytest.mark.parametrize("script", [TRAIN, EVAL], ids=["train", "eval"])
def test_more_tokens_than_positions(refuses, tmp_path, script, words, change):
    shutil.copytree(BACKBONE, tmp_path / "my")
    change(tmp_path / "my")
    model = "--model ./my" if script is TRAIN else "--planners ./my --frozen_model ./my"
    advice = r"of the model's \d+ positions: lower --result_chars, --max_turns or --max_tokens"
    refuses(script, f"{model} {words}", advice, models=True, rollout=True)


# --- the folder of a run ----------------------------------------------------------------------------------------------


class Idle:
    """An engine that is never asked."""

    def sleep(self):
        pass

    def load_weights(self, state):
        pass


@pytest.fixture
def resume_refuses(refuses, finished, tmp_path, monkeypatch):
    """Change a copy of the run, as if somebody had done so, and give its command again: it must refuse, and every file
    of the run must stay as it is."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(train, "open_engines", lambda *_: (Idle(), Idle()))

    def call(change: Change, said: str, words: str = "") -> None:
        change(tmp_path / "run")
        before = files(tmp_path)
        refuses(TRAIN, f"--run_dir run {words}", said, models=True)
        assert files(tmp_path) == before

    return call


def line(name: str, number: int, text: str | bytes) -> Change:
    """Another text in a line of a log."""

    def change(folder: Path) -> None:
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        lines[number] = (text.encode() if isinstance(text, str) else text) + b"\n"
        (folder / name).write_bytes(b"".join(lines))

    return change


def folder_for(name: str) -> Change:
    return both(remove(name), lambda folder: (folder / name).mkdir())


def trainer(edit: Callable[[dict], Any], step: int | None = None) -> Change:
    """Other contents in trainer.pt, at another step."""

    def change(folder: Path) -> None:
        path = folder / "checkpoint" / "trainer.pt"
        state = torch.load(path, weights_only=True)
        state = edit(state) or state
        if step is not None:  # of the last checkpoint
            state["step"] = step
        torch.save(state, path)

    return change


def fewer_parameters(state: dict) -> None:
    state["optimizer"]["param_groups"][0]["params"].pop()


LOGS, POINT, OTHER = ("metrics.jsonl", "rollouts.jsonl"), "checkpoint is damaged", "holds a run with other"
POINT_WEIGHTS = f"checkpoint/{WEIGHTS}"
RUNS = {
    "another flag": (fields(CONFIG, group_size=9), f"{OTHER} --group_size"),
    "two other flags": (fields(CONFIG, seed=9, task="x"), f"{OTHER} --task, --seed"),
    "a flag that is gone": (fields(CONFIG, seed=None), f"{OTHER} --seed"),
    "a flag of another version": (fields(CONFIG, new_flag=1), "new_flag"),
    "config as a list": (put(CONFIG, "[]"), "config.json"),
    "config as a number": (put(CONFIG, "3"), "config.json"),
    "empty config": (put(CONFIG, ""), "config.json is damaged"),
    "half a config": (put(CONFIG, '{"a'), "config.json is damaged"),
    "deep config": (put(CONFIG, "[" * 100_000), "config.json is damaged"),
    "config not in UTF-8": (put(CONFIG, b"\xff"), "config.json is damaged"),
    "no config": (remove(CONFIG), "config.json"),
    "config is a folder": (folder_for(CONFIG), "config.json"),
    **{
        f"{name.split('.')[0]}: {kind}": (change(name), f"{name}")
        for name in LOGS
        for kind, change in {
            "damaged line": lambda name: line(name, 1, '{"step": 1, "half'),
            "binary": lambda name: put(name, bytes(range(256)) * 4),
            "a list": lambda name: put(name, "[]\n"),
            "no step": lambda name: line(name, 1, '{"reward": 1}'),
            "step as a text": lambda name: line(name, 1, '{"step": "1"}'),
            "step as null": lambda name: line(name, 1, '{"step": null}'),
            "step as a list": lambda name: line(name, 1, '{"step": [1]}'),
            "not UTF-8": lambda name: line(name, 1, b"\xff"),
            "deep": lambda name: line(name, 1, "[" * 100_000),
            "a folder": folder_for,
            "notes": lambda name: put(name, "my own notes, in one line"),
        }.items()
    },
    "no trainer": (remove("checkpoint/trainer.pt"), POINT),
    "half a trainer": (halve("checkpoint/trainer.pt"), POINT),
    "text for a trainer": (put("checkpoint/trainer.pt", "text"), POINT),
    "trainer as a list": (trainer(lambda state: [state]), POINT),
    "trainer without fields": (trainer(lambda state: {"step": 1}), POINT),
    "trainer of fewer parameters": (trainer(fewer_parameters), POINT),
    "trainer without a result": (trainer(lambda state: state | {"result": None}), POINT),
    "trainer of step -5": (trainer(lambda state: None, step=-5), POINT),
    "trainer of step 0": (trainer(lambda state: None, step=0), POINT),
    "trainer of step 1.0": (trainer(lambda state: None, step=1.0), POINT),
    "trainer of step two": (trainer(lambda state: None, step="two"), POINT),
    "half the weights": (halve(POINT_WEIGHTS), POINT),
    "no weights": (remove(POINT_WEIGHTS), POINT),
    "weights without a part": (weights(drop("mlp"), POINT_WEIGHTS), POINT),
    "weights of another shape": (weights(shorten("mlp.up"), POINT_WEIGHTS), POINT),
    "a layer less": (
        fields(f"checkpoint/{CONFIG}", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        POINT,
    ),
    "no model config": (remove(f"checkpoint/{CONFIG}"), POINT),
    "checkpoint is a file": (both(remove("checkpoint"), put("checkpoint", "x")), POINT),
    "empty checkpoint": (both(remove("checkpoint"), lambda folder: (folder / "checkpoint").mkdir()), POINT),
    "lock is a folder": (both(remove("lock"), lambda folder: (folder / "lock").mkdir()), "lock"),
}


@pytest.mark.parametrize(
    "change, said",
    cases(
        RUNS,
    ),
)
def test_an_unfinished_run_that_was_changed(resume_refuses, change, said):
    resume_refuses(both(remove("result.json"), change), said)


RESULTS = {
    "a list": "[]",
    "nothing": "",
    "half": '{"before"',
    "no fields": "{}",
    "before as null": {"before": None},
    "before without figures": {"before": {}},
    "no seconds": {"train_seconds": None},
    "seconds as a text": {"train_seconds": "long"},
}


@pytest.mark.parametrize("change", cases(RESULTS))
def test_a_result_that_was_changed(resume_refuses, change):
    edit = put("result.json", change) if isinstance(change, str) else fields("result.json", **change)
    resume_refuses(edit, "result.json is damaged")


@pytest.mark.parametrize("change", cases({"removed": remove("metrics.jsonl"), "empty": put("metrics.jsonl", "")}))
def test_a_run_whose_log_is_gone_still_ends(finished, task, box, tmp_path, monkeypatch, change):
    """The hole in the log must not cost the result, which comes last."""
    shutil.copytree(finished, tmp_path / "run")
    figures = json.loads((finished / "result.json").read_text())["after"]
    both(remove("result.json"), change)(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_engines", lambda *_: (Idle(), Idle()))
    monkeypatch.setattr(train, "run_test", lambda *_: figures)
    monkeypatch.setattr(evaluation, "Sandbox", lambda: box)
    monkeypatch.setattr(sys, "argv", ["train.py", *TRAIN.flags.format(task=task).split(), "--run_dir", "run"])
    TRAIN.run()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["after"] == figures
    shutil.rmtree(tmp_path)


def no_checkpoint(folder: Path) -> None:
    """Somebody removed it to save space, long after the first one was saved."""
    remove("result.json", "checkpoint")(folder)


def test_another_process_trains_there(resume_refuses, tmp_path):
    code = "import fcntl; f = open('run/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=1); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        resume_refuses(remove("result.json"), "another process trains in run: .*--run_dir")
    finally:
        holder.communicate("\n")


PLACES = {
    "a file": ("notes.txt", "notes.txt"),
    "in a file": ("notes.txt/run", "notes.txt"),
    "a link to nowhere": ("link", "link"),
    "a device": ("/dev/null", "/dev/null"),
    "a long name": ("n" * 300, "File name too long"),
    "a model": ("model", "model"),
    "a task": ("folder", "folder"),
    "a checkpoint": ("run/checkpoint", "checkpoint"),
}


@pytest.mark.parametrize("place, said", cases(PLACES))
def test_a_place_for_a_run(refuses, finished, tmp_path, monkeypatch, place, said):
    """A folder that holds something else stays as it is, its own config.json and logs above all."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    shutil.copytree(BACKBONE, tmp_path / "model")
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "folder").mkdir()
    for name in (CONFIG, "rollouts.jsonl", "test_before.jsonl"):
        (tmp_path / "folder" / name).write_text('{"question": "mine"}\n')
    monkeypatch.setattr(train, "open_engines", lambda *_: (Idle(), Idle()))
    refuses(TRAIN, f"--run_dir {place}", said, models=False)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_run_folder_that_cannot_be_written_to(resume_refuses, tmp_path):
    resume_refuses(lambda folder: folder.chmod(0o500), "Permission denied")


# --- the lab's commands -----------------------------------------------------------------------------------------------


def record(**changes) -> str:
    return json.dumps(dict.fromkeys(report.TRAJECTORY, "x") | changes) + "\n"


TURN = dict.fromkeys(report.TURN, "x")
REPORTS = {
    "no folder": (shutil.rmtree, "config.json"),
    "no config": (remove(CONFIG), "config.json"),
    "half a config": (put(CONFIG, "{"), "config.json is damaged"),
    "config as a list": (put(CONFIG, "[]"), "config.json lacks"),
    "deep config": (put(CONFIG, "[" * 100_000), "config.json"),
    "metrics as a list": (put("metrics.jsonl", "[]\n"), "metrics.jsonl:1"),
    "deep metrics": (put("metrics.jsonl", "[" * 100_000 + "\n"), "metrics.jsonl"),
    "rollouts without fields": (put("rollouts.jsonl", '{"step": 1}\n'), "rollouts.jsonl:1"),
    "turns as a number": (put("rollouts.jsonl", record(turns=1)), "rollouts.jsonl"),
    "turns without fields": (put("rollouts.jsonl", record(turns=[{}])), "rollouts.jsonl"),
    "tokens as a number": (put("rollouts.jsonl", record(turns=[TURN | {"completion_ids": 1}])), "rollouts.jsonl"),
    "tokens as texts": (put("rollouts.jsonl", record(turns=[TURN | {"completion_ids": ["a"]}])), "rollouts.jsonl"),
    "result without fields": (put("result.json", "{}"), "result.json lacks"),
    "result as a number": (put("result.json", "3"), "result.json lacks"),
    "deep result": (put("result.json", "[" * 100_000), "result.json"),
    "a broken tokenizer": (put("checkpoint/tokenizer.json", "x"), "tokenizer"),
    "a folder for the page": (lambda folder: (folder / "report.html").mkdir(), "report.html"),
}


@pytest.mark.parametrize("change, said", cases(REPORTS))
def test_a_report(refuses, finished, tmp_path, change, said):
    shutil.copytree(finished, tmp_path / "run")
    change(tmp_path / "run")
    refuses(REPORT, "run", said)


PREPARED = {
    "from nowhere": (None, "nothing out", "there is no nothing"),
    "without a folder": (GOOD, "in.json", "in.json"),
    "nothing": (b"", "in.json out", "no questions"),
    "an empty list": (b"[]", "in.json out", "no questions"),
    "numbers": (b"[1]", "in.json out", "in.json, row 1"),
    "deep": (b"[" * 100_000, "in.json out", "in.json"),
    "not UTF-8": (b"\xff", "in.json out", "in.json:1"),
    "NaN": (b'[{"question": "q", "answer": NaN}]', "in.json out", "NaN"),
    "a number beyond floats": (b'[{"question": "q", "answer": 1e400}]', "in.json out", "row 1"),
    "question twice": (b'[{"question": "a", "question": "b", "answer": "x"}]', "in.json out", "question"),
    "kind of dots": (b'[{"question": "q", "answer": "x", "kind": "..x_judge"}]', "in.json out", "row 1"),
    "kind as a list": (b'[{"question": "q", "answer": "x", "kind": []}]', "in.json out", "row 1"),
    "options as numbers": (b'[{"question": "q", "options": [1, 2], "answer": "A"}]', "in.json out", "row 1"),
    "into a file": (GOOD, "in.json notes.txt", "notes.txt"),
    "from a folder": (GOOD, "folder out", "folder"),
    "onto itself": (GOOD, "folder/test.jsonl folder", "is the published file itself"),
    "no such split": (GOOD, "in.json out --split val", "val"),
}


@pytest.mark.parametrize(
    "data, words, said",
    cases(
        PREPARED,
    ),
)
def test_a_file_to_prepare(refuses, tmp_path, data, words, said):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "test.jsonl").write_bytes(GOOD)
    if data is not None:
        (tmp_path / "in.json").write_bytes(data)
    refuses(PREPARE, words, said)


KEPT = {
    "notes": "my own notes\n",
    "a list": "[]\n",
    "no fields": "{}\n",
    "deep": "[" * 100_000 + "\n",
    "no answer": json.dumps(dict.fromkeys(benchmark.KEY, "x")) + "\n",
}


@pytest.mark.parametrize(
    "text",
    cases(
        KEPT,
    ),
)
def test_answers_that_are_not_ours(refuses, tmp_path, text):
    (tmp_path / "k.answers.jsonl").write_text(text)
    refuses(BENCHMARK, "--output k.json", r"k\.answers\.jsonl")


@pytest.mark.parametrize("text", cases({"half": "{", "a list": "[]", "no fields": "{}"}))
def test_a_benchmark_of_a_run_that_was_changed(refuses, finished, tmp_path, text):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / CONFIG).write_text(text)
    refuses(BENCHMARK, "--planners run", "run/config.json", models=True)


def test_bare_nothing_is_no_planner(refuses):
    refuses(BENCHMARK, "--planners bare:", "bare:", models=True)


# --- what models write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["*", " ", "> ", "#", "_", "`", "-", "1. ", "Tool: ", "\n", "**Tool** "])
def test_a_plan_of_one_mark_is_read_at_once(text):
    """A policy that has gone wrong repeats one token up to the limit, in every trajectory of a step."""
    start = time.process_time()
    with pytest.raises(agent.PlanError):
        agent.parse_plan((text * 6000)[:6000])
    assert time.process_time() - start < 0.3
