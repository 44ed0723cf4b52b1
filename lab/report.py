"""A page to look into a run: learning curves, questions by reward, trajectories side by side, tokens by what changed.

    python -m lab.report runs/tinyworld-seed0     # writes runs/tinyworld-seed0/report.html, also while the run goes on

The page is one file that works in any browser without server or network. Its template, report.html, lies beside this
script. What a model wrote stays data all the way: JSON in which every `<` is escaped, from which the page's script
makes text nodes. The page's policy runs no script but that one, known by its hash, and forbids every request.
"""

import json
import re
from base64 import b64encode
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import tasks
from eval import one_line_errors, table
from tools import UserError
from train import whole

TEMPLATE = Path(__file__).with_name("report.html")
# What the page reads of a run, and its types. Of a group's trajectories, the first five fields are the same.
NUMBER = int | float
CONFIG = dict(model=str, task=str, seed=int, steps=int, questions_per_step=int, group_size=int)
SHARED = dict(step=int, question=str, expected=str | list, family=str, analysis=str)
TRAJECTORY = SHARED | dict(answer=str, reward=NUMBER, advantage=NUMBER, turns=list)
TURN = dict.fromkeys("sub_goal tool command result verdict error".split(), str)
TURN |= dict.fromkeys("completion_ids logprobs ref_logprobs".split(), list)
FIGURES = dict.fromkeys("accuracy n turns tool_error_rate".split(), NUMBER)
FIGURES |= dict(interval=list, by_family=dict, tool_shares=dict, tokens=dict)


def check_fields(place: str, data: Any, types: dict[str, Any]) -> None:
    """`UserError` if `data`, which stands at `place`, is not an object with all these fields."""
    fields = data if isinstance(data, dict) else {}
    wrong = [name for name, kind in types.items() if not isinstance(fields.get(name), kind)]
    if wrong:
        raise UserError(f"{place} lacks valid {', '.join(wrong)}: remove it, or use the code that made the run")


def read_json(path: Path, types: dict[str, Any]) -> dict:
    """A file of a run, which must have these fields."""
    with whole(path):
        data = json.loads(path.read_text())
    check_fields(str(path), data, types)
    return data


def read_log(path: Path, types: dict[str, Any]) -> list[dict]:
    """The records of a log, each with these fields; [] before there is one. A last line that is still being written is
    left out."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            records.append(json.loads(line, parse_constant=lambda name: None))  # browsers know no NaN in JSON
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is damaged ({error}): remove that line") from None
        check_fields(f"{path}:{number}", records[-1], types)
    return records


def read_trajectories(path: Path) -> list[dict]:
    trajectories = read_log(path, TRAJECTORY)
    for number, trajectory in enumerate(trajectories, start=1):
        for turn in trajectory["turns"]:
            check_fields(f"{path}:{number}, a turn,", turn, TURN)
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
        # Some tokenizers drop the space of the first token. So each is decoded twice in a row; the second is taken.
        decode = partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
        once, twice = (decode([[i] * n for i in ids]) for n in (1, 2))
    except Exception as error:  # the libraries raise nearly every class for what can be wrong with a folder
        raise UserError(f"cannot read tokens with the tokenizer of {folder}: {str(error) or repr(error)}") from error
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
    config = read_json(run / "config.json", CONFIG)
    groups, metrics = read_groups(run), read_log(run / "metrics.jsonl", {"step": int})
    if not groups:
        raise UserError(f"{run} holds no trajectories yet: wait for its first step")
    test_table = ""
    if (run / "result.json").is_file():
        result = read_json(run / "result.json", {"before": dict, "after": dict})
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
    parser = tasks.Parser(description="Write RUN/report.html, one page to look into a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train.py")
    path = parser.parse_args().run / "report.html"
    with one_line_errors():
        path.write_text(make_page(path.parent), encoding="utf-8", newline="\n")
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
