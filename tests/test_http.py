"""The HTTP engine against a server that speaks the OpenAI API, with the bundled backbone behind it, and fails on order.

The same engine against a real `vllm serve` is in tests/test_vllm.py.
"""

import asyncio
import gzip
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agent import AgentSystem
from eval import EvalConfig
from lab import http_engine
from lab.http_engine import HTTPEngine
from lab.pretrain import BACKBONE
from llm import Completion, EngineError, Request, TransformersEngine, open_engine
from sandbox import Sandbox
from tasks import load_corpus, load_examples
from tools import UserError

KEY = "sk-secret-123"


def changed(**fields):
    """A damage that changes fields of the answer or of its choice."""

    def damage(answer):
        for place in (answer["choices"][0], answer):
            place |= {name: value for name, value in fields.items() if name in place}
        return answer

    return damage


def usage(count):
    return changed(usage={"prompt_tokens": 3, "completion_tokens": count})


def text(content):
    return changed(message={"role": "assistant", "content": content})


DAMAGE = {  # name -> (what becomes of an answer, what the error says)
    "half": (lambda answer: json.dumps(answer).encode()[:40], "(40 bytes read, 40 more expected)"),
    "nothing": (lambda answer: b"", "JSONDecodeError"),
    "not json": (lambda answer: b"<html>busy</html>", "JSONDecodeError"),
    "not utf-8": (lambda answer: b'{"choices": "\xff"}', "UnicodeDecodeError"),
    "nested": (lambda answer: b"[" * 100_000, "RecursionError"),
    "too large": (lambda answer: json.dumps(answer).encode() + b" " * 200_000, "more than 200000 bytes"),
    "too large when unpacked": (lambda answer: gzip.compress(b" " * 200_001), "more than 200000 bytes"),
    "not packed": (lambda answer: b"\x1f\x8b" + b"?" * 30, "ContentDecodingError"),
    "a list": (lambda answer: [answer], "no choice in the answer"),
    "no choice": (changed(choices=[]), "no choice in the answer"),
    "choices of text": (changed(choices="text"), "no choice in the answer"),
    "no message": (changed(message=None), "no text, finish_reason 'stop'"),
    "no text": (text(None), "no text, finish_reason 'stop'"),
    "text in parts": (text([{"type": "text", "text": "fine"}]), "no text, finish_reason 'stop'"),
    "empty": (lambda answer: text("")(usage(0)(answer)), "an empty text of no tokens"),
    "empty, not counted": (lambda answer: text("")(changed(usage=None)(answer)), "an empty text of no tokens"),
    "half a surrogate pair": (text("fine \ud800"), r"'utf-8' codec can't encode character '\ud800'"),
    "unfinished": (changed(finish_reason=None), "finish_reason None"),
    "filtered": (changed(finish_reason="content_filter"), "finish_reason 'content_filter'"),
    "reason nested": (changed(finish_reason=["stop"]), "finish_reason ['stop']"),
    "usage of text": (changed(usage="none"), "usage 'none'"),
    "usage of a list": (changed(usage=[]), "usage []"),
    "negative": (usage(-1), "'completion_tokens': -1"),
    "bool": (usage(True), "'completion_tokens': True"),
    "text as number": (usage("3"), "'completion_tokens': '3'"),
    "null as number": (usage(None), "'completion_tokens': None"),
    "fraction": (usage(0.5), "'completion_tokens': 0.5"),
    "nan": (usage(float("nan")), "'completion_tokens': nan"),
    "infinite": (usage(float("inf")), "'completion_tokens': inf"),
    "huge": (usage(10**9), "'completion_tokens': 1000000000"),
    "of 5000 digits": (lambda answer: b'{"usage": ' + b"9" * 5000 + b"}", "4300 digits"),
}

WHOLE = {  # name -> (what becomes of an answer, what is read)
    "not counted": (changed(usage=None), ("hello", "stop", (0, 0))),
    "counted in part": (changed(usage={"completion_tokens": 1}), ("hello", "stop", (0, 1))),
    "stopped by the limit": (changed(finish_reason="length"), ("hello", "length", (3, 1))),
    "empty, but counted": (text(""), ("", "stop", (3, 1))),
    "a whole surrogate pair": (text("\ud83d\ude00"), ("\U0001f600", "stop", (3, 1))),
}


@pytest.fixture(scope="module")
def backbone():
    return TransformersEngine(BACKBONE)


@contextmanager
def serve(backbone, faults=(), always=None, retry_after="0"):
    """A server whose n-th answer fails as `faults[n]` says, or all of them; yields its URL and the requests it saw."""
    faults, seen, lock = list(faults), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else an answer in two parts waits for 40 ms

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, body, self.headers.get("Authorization")))
                fault = always or (faults.pop(0) if faults else None)
                answer = None if fault in (429, 500, "drop") else self.answer(body)
            self.fail(fault, answer) if fault else self.send(200, answer)

        def answer(self, body):
            sampling = body["max_tokens"], body["temperature"], body.get("seed", 0)
            ids = backbone.encode(body["messages"][0]["content"])
            done = backbone.generate_batch([Request(ids, *sampling)])[0]
            choice = {"message": {"role": "assistant", "content": done.text}}
            choice["finish_reason"] = done.finish_reason
            return {"choices": [choice], "usage": self.usage(done)}

        def usage(self, done):
            return {"prompt_tokens": len(done.prompt_ids), "completion_tokens": len(done.completion_ids)}

        def send(self, status, answer, headers=(), length=None):
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(data)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def fail(self, fault, answer):
            if isinstance(fault, int):
                body = f"no\n\x1b[2J{KEY} {'x' * 1000}".encode()
                self.send(fault, body, [("Retry-After", retry_after), ("Location", "http://127.0.0.1:1/")])
            elif fault == "cut refusal":
                self.send(401, b"who", length=1000)
                self.close_connection = True
            elif fault == "slow":
                time.sleep(1.0)
                self.close_connection = True
            elif fault in DAMAGE | WHOLE:
                data = (DAMAGE | WHOLE)[fault][0](answer)
                packed = isinstance(data, bytes) and data.startswith(b"\x1f\x8b")
                headers = [("Content-Encoding", "gzip")] if packed else []
                self.send(200, data, headers, length=80 if fault == "half" else None)
                self.close_connection = fault == "half"
            else:
                self.close_connection = True  # dropped without a word

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def ask(engine, *prompts):
    async def all_of_them():
        return await asyncio.gather(*(engine.generate(Request(engine.encode(p), 16, 0.0)) for p in prompts))

    return asyncio.run(all_of_them())


def quick(url, **options):
    return HTTPEngine(f"{url}#backbone", **({"backoff_s": 0.001, "timeout_s": 10} | options))


class Echo:
    """A model that says what it is told."""

    def encode(self, prompt):
        return prompt

    def generate_batch(self, requests):
        return [Completion([1, 2, 3], [4], [], r.prompt_ids, "stop", (3, 1)) for r in requests]


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that the engine makes. They take no time."""
    made = []

    async def sleep(seconds):
        made.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return made


@pytest.mark.parametrize("fault", [408, 409, 425, 429, 500, 503, "slow", "drop", *DAMAGE])
def test_a_fault_that_passes_costs_nothing(monkeypatch, fault):
    monkeypatch.setattr(http_engine, "MAX_BYTES", 200_000)
    with serve(Echo(), [fault, fault]) as (url, seen):
        done = ask(quick(url, timeout_s=0.3 if fault == "slow" else 10), "hello")[0]
        assert (done.text, done.finish_reason, done.usage) == ("hello", "stop", (3, 1)) and len(seen) == 3


BUSY = {429: "HTTP 429: ", 500: "HTTP 500: ", "drop": "ConnectionError: "}


@pytest.mark.parametrize("fault, message", [*BUSY.items(), *((name, message) for name, (_, message) in DAMAGE.items())])
def test_a_fault_that_stays_is_one_clear_error(monkeypatch, pauses, fault, message):
    monkeypatch.setattr(http_engine, "MAX_BYTES", 200_000)
    with serve(Echo(), always=fault) as (url, seen):
        with pytest.raises(EngineError, match=rf"^{url} failed: .*{re.escape(message)}.* \(6 tries\)$") as error:
            ask(quick(url), "hello")
        assert len(seen) == 6 and len(str(error.value)) < 400 and type(error.value) is EngineError


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 422])
def test_a_refusal_ends_the_run_at_once(monkeypatch, status):
    """One line holds the start of the server's message, without the key that it quotes."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(Echo(), always=status) as (url, seen):
        with pytest.raises(EngineError, match=rf"^{url} failed: HTTP {status}: no  \[2J\*\*\* xxx") as error:
            ask(quick(url), "hello")
        assert len(seen) == 1 and len(str(error.value)) < 400


def test_a_refusal_whose_message_is_cut_is_a_refusal():
    with serve(Echo(), always="cut refusal") as (url, seen):
        with pytest.raises(EngineError, match="failed: HTTP 401: "):
            ask(quick(url), "hello")
        assert len(seen) == 1


@pytest.mark.parametrize("answer", WHOLE)
def test_an_unusual_answer_may_be_whole(answer):
    with serve(Echo(), always=answer) as (url, seen):
        done = ask(quick(url), "hello")[0]
        assert (done.text, done.finish_reason, done.usage) == WHOLE[answer][1] and len(seen) == 1


# --- pauses -----------------------------------------------------------------------------------------------------------


def test_pauses_double_and_say_so(pauses, capsys):
    """Many requests that wait together say it once. A pause of a second needs no line."""
    with serve(Echo(), always=503) as (url, seen):
        with pytest.raises(EngineError):
            ask(quick(url, backoff_s=1.0), "hello")
        assert pauses == [1, 2, 4, 8, 16] and sum(pauses) < 40
        lines = capsys.readouterr().err.splitlines()
        ends = [re.search("; (.*)", line)[1] for line in lines]
        assert ends == ["try 3 of 6 in 2 s", "try 4 of 6 in 4 s", "try 5 of 6 in 8 s", "try 6 of 6 in 16 s"]
        assert all(line.startswith(f"{url} failed: HTTP 503: ") for line in lines)

        with pytest.raises(EngineError):
            ask(quick(url, backoff_s=1.0), *"abcdefgh")
        assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize(
    "header, expected", [("7", [7, 7, 7, 8, 16]), ("3600", [60] * 5), ("9" * 400, [60] * 5), ("soon", [1, 2, 4, 8, 16])]
)
def test_the_server_may_ask_for_longer_pauses(pauses, header, expected):
    with serve(Echo(), always=429, retry_after=header) as (url, _):
        with pytest.raises(EngineError):
            ask(quick(url, backoff_s=1.0), "hello")
    assert pauses == expected


# --- the start --------------------------------------------------------------------------------------------------------


def test_a_dead_address_is_an_error_at_once(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url, start = f"http://127.0.0.1:{unused.getsockname()[1]}/v1", time.monotonic()
        with pytest.raises(UserError, match=rf"^nothing answers at {url} \(Connection refused\): start the server, or"):
            quick(url)
        assert time.monotonic() - start < 1

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"^nothing answers at http://typo:80/v1 \(Name or service not known\): "):
        quick("http://typo:80/v1")

    def silent(address, timeout):
        assert timeout == 5 and address == ("typo", 443)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(UserError, match=r"^nothing answers at https://typo/v1 \(timed out\): "):
        quick("https://typo/v1")


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///v1", "http://:80/v1", "http://host:port/v1", "http://host:99999/v1", "http://host:80 /v1",
     "http://[::1/v1", f"http://{'a' * 64}.test/v1", "http://me:password@127.0.0.1:1/v1"],
)  # fmt: skip
def test_a_malformed_address_is_one_line(url):
    with pytest.raises(UserError, match=r"^\S.* is no URL of a server \(.*\): write http://HOST:PORT/v1#NAME$"):
        quick(url)


def test_a_server_behind_a_proxy_is_not_looked_for(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serve(Echo()) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy)
        assert ask(quick("http://model.test/v1"), "hello")[0].text == "hello"
        assert seen[0][0] == "http://model.test/v1/chat/completions"


def test_a_server_that_goes_away_is_a_fault():
    with serve(Echo()) as (url, _):
        engine = quick(url)
        ask(engine, "hello")
    with pytest.raises(EngineError, match=rf"^{url} failed: ConnectionError: HTTPConnection\(.*refused \(6 tries\)"):
        engine.session.close()  # the test's server would go on to serve the connection that is open
        ask(engine, "hello")


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk-secret\u2026"])
def test_a_key_that_no_header_can_hold_is_not_printed(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve(Echo()) as (url, _):
        with pytest.raises(UserError, match="^OPENAI_API_KEY holds a character that no key has") as error:
            quick(url)
    assert "secret" not in str(error.value)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "netrc").write_text("default login me password other")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(backbone, always=401) as (url, seen):
        engine = quick(url)
        with pytest.raises(EngineError, match="401") as error:
            ask(engine, "hello")
        assert seen[0][2] == f"Bearer {KEY}"  # not what ~/.netrc has for the host
        assert KEY not in str(error.value) and KEY not in repr(engine) and KEY not in str(vars(engine))


def test_sampling_sends_its_seed(backbone):
    with serve(backbone) as (url, seen):
        request = Request("What is 1 + 1?", 16, 1.0, seed=7)
        sampled = asyncio.run(quick(url).generate(request))
        same = backbone.generate_batch([Request(backbone.encode(request.prompt_ids), 16, 1.0, seed=7)])[0]
        assert (sampled.text, sampled.finish_reason, sampled.usage) == (same.text, same.finish_reason, same.usage)
        assert seen[0][1]["seed"] == 7 and seen[0][1]["temperature"] == 1.0


def test_trajectories_are_the_same_through_a_failing_server(backbone):
    """Rollouts with every third answer of the frozen modules' server damaged: nothing is lost, nothing judged empty."""
    questions = [example.question for example in load_examples("tinyworld", "dev")[:4]]
    corpus, sandbox = load_corpus(), Sandbox()
    direct = AgentSystem(backbone, backbone, corpus, sandbox, max_turns=2).rollout(questions, 2, (0,))
    faults = [fault for kind in (429, 500, 503, "drop") for fault in (kind, None)]
    with serve(backbone, faults) as (url, seen):
        engine = quick(url)
        through = AgentSystem(backbone, engine, corpus, sandbox, max_turns=2).rollout(questions, 2, (0,))
        assert len(seen) > len(faults)
    for one, two in zip(sum(through, []), sum(direct, [])):
        assert one.memory == two.memory and one.answer == two.answer and one.tokens == two.tokens
        assert [turn.completion_ids for turn in one.turns] == [turn.completion_ids for turn in two.turns]


def test_a_dead_server_ends_the_rollouts(backbone):
    with serve(backbone, always=500) as (url, seen):
        system = AgentSystem(backbone, quick(url), load_corpus(), Sandbox(), max_turns=2)
        with pytest.raises(EngineError, match="failed"):
            system.rollout(["Who?"] * 4, 2, (0,))
        assert len(seen) <= 8 * 6


def test_requests_run_together_within_the_bound():
    running, most, lock = 0, 0, threading.Lock()

    def complete(request):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    with serve(Echo()) as (url, _):
        engine = quick(url, concurrency=4)
    engine._complete = complete
    start = time.monotonic()
    ask(engine, *map(str, range(12)))
    assert most == 4 and time.monotonic() - start < 12 * 0.05


def test_addresses(backbone):
    with pytest.raises(UserError, match="names no model: write http://127.0.0.1:1/v1#NAME"):
        HTTPEngine("http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="names no model"):
        HTTPEngine("http://127.0.0.1:1/v1# ")
    with serve(backbone) as (url, _):
        assert open_engine(EvalConfig(), f"{url}#backbone").model == "backbone"
