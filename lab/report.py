"""A page to look into a run: learning curves, questions by reward, trajectories side by side, tokens by what changed.

    python -m lab.report runs/tinyworld-seed0     # writes runs/tinyworld-seed0/report.html, also while the run goes on
    python -m lab.report runs/tinyworld-seed0 --serve     # shows it at http://127.0.0.1:8000, always up to date

The page is one file that works in any browser without server or network. Its template, report.html, lies beside this
script. What a model wrote stays data all the way: JSON in which every `<` is escaped, from which the page's script
makes text nodes. The page's policy runs no script but that one, known by its hash, and forbids every request.

A served page is the same page with the lines of live.html. It asks only its server, and only whether a log has grown.
"""

import json
import re
from base64 import b64encode
from contextlib import suppress
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.hf_argparser import string_to_bool

import tasks
from eval import one_line_errors, table
from tools import UserError
from train import whole

TEMPLATE, LIVE = (Path(__file__).with_name(name) for name in ("report.html", "live.html"))
LOGS = "metrics.jsonl rollouts.jsonl test_before.jsonl test_after.jsonl result.json".split()
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


def read_template(live: bool = False) -> tuple[str, str]:
    """(the template, its Content-Security-Policy: its own scripts and styles, and not one request). A live page may
    send requests to its own server."""
    template = TEMPLATE.read_text(encoding="utf-8")
    if live:
        template = template.replace("</html>", LIVE.read_text(encoding="utf-8") + "</html>")

    def hashes(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)

    own = f"script-src {hashes('script')}; style-src {hashes('style')}"
    own += "; connect-src 'self'" if live else ""
    return template, f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def block(name: str, data: Any) -> str:
    """Data for the page's script. In JSON, `<` stands in texts only. Escaped, it cannot end the block."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def make_page(run: Path, live: str = "") -> str:
    """The whole page of a run folder. `UserError` if there is nothing to show, or a file is damaged. `live` is the
    version of the logs that a served page shows; it may show a run before its first step."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not the folder of a run: there is no config.json in it")
    config = read_json(run / "config.json", CONFIG)
    groups, metrics = read_groups(run), read_log(run / "metrics.jsonl", {"step": int})
    if not groups and not live:
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
    blocks += [block("version", live)] if live else []
    template, policy = read_template(bool(live))
    page = template.replace("POLICY", policy)
    return page.replace("<!-- DATA -->\n", block("run", overview) + "".join(blocks))  # last: it may hold any text


# --- the page while the run goes on -----------------------------------------------------------------------------------


def version(run: Path) -> str:
    """A text that changes when a log grows. It stands in quotes, as HTTP asks of an ETag."""
    sizes = [path.stat().st_size if path.exists() else 0 for path in (run / name for name in LOGS)]
    return f'"{"-".join(map(str, sizes))}"'


class LivePage(BaseHTTPRequestHandler):
    """Serves the page of `server.run` as `/`, made anew for each GET, and nothing else. HEAD only tells the version."""

    def do_GET(self) -> None:
        # A foreign site may let its own name point to 127.0.0.1, to read the page through the reader's browser.
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", self.headers.get("Host", "")):
            self.send_error(403, "Ask for 127.0.0.1 or localhost")
        elif self.path != "/":
            self.send_error(404)
        else:
            try:
                tag = version(self.server.run)  # read before the logs: what is written meanwhile is a new version
                page = make_page(self.server.run, tag) if self.command == "GET" else ""
                policy = read_template(live=True)[1] + "; frame-ancestors 'none'"
                self.answer(200, page, {"Content-Type": "text/html", "Content-Security-Policy": policy, "ETag": tag})
            except (UserError, OSError) as error:  # such as a checkpoint that is just being replaced
                self.answer(503, f"{error}\n", {"Content-Type": "text/plain", "Refresh": "2"})

    do_HEAD = do_GET

    def answer(self, status: int, text: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers["Content-Type"] += "; charset=utf-8"
        for item in (headers | {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}).items():
            self.send_header(*item)
        with suppress(ConnectionError):  # the reader has left
            self.end_headers()
            self.wfile.write(text.encode() if self.command == "GET" else b"")

    def log_message(self, *_) -> None:  # a page that looks for news would fill the terminal
        pass


def serve(run: Path, port: int) -> None:
    """Show the page of a run on this machine alone until Ctrl-C."""
    make_page(run, "start")  # what is wrong with the folder is said here
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), LivePage)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used ({error}): name another") from None
    server.run = run
    print(f"http://127.0.0.1:{server.server_port} shows {run} while it goes on; Ctrl-C ends it", flush=True)
    server.serve_forever()


def main() -> None:
    parser = tasks.Parser(description="Write RUN/report.html, one page to look into a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train.py")
    serving = dict(type=string_to_bool, nargs="?", const=True, default=False)
    parser.add_argument("--serve", **serving, help="web page for this machine alone, always up to date, not a file")
    parser.add_argument("--port", type=int, default=8000, help="port of the served page; 0: a free one")
    arguments = parser.parse_args()
    path = arguments.run / "report.html"
    with one_line_errors():
        if arguments.serve:
            return serve(arguments.run, arguments.port)
        path.write_text(make_page(path.parent), encoding="utf-8", newline="\n")
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
