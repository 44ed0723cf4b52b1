"""The page of a run, in a real Chromium without network: what it shows, how fast, and that no text of a model runs."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE

import pytest
from transformers import AutoTokenizer

from agent import Memory, Step, Trajectory, Turn
from lab import report
from lab.pretrain import BACKBONE
from lab.report import LivePage, main, make_page, token_texts
from tasks import Example
from train import Config, append, record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")


class Browser:
    """A headless Chromium, driven through its debugging pipe: JSON with a zero byte after it, on files 3 and 4."""

    def __init__(self, profile: str) -> None:
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        self.count, self.rest, self.events = 0, b"", []
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]

        def as_3_and_4() -> None:
            high_in, high_out = os.dup(theirs_in), os.dup(theirs_out)  # 3 or 4 may be taken by the other pipe
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"], pass_fds=(3, 4), preexec_fn=as_3_and_4, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            data = os.read(self.back, 1 << 20)
            assert data, "Chromium has ended"
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        for address in ("about:blank", url):  # first away: another fragment alone would not load the page anew
            self.events.clear()
            loader = self.call("Page.navigate", url=address)["loaderId"]
            while not any(
                event["method"] == "Page.lifecycleEvent"
                and (event["params"]["loaderId"], event["params"]["name"]) == (loader, "load")
                for event in self.events  # a live page that is left may end a load of its own
            ):
                self.events.append(self.receive())

    def js(self, expression: str):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r" if key == "Enter" else key} if kind == "keyDown" and key in ("Enter", "j", "k") else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)
        # A changed address is seen a moment later; it may even load the page anew. These two keys change none.
        time.sleep(0.02 if key in ("Tab", "ArrowRight") else 0.2)

    def complaints(self) -> list:
        """Console messages, errors, dialogs, and requests for anything but the page itself."""
        self.js("new Promise((done) => setTimeout(done, 50))")
        wrong = (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        )
        requests = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e for e in self.events if e["method"] in wrong] + requests[1:]


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.call("Page.navigate", url="about:blank")
        browser.process.kill()
        browser.process.wait()


# --- runs, written as train.py writes them ----------------------------------------------------------------------------

PLAN = "Justification: {who} is unknown.\nContext: Zilath\nSub-Goal: Find the mayor\nTool Name: Search"
METRICS = {
    "reward": 0.4, "turns": 2.5, "tool_shares": {"Search": 0.7, "Python_Coder": 0.3}, "tool_error_rate": 0.1,
    "kl": 0.01, "entropy": 0.2, "tokens_per_turn": 14.0, "t_rollout": 3.0, "t_update": 1.0, "t_eval": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan_ids():
    return AutoTokenizer.from_pretrained(BACKBONE)(PLAN.format(who="the mayor"))["input_ids"]


def trajectory(ids: list[int], reward: float, change: float = 0.5, turns: int = 2, text: str = "Pruzek") -> Trajectory:
    steps = [Step(f"Find {text}", "Search", f'Search(query="{text}")', f"Result: {text}", "STOP") for _ in range(turns)]
    rows = [Turn([1], ids, [-0.5] * len(ids), ref_logprobs=[-0.5 - change] * len(ids)) for _ in range(turns)]
    return Trajectory("q", rows, Memory("q", f"Look up {text}.", steps), text, reward, 2 * reward - 1)


def write_run(run: Path, groups: list, tests: tuple[list, list] = ((), ()), steps: int = 3) -> Path:
    """`groups`: (step, example, trajectories); `tests`: (example, trajectory) before and after training."""
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(Config(steps=steps, model=str(BACKBONE)))))
    append(run / "metrics.jsonl", {"step": 0, "test_accuracy": 0.2}, *(METRICS | {"step": n + 1} for n in range(steps)))
    append(run / "rollouts.jsonl", *(record(step, e, t) for step, e, group in groups for t in group))
    for when, pairs in zip(("before", "after"), tests):
        append(run / f"test_{when}.jsonl", *(record(0, *pair) for pair in pairs))
    return run


def address(run: Path, fragment: str = "") -> str:
    (run / "report.html").write_text(make_page(run), encoding="utf-8")
    return (run / "report.html").as_uri() + fragment


@pytest.fixture(scope="module")
def small(tmp_path_factory, plan_ids):
    """Three steps of two questions, one of which comes back in step 3; one test question that is learned, one lost."""
    mayor, year = Example("Who is the mayor?", "Pruzek", "lookup"), Example("Which year?", "1900", "two-hop")
    mixed = [trajectory(plan_ids, 1, turns=1), trajectory(plan_ids, 0, -1.5, turns=3), trajectory(plan_ids, 0, 0.0)]
    groups = [(1, mayor, mixed), (1, year, [trajectory(plan_ids, 0)] * 3), (3, mayor, [trajectory(plan_ids, 1)] * 3)]
    before = [(mayor, trajectory(plan_ids, 0)), (year, trajectory(plan_ids, 1))]
    after = [(mayor, trajectory(plan_ids, 1)), (year, trajectory(plan_ids, 0))]
    return write_run(tmp_path_factory.mktemp("runs") / "small", groups, (before, after))


ROWS = "[...document.querySelectorAll('#rows tr')].map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"
SHOWN = "document.getElementById('question').innerText"


# --- in the browser ---------------------------------------------------------------------------------------------------


@needs_chromium
def test_5000_trajectories_load_in_2_seconds(browser, tmp_path, plan_ids):
    group = [trajectory(plan_ids, n % 2, turns=4) for n in range(8)]
    groups = [(n // 15, Example(f"Question {n}?", "Pruzek", f"family {n % 6}"), group) for n in range(600)]
    test = [(Example(f"Test {n}?", "Pruzek"), group[0]) for n in range(100)]
    browser.open(address(write_run(tmp_path / "run", groups, (test, test), steps=40)))
    total, seconds = re.findall(r"\d+(?:\.\d+)?", browser.js("document.getElementById('built').textContent"))
    assert int(total) == 5000 and float(seconds) < 2
    assert len(browser.js(ROWS)) == 100 and browser.js("document.getElementById('count').textContent") == "700 of 700"
    assert len(browser.js("document.getElementById('more').click(), " + ROWS)) == 200
    assert browser.complaints() == []


HOSTILE = [
    "<script>document.title = 'ran'</script>",
    "</script><script>document.title = 'ran'</script>",
    "<img src=x onerror=\"document.title = 'ran'\">",
    "<!-- <script>",
    "]]> {{data}} <!-- DATA --> POLICY ${document.title='ran'} `",
    "javascript:document.title='ran'",
    "line\u2028end\u2029 and a tab\t and &lt;b&gt; and \\u003c",
]


@needs_chromium
@pytest.mark.parametrize("text", HOSTILE)
def test_markup_is_shown_and_not_run(browser, tmp_path, plan_ids, text):
    group = [trajectory(plan_ids, 1, text=text), trajectory(plan_ids, 0)]
    groups = [(1, Example(f"Q {text}", text, text), group)]
    url = address(write_run(tmp_path / "run", groups))
    shown = text.replace("\u2028", "\\u{2028}").replace("\u2029", "\\u{2029}")
    browser.open(url)
    assert browser.js(ROWS)[0][:2] == [f"Q {shown}".strip(), shown.strip()]
    browser.open(url + "#q=0")
    assert browser.js("document.querySelector('#question').textContent").count(shown) == 11  # each field of the record
    assert browser.js("document.title") == " ".join(f"Q {shown}".split())
    assert browser.js("document.querySelectorAll('script').length") == 3  # the page's own: run, group0 and the code
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.complaints() == []


@needs_chromium
def test_characters_without_a_shape_are_shown_by_their_code(browser, tmp_path, plan_ids):
    text = "a\u202eb\u200bc\x1b[2Jd\ufeff\u3164\ud800e שלום 👍 é"
    run = write_run(tmp_path / "run", [(1, Example("Q", "A"), [trajectory(plan_ids, 1, text=text)])])
    browser.open(address(run, "#q=0"))
    assert browser.js("document.querySelector('header strong').textContent") == (
        "a\\u{202e}b\\u{200b}c\\u{1b}[2Jd\\u{feff}\\u{3164}\\u{d800}e שלום 👍 é"
    )
    assert browser.complaints() == []


@needs_chromium
def test_the_policy_lets_nothing_in_or_out(browser, small):
    """Even a script that had got into the page could not run; and the page's own could not call home."""
    hits = []

    class Home(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Home)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}"
    browser.open(address(small))
    browser.js(f"""(async () => {{
        const add = (name, properties) => document.body.append(Object.assign(document.createElement(name), properties));
        add("script", {{ textContent: "document.title = 'ran'" }});
        add("script", {{ src: "{home}/script" }});
        add("img", {{ src: "{home}/img" }});
        add("iframe", {{ src: "{home}/iframe" }});
        add("link", {{ rel: "stylesheet", href: "{home}/css" }});
        add("link", {{ rel: "icon", href: "{home}/icon" }});
        add("div", {{ innerHTML: "<b onclick=\\"document.title = 'ran'\\">" }});
        document.querySelector("b").click();
        navigator.sendBeacon("{home}/beacon");
        try {{ new WebSocket("ws://127.0.0.1:{server.server_port}/socket"); }} catch {{}}
        await fetch("{home}/fetch", {{ mode: "no-cors" }}).catch(() => null);
        await new Promise((done) => setTimeout(done, 300));
    }})()""")
    server.shutdown()
    assert hits == [] and browser.js("document.title") == "Run small"


@needs_chromium
def test_a_question_shows_its_trajectories_side_by_side(browser, small, plan_ids):
    browser.open(address(small, "#q=2"))
    shown = browser.js(SHOWN)
    for text in ("Who is the mayor?", "Expected: Pruzek", "Step 1: mean reward 0.33 of 3", "advantage −1.00", "STOP"):
        assert text in shown
    assert browser.js("[...document.querySelectorAll('#question h3')].map((x) => x.textContent)") == (
        ["Step 1: mean reward 0.33 of 3", "Step 3: mean reward 1.00 of 3"]  # before and after
    )
    sections = "[...document.querySelectorAll('.columns')[0].children].map((x) => x.querySelectorAll('section'))"
    assert browser.js(f"{sections}.map((x) => x.length)") == [1, 3, 2]
    tops = browser.js(f"{sections}.map((x) => x[0].getBoundingClientRect().top)")
    assert len(set(tops)) == 1  # turn beside turn
    lefts = browser.js(f"{sections}.map((x) => x[0].getBoundingClientRect().left)")
    assert lefts == sorted(set(lefts))
    # The tokens are those of the planner, and their colours say what training changed: more likely, less, the same.
    texts = browser.js("[...document.querySelectorAll('.tokens')].map((x) => x.textContent)")
    assert texts[0].replace("↵", "") == PLAN.format(who="the mayor")
    colours = browser.js(f"{sections}.map((x) => getComputedStyle(x[0].querySelector('.token')).backgroundColor)")
    alphas = [float(re.search(r"/ ([\d.]+)\)", colour)[1]) for colour in colours]
    assert alphas == pytest.approx([0.1125, 0.3375, 0.0], abs=0.005) and len(set(colours)) == 3
    assert f"all tokens: +{0.5 * len(plan_ids):.2f} nats" in shown
    assert browser.complaints() == []


@needs_chromium
def test_before_and_after_of_a_test_question(browser, small):
    browser.open(address(small, "#q=0"))
    names = browser.js("[...document.querySelectorAll('article')].map((x) => x.querySelector('header').innerText)")
    assert [name.split("\n")[0] for name in names] == ["Before training", "After training"]
    assert "✗ reward 0" in names[0] and "✓ reward 1" in names[1] and "advantage" not in "".join(names)


@needs_chromium
def test_filter_and_sort(browser, small):
    browser.open(address(small))
    assert [row[1:] for row in browser.js(ROWS)] == [
        ["two-hop", "test", "1 → 0"],
        ["two-hop", "1", "0.00"],
        ["lookup", "1", "0.33"],
        ["lookup", "test", "0 → 1"],
        ["lookup", "3", "1.00"],
    ]
    sort = "document.querySelectorAll('th button')[{}].click(), " + ROWS
    assert [row[2] for row in browser.js(sort.format(2))] == ["1", "1", "3", "test", "test"]
    assert [row[2] for row in browser.js(sort.format(2))] == ["test", "test", "3", "1", "1"]
    assert browser.js("[...document.querySelectorAll('th')].map((x) => x.ariaSort)")[2:] == ["descending", "none"]
    choose = "document.forms[0].{}.value = '{}', document.forms[0].dispatchEvent(new Event('input')), " + ROWS
    assert [row[3] for row in browser.js(choose.format("reward", "test: better after training"))] == ["0 → 1"]
    assert [row[3] for row in browser.js(choose.format("reward", "test: worse after training"))] == ["1 → 0"]
    assert [row[3] for row in browser.js(choose.format("reward", "none right"))] == ["0.00"]
    assert len(browser.js(choose.format("reward", ""))) == 5
    assert len(browser.js(choose.format("family", "lookup"))) == 3
    assert len(browser.js(choose.format("from", "training"))) == 2
    assert browser.js(choose.format("search", "WHICH")) == []


@needs_chromium
def test_with_the_keyboard_alone(browser, small):
    browser.open(address(small))
    focus = "document.activeElement.textContent"
    for _ in range(30):
        browser.press("Tab")
        if browser.js("document.activeElement.closest('#rows') !== null"):
            break
    assert browser.js(focus) == "Which year?"
    browser.press("Enter")
    assert browser.js("location.hash") == "#q=1" and browser.js(focus) == "Which year?"
    browser.press("j")
    browser.press("j")
    assert browser.js("location.hash") == "#q=2"
    browser.press("k")
    browser.press("k")
    browser.press("k")
    assert browser.js("location.hash") == "#q=1"  # the first of the list
    browser.js("document.querySelector('.tokens').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert "log-prob −0.50, −1.00 under the initial policy: +0.50" in browser.js(SHOWN)
    browser.press("Escape")
    assert browser.js("document.getElementById('question').hidden") and browser.js(focus) == "Which year?"
    assert browser.complaints() == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_both_schemes(browser, small, scheme):
    """Nothing sticks out of a narrow screen, and text has a contrast of at least 4.5 (WCAG AA)."""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)

    def colour(selector: str, name: str) -> list[float]:
        """[red, green, blue, alpha], of `rgb(27, 28, 32)` or `color(srgb 0.1 0.4 0.8 / 0.5)`."""
        css = browser.js(f"getComputedStyle(document.querySelector('{selector}')).{name}")
        numbers = [float(x) for x in re.findall(r"[\d.]+", css)]
        return [x / 255 for x in numbers[:3]] + [1.0] if css.startswith("rgb(") else numbers

    def luminance(rgb: list[float]) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))

    for fragment, selectors in (
        ("", ("h1", "p.soft", "td a")),
        ("#q=2", ("dt", "dd", "p .right", "p .wrong", ".badge")),
    ):
        browser.open(address(small, fragment))
        assert browser.js("document.documentElement.scrollWidth") <= 360
        panel = colour("article" if fragment else "body", "backgroundColor")
        assert (luminance(panel[:3]) < 0.1) == (scheme == "dark")
        for selector in selectors:
            *text, _ = colour(f"main:not([hidden]) {selector}", "color")
            behind = panel
            if selector == ".badge":  # of the deepest colour, half transparent
                *top, alpha = colour(selector, "backgroundColor")
                behind = [alpha * x + (1 - alpha) * y for x, y in zip(top, panel)]
            lights = sorted((luminance(text), luminance(behind[:3])))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, selector
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", features=[])


@needs_chromium
def test_learning_curves(browser, small):
    browser.open(address(small))
    labels = browser.js(
        "[...document.querySelectorAll('#curves svg[role=img]')].map((x) => x.getAttribute('aria-label'))"
    )
    assert labels[0].startswith("Reward and accuracy (share): training reward from 0.4 to 0.4")
    assert len(labels) == 6 and "test accuracy from 0.2 to 0.2" in labels[0] and "nats per token" in labels[3]
    first = "document.querySelector('#curves .s0')"
    assert browser.js(f"{first}.querySelectorAll('circle').length") == 3
    x = browser.js(f"[...{first}.querySelectorAll('circle')].map((c) => Number(c.getAttribute('cx')))")
    y = browser.js(f"{first}.querySelector('circle').getAttribute('cy')")
    assert x[1] - x[0] == pytest.approx(x[2] - x[1]) and float(y) == pytest.approx(170 - 0.4 * 152)


LONG_WORD, LONG_TEXT = "W" * 500, "Which of the two was born first? " * 200


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_long_texts_stay_in_their_place(browser, tmp_path, plan_ids, width):
    """A word without a break wraps. A long text folds: it pushes neither columns aside nor the turns of others down."""
    group = [trajectory(plan_ids, 1), *(trajectory(plan_ids, 0, text=text) for text in (LONG_WORD, LONG_TEXT))]
    examples = [Example(LONG_WORD, LONG_WORD, LONG_WORD), Example(LONG_TEXT, [LONG_TEXT, LONG_WORD], LONG_TEXT)]
    run = write_run(tmp_path / LONG_WORD[:200], [(n, example, group) for n, example in enumerate(examples, start=1)])
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    for fragment in ("", "#q=0", "#q=1"):
        browser.open(address(run, fragment))
        assert browser.js("document.documentElement.scrollWidth") <= width
        wide = (
            "[...document.querySelectorAll('main:not([hidden]) :is(h1, h2, td, dd, p, select, .wide, table, article)')]"
        )
        assert browser.js(f"{wide}.filter((x) => x.scrollWidth > x.clientWidth + 1 && x.clientWidth).length") == 0
    top = "document.querySelector('article section').getBoundingClientRect().top - document.querySelector('article').{}"
    assert browser.js(top.format("getBoundingClientRect().top")) < 350
    assert browser.js("document.querySelector('h2.text').clientHeight") < 300
    assert browser.js("document.querySelector('#question h2').textContent") == LONG_TEXT  # the whole text is there
    folded = "document.querySelectorAll('article')[2].querySelector('details')"
    before = browser.js(f"{folded}.clientHeight")
    browser.js(f"{folded}.querySelector('summary').click()")
    assert browser.js(f"{folded}.open") and browser.js(f"{folded}.clientHeight") > 4 * before
    assert browser.complaints() == []
    browser.call("Emulation.clearDeviceMetricsOverride")


@needs_chromium
def test_without_metrics_there_are_no_curves(browser, small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    browser.open(address(run))
    assert len(browser.js(ROWS)) == 5 and browser.js("document.getElementById('curves').childElementCount") == 0
    assert browser.complaints() == []


# --- without a browser ------------------------------------------------------------------------------------------------


def test_token_texts_add_up_to_the_completion(plan_ids):
    texts = token_texts(set(plan_ids), Path("nowhere"), str(BACKBONE))
    assert "".join(texts[i] for i in plan_ids) == PLAN.format(who="the mayor")


def test_a_run_that_goes_on_or_was_interrupted(small, tmp_path):
    """Its last line may be half written; there is no test after training yet."""
    run = shutil.copytree(small, tmp_path / "run")
    (run / "test_after.jsonl").unlink()
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "quest')
    append(run / "metrics.jsonl", METRICS | {"step": 4, "kl": math.nan})
    page = make_page(run)
    assert '"rewards":[0],"test":true' in page and '"rewards":[1],"test":true' in page  # before alone
    assert '"kl":null' in page and "NaN" not in page


def rewrite(run: Path, name: str, **changes) -> None:
    """Change fields of the second line of a log, or of its second line's first turn."""
    lines = (run / name).read_text().splitlines()
    row = json.loads(lines[1])
    for key, value in changes.items():
        (row if key in row else row["turns"][0])[key] = value
    (run / name).write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n")


def config_of(**changes) -> str:
    return json.dumps(asdict(Config()) | changes)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda run: (run / "config.json").unlink(), "not the folder of a run"),
        (lambda run: [path.unlink() for path in run.glob("*.jsonl")], "no trajectories yet"),
        (lambda run: (run / "rollouts.jsonl").write_text('{"step"\n{}\n'), "rollouts.jsonl:1 is damaged"),
        (lambda run: (run / "rollouts.jsonl").write_text('{"step": 1}\n'), "rollouts.jsonl:1 lacks valid question,"),
        (lambda run: (run / "metrics.jsonl").write_text("5\n"), "metrics.jsonl:1 lacks valid step"),
        (lambda run: (run / "result.json").write_text('{"before": {}, "after": {}}'), "before lacks valid accuracy"),
        (lambda run: (run / "config.json").write_text('{"seed"'), "config.json is damaged"),
        (lambda run: (run / "result.json").write_text(""), "result.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"model": "x", "steps": 3}'), "config.json lacks valid task,"),
        (lambda run: (run / "config.json").write_text(config_of(model="no/such/model")), "cannot read tokens"),
        (lambda run: (run / "checkpoint").mkdir(), "cannot read tokens with the tokenizer of"),
        (lambda run: rewrite(run, "rollouts.jsonl", reward=None), "rollouts.jsonl:2 lacks valid reward"),
        (lambda run: rewrite(run, "rollouts.jsonl", advantage=math.nan), "rollouts.jsonl:2 lacks valid advantage"),
        (lambda run: rewrite(run, "rollouts.jsonl", turns=5), "rollouts.jsonl:2 lacks valid turns"),
        (lambda run: rewrite(run, "rollouts.jsonl", turns=[None]), "rollouts.jsonl:2, a turn, lacks valid sub_goal,"),
        (lambda run: rewrite(run, "rollouts.jsonl", logprobs=None), "rollouts.jsonl:2, a turn, lacks valid logprobs:"),
        (lambda run: rewrite(run, "rollouts.jsonl", completion_ids=["x"]), "cannot read tokens with the tokenizer of"),
        (lambda run: rewrite(run, "test_before.jsonl", question=[]), "test_before.jsonl:2 lacks valid question"),
        (lambda run: rewrite(run, "metrics.jsonl", step="1"), "metrics.jsonl:2 lacks valid step"),
        (lambda run: (run / "rollouts.jsonl").write_bytes(b"\xff\xfe\n"), "rollouts.jsonl:1 is damaged"),
        (lambda run: [(run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()], "Is a directory"),
        (lambda run: (run / "report.html").mkdir(), "Is a directory"),
        (lambda run: (run / "report.html").symlink_to("/dev/full"), "No space left"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(small, tmp_path, monkeypatch, capsys, spoil, said):
    run = shutil.copytree(small, tmp_path / "run")
    (run / "report.html").unlink(missing_ok=True)
    spoil(run)
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# --- served while the run goes on -------------------------------------------------------------------------------------


@contextmanager
def served(run: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), LivePage)
    server.run = run
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def ask(port: int, path: str = "/", method: str = "GET", host: str = "localhost") -> tuple[int, dict, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def data_of(page: str, name: str = "run"):
    return json.loads(re.search(f'<script type="application/json" id="{name}">(.*?)</script>', page)[1])


def add_step(run: Path, ids: list[int], step: int, question: str, text: str = "Pruzek") -> None:
    """As train.py ends a step: first the metrics, then the rollouts."""
    append(run / "metrics.jsonl", METRICS | {"step": step})
    group = [trajectory(ids, 1, text=text), trajectory(ids, 0, text=text)]
    append(run / "rollouts.jsonl", *(record(step, Example(question, text, text), t) for t in group))


@pytest.fixture
def going(small, tmp_path):
    """A run that is in its training: there is no test after it yet."""
    run = shutil.copytree(small, tmp_path / "going")
    (run / "test_after.jsonl").unlink()
    return run


def test_a_served_page_follows_the_logs(going, plan_ids):
    with served(going) as port:
        status, headers, first = ask(port)
        assert status == 200 and headers["ETag"] == ask(port, method="HEAD")[1]["ETag"] == data_of(first, "version")
        add_step(going, plan_ids, 4, "Who came last?")
        assert ask(port, method="HEAD")[1]["ETag"] != headers["ETag"]
        second = ask(port)[2]
        assert [m["step"] for m in data_of(second)["metrics"]] == [0, 1, 2, 3, 4]
        before, after = data_of(first)["groups"], data_of(second)["groups"]
        assert len(before) == 5 and after[:5] == before and after[5]["question"] == "Who came last?"  # #q=N stays valid
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            with (going / name).open("a") as file:
                file.write('{"step": 5, "quest')
        assert data_of(ask(port)[2]) == data_of(second)
        shutil.copy(going / "test_before.jsonl", going / "test_after.jsonl")
        ended = data_of(ask(port)[2])["groups"]
        assert [g["question"] for g in ended] == [g["question"] for g in after] and ended[0]["rewards"] == [0, 0]


def test_the_served_page_alone_is_live(small):
    page = make_page(small)
    assert "connect-src" not in page and "fetch(" not in page and 'id="version"' not in page
    with served(small) as port:
        _, headers, live = ask(port)
    assert data_of(live) == data_of(page)
    policy = headers["Content-Security-Policy"]
    assert re.fullmatch(
        r"default-src 'none'; script-src( 'sha256-[^']+'){2}; style-src( 'sha256-[^']+'){2}; connect-src 'self'; "
        r"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        policy,
    )
    assert policy.startswith(re.search('Policy" content="([^"]+)"', live)[1])
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


HOSTS = {"localhost": 200, "127.0.0.1:8000": 200, "localhost:9999": 200, "": 403, "evil.example": 403}
HOSTS |= {"127.0.0.1.evil.example": 403, "localhost@evil.example": 403, "localhost:80\tevil": 403, "0.0.0.0": 403}


@pytest.mark.parametrize("host, status", HOSTS.items())
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_names_of_this_machine_are_refused(small, host, status, method):
    with served(small) as port:
        answered, headers, text = ask(port, method=method, host=host)
        assert answered == status and ("ETag" in headers) == (status == 200)
        assert ('id="run"' in text) == (status == 200 and method == "GET") and bool(text) == (method == "GET")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get"])
def test_other_methods_are_refused(small, method):
    with served(small) as port:
        assert ask(port, method=method)[0] == 501


PATHS = "/config.json /report.html /../../etc/passwd /%2e%2e/config.json /?x /. //config.json /favicon.ico * http://x/"


@pytest.mark.parametrize("path", PATHS.split())
def test_other_paths_are_refused(small, path):
    with served(small) as port:
        status, _, text = ask(port, path)
        assert status == 404 and "root:" not in text and "group_size" not in text


def test_a_file_that_breaks_while_the_page_is_served(going):
    text = (going / "config.json").read_text()
    with served(going) as port:
        (going / "config.json").write_text("{")
        status, headers, said = ask(port)
        assert status == 503 and headers["Content-Type"].startswith("text/plain") and "config.json is damaged" in said
        assert headers["Refresh"] == "2"  # the page comes back by itself
        (going / "config.json").write_text(text)
        assert ask(port)[0] == 200


def until(browser, expression: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(AssertionError):  # the page is being loaded again
            if browser.js(expression):
                return
        time.sleep(0.1)
    raise AssertionError(expression)


NEWEST = "document.getElementById('newest').innerText"


def until_new(browser, question: str) -> None:
    """Both files of a step are on the page. Between them it may have been loaded once already."""
    until(browser, f"!window.old && document.readyState === 'complete' && {NEWEST}.includes('{question}')")


@pytest.fixture
def eager(tmp_path, monkeypatch):
    """The page asks its server ten times as often."""
    text = report.LIVE.read_text(encoding="utf-8")
    assert text.count("setInterval(look, 2000)") == 1
    (tmp_path / "live.html").write_text(text.replace("look, 2000", "look, 200"), encoding="utf-8")
    monkeypatch.setattr(report, "LIVE", tmp_path / "live.html")


@needs_chromium
def test_a_new_step_shows_by_itself_and_the_reader_keeps_the_place(browser, going, plan_ids, eager):
    with served(going) as port:
        browser.call("Emulation.setDeviceMetricsOverride", width=800, height=400, deviceScaleFactor=1, mobile=False)
        browser.open(f"http://127.0.0.1:{port}/")
        assert "Who is the mayor?\n\nExpected: Pruzek\n\nStep 3: mean reward 1.00 of 3" in browser.js(NEWEST)
        until(browser, "document.body.innerText.includes('Live: a new step shows by itself.')")
        browser.js("""document.querySelectorAll('th button')[2].click(); byId("filters").search.value = "wh";
            byId("filters").oninput(); byId("filters").search.focus(); scrollTo(0, 900); window.old = true""")
        top = browser.js("scrollY")
        add_step(going, plan_ids, 4, "Who came last?")
        until_new(browser, "Who came last?")
        assert [row[2] for row in browser.js(ROWS)] == ["1", "1", "3", "4", "test", "test"]  # still sorted by the step
        assert browser.js("[byId('filters').search.value, document.activeElement.name]") == ["wh", "search"]
        assert top > 500 and browser.js("scrollY") == top
        # An open question stays, whatever is logged. The list that the reader comes back to is new.
        browser.js("document.querySelector('#newest a').click(); window.old = true")
        add_step(going, plan_ids, 5, "Who came later?")
        time.sleep(0.7)
        assert browser.js("window.old") and "Who came last?" in browser.js(SHOWN)
        browser.press("Escape")
        until_new(browser, "Who came later?")
        assert browser.js("document.activeElement.textContent") == "Who came last?"
        assert [c for c in browser.complaints() if c != f"http://127.0.0.1:{port}/"] == []
    until(browser, "document.body.innerText.includes('Not live')")
    browser.call("Emulation.clearDeviceMetricsOverride")


@needs_chromium
def test_before_the_first_step_a_served_page_says_so(browser, tmp_path, plan_ids, eager):
    run = write_run(tmp_path / "run", [])
    for name in ("metrics.jsonl", "rollouts.jsonl", "test_before.jsonl", "test_after.jsonl"):
        (run / name).unlink()
    with served(run) as port:
        browser.open(f"http://localhost:{port}/")
        assert "No step yet." in browser.js(NEWEST) and browser.js(ROWS) == []
        add_step(run, plan_ids, 1, "Who?")
        until(browser, f"{NEWEST}.includes('Step 1: mean reward 0.50 of 2')")


@needs_chromium
@pytest.mark.parametrize("text", [*HOSTILE, "W" * 500, "Which of the two? " * 200])
def test_markup_and_long_texts_on_a_served_page_on_a_phone(browser, going, plan_ids, text):
    add_step(going, plan_ids, 4, f"Q {text}", text)
    shown = text.replace("\u2028", "\\u{2028}").replace("\u2029", "\\u{2029}")
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    with served(going) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.js("document.getElementById('newest').textContent").count(shown) >= 10
        assert browser.js("document.title") == "Run going" and browser.js("document.images.length") == 0
        assert browser.js("document.documentElement.scrollWidth") <= 390
        assert browser.js("document.getElementById('newest').clientHeight") < 1300
        assert [c for c in browser.complaints() if c != f"http://127.0.0.1:{port}/"] == []
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_the_command_serves_this_machine_alone(small):
    command = [sys.executable, "-m", "lab.report", str(small), "--serve", "--port", "0"]
    ctrl_c_ends_it = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # it may be ignored in here
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, preexec_fn=ctrl_c_ends_it) as process:
        try:
            port = int(re.match(r"http://127\.0\.0\.1:(\d+) shows ", process.stdout.readline())[1])
            assert ask(port)[0] == 200
            with pytest.raises(ConnectionRefusedError):  # a server of all addresses would answer here
                socket.create_connection(("127.0.0.2", port), timeout=5)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20) == ("", "") and process.returncode == 130
        finally:
            process.kill()


@pytest.mark.parametrize(
    "words, said",
    [
        ("--serve --port {taken}", "--port {taken} cannot be used"),
        ("--serve --port 70000", "--port 70000 cannot be used"),
        ("--serve --port -1", "--port -1 cannot be used"),
        ("--serve --port http", "--port"),
        ("--serve perhaps", "--serve"),
    ],
)
def test_a_bad_port_is_one_line(small, monkeypatch, capsys, words, said):
    with served(small) as taken:
        monkeypatch.setattr(sys, "argv", ["report.py", str(small), *words.format(taken=taken).split()])
        with pytest.raises(SystemExit, match="2"):
            main()
    error = capsys.readouterr().err
    assert said.format(taken=taken) in error and error.count("\n") == 1


def test_a_folder_without_a_run_is_not_served(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--serve", "True", "--port", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "not the folder of a run" in capsys.readouterr().err
