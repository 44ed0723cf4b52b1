"""A page to look into a run: learning curves, questions by reward, trajectories side by side, tokens by what changed.

    python -m lab.report runs/tinyworld-seed0     # writes runs/tinyworld-seed0/report.html, also while the run goes on

The page is one file that works in any browser without server or network. Its template, report.html, lies beside this
script. What a model wrote stays data all the way: JSON in which every `<` is escaped, from which the page's script
makes text nodes. The page's policy runs no script but that one, known by its hash, and forbids every request.
"""

import argparse
import json
import re
import sys
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from eval import table
from tools import UserError

TEMPLATE = Path(__file__).with_name("report.html")
# What the page reads of a run. Of a group's trajectories, the first five fields are the same.
SHARED = ("step", "question", "expected", "family", "analysis")
TRAJECTORY = (*SHARED, "answer", "reward", "advantage", "turns")
TURN = ("sub_goal", "tool", "command", "result", "verdict", "error", "completion_ids", "logprobs", "ref_logprobs")
FIGURES = ("accuracy", "interval", "n", "by_family", "turns", "tool_shares", "tool_error_rate", "tokens")


def check_fields(place: str, data: Any, names: Iterable[str]) -> None:
    """`UserError` if `data`, which stands at `place`, is not an object with all these fields."""
    missing = [name for name in names if not isinstance(data, dict) or name not in data]
    if missing:
        raise UserError(f"{place} lacks {', '.join(missing)}: it was not written by this version of train.py")


def read_json(path: Path, *names: str) -> dict:
    """A file of a run, which must have these fields."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    check_fields(str(path), data, names)
    return data


def read_log(path: Path, *names: str) -> list[dict]:
    """The records of a log, each with these fields; [] before there is one. A last line that is still being written is
    left out."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            records.append(json.loads(line, parse_constant=lambda name: None))  # browsers know no NaN in JSON
        except ValueError as error:
            raise UserError(f"{path}:{number} is damaged ({error}): remove that line") from None
        check_fields(f"{path}:{number}", records[-1], names)
    return records


def read_trajectories(path: Path) -> list[dict]:
    trajectories = read_log(path, *TRAJECTORY)
    for trajectory in trajectories:
        for turn in trajectory["turns"]:
            check_fields(f"a turn in {path}", turn, TURN)
    return trajectories


def read_groups(run: Path) -> list[tuple[dict, list[dict]]]:
    """(what its trajectories share, the trajectories) of each group: one test question before and after training, or
    the G rollouts of a question in a step."""
    rollouts = groupby(read_trajectories(run / "rollouts.jsonl"), key=lambda t: (t["step"], t["question"]))
    before, after = (read_trajectories(run / f"test_{when}.jsonl") for when in ("before", "after"))
    tests = [list(pair) for pair in zip(before, after)] or [[trajectory] for trajectory in before]
    groups = []
    for number, group in enumerate([*tests, *(list(group) for _, group in rollouts)]):
        shared = {name: group[0][name] for name in SHARED}
        shared |= {"rewards": [t["reward"] for t in group], "test": number < len(tests)}
        own = [{name: value for name, value in t.items() if name not in SHARED} for t in group]
        groups.append((shared, own))
    return groups


def token_texts(ids: set[int], run: Path, model: str) -> dict[int, str]:
    """The text of each token, by the tokenizer of the run. A token that is part of a character is shown as U+FFFD."""
    folder = run / "checkpoint" if (run / "checkpoint").is_dir() else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {folder}: {str(error).splitlines()[0]}") from error
    # Some tokenizers drop the space of the first token. So each is decoded twice in a row, and the second is taken.
    once, twice = (tokenizer.batch_decode([[i] * n for i in ids], clean_up_tokenization_spaces=False) for n in (1, 2))
    return {i: b[len(a) :] for i, a, b in zip(ids, once, twice)}


def policy(template: str) -> str:
    """The page's Content-Security-Policy: the template's own script and style, and not one request."""

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)

    own = f"script-src {hashes('script')}; style-src {hashes('style')}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def block(name: str, data: Any) -> str:
    """Data for the page's script. In JSON, `<` stands in texts only. Escaped, it cannot end the block."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def make_page(run: Path) -> str:
    """The whole page of a run folder. `UserError` if there is nothing to show, or a file is damaged."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not the folder of a run: there is no config.json in it")
    config = read_json(run / "config.json", "model", "steps")
    groups, metrics = read_groups(run), read_log(run / "metrics.jsonl", "step")
    if not groups:
        raise UserError(f"{run} holds no trajectories yet: wait for its first step")
    test_table = ""
    if (run / "result.json").is_file():
        result = read_json(run / "result.json", "before", "after")
        for when in ("before", "after"):
            check_fields(f"{run / 'result.json'}, {when}", result[when], FIGURES)
        test_table = table({"before": result["before"], "after": result["after"]})
        metrics.append({"step": config["steps"], "test_accuracy": result["after"]["accuracy"]})
    turns = [turn for _, trajectories in groups for trajectory in trajectories for turn in trajectory["turns"]]
    ids = {i for turn in turns for i in turn["completion_ids"]}
    overview = {
        "name": run.resolve().name,
        "config": config,
        "metrics": metrics,
        "table": test_table,
        "tokens": token_texts(ids, run, config["model"]),
        "groups": [shared for shared, _ in groups],
    }
    # A block for each group: the page reads one when it is opened, so that thousands of them open at once.
    blocks = [block(f"group{n}", trajectories) for n, (_, trajectories) in enumerate(groups)]
    template = TEMPLATE.read_text(encoding="utf-8")
    page = template.replace("POLICY", policy(template))
    return page.replace("<!-- DATA -->\n", block("run", overview) + "".join(blocks))  # last: it may hold any text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write RUN/report.html, one page to look into a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train.py")
    path = parser.parse_args().run / "report.html"
    try:
        path.write_text(make_page(path.parent), encoding="utf-8", newline="\n")
    except (UserError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
