"""The HTTP engine against a server that speaks the OpenAI API, with the bundled backbone behind it, and fails on order.

The same engine against a real `vllm serve` is in tests/test_vllm.py.
"""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agent import AgentSystem
from lab.pretrain import BACKBONE
from llm import EngineError, HTTPEngine, Request, TransformersEngine, open_engine
from sandbox import Sandbox
from tasks import load_corpus, load_examples
from tools import UserError

KEY = "sk-secret-123"


@pytest.fixture(scope="module")
def backbone():
    return TransformersEngine(BACKBONE)


@contextmanager
def serve(backbone, faults=(), always=None):
    """A server whose n-th answer fails as `faults[n]` says, or all of them; yields its URL and the requests it saw."""
    faults, seen, lock = list(faults), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
                self.send(fault, {"error": f"no {KEY}"}, [("Retry-After", "0"), ("Location", "http://127.0.0.1:1/")])
            elif fault == "slow":
                time.sleep(1.0)
                self.close_connection = True
            elif fault == "half":
                data = json.dumps(answer).encode()
                self.send(200, data[: len(data) // 2], length=len(data))
                self.close_connection = True
            elif fault == "not json":
                self.send(200, b"<html>busy</html>")
            elif fault == "no choice":
                self.send(200, {"choices": []})
            elif fault == "no text":
                answer["choices"][0] |= {"message": {"role": "assistant", "content": None}}
                self.send(200, answer)
            elif fault == "empty":
                choice = {"message": {"content": ""}, "finish_reason": "stop"}
                self.send(200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 0}})
            elif fault == "unfinished":
                answer["choices"][0]["finish_reason"] = None
                self.send(200, answer)
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
    return HTTPEngine(f"{url}#backbone", **({"backoff_s": 0.01, "timeout_s": 0.3} | options))


FAULTS = [429, 500, 503, "slow", "drop"]  # of a busy server, which are tried again
DAMAGE = [400, 401, 404, 302, "half", "not json", "no choice", "no text", "empty", "unfinished"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(backbone, fault):
    with serve(backbone, [fault, fault]) as (url, seen):
        text = ask(quick(url), "hello")[0].text
        assert text == backbone.generate_batch([Request(backbone.encode("hello"), 16, 0.0)])[0].text
        assert len(seen) == 3


@pytest.mark.parametrize("fault", [429, "drop"])
def test_a_fault_that_stays_is_one_clear_error(backbone, fault):
    with serve(backbone, always=fault) as (url, seen):
        with pytest.raises(EngineError, match=f"{url} failed: ") as error:
            ask(quick(url), "hello")
        assert len(seen) == 6 and "\n" not in str(error.value)


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_refusal_or_a_damaged_answer_ends_the_run(backbone, fault):
    """Never an empty text that would be judged, and no second try for what will not change."""
    with serve(backbone, always=fault) as (url, seen):
        with pytest.raises(EngineError, match=f"{url} failed: "):
            ask(quick(url), "hello")
        assert len(seen) == 1


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
        sampled = asyncio.run(quick(url, timeout_s=10).generate(request))
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
        engine = quick(url, timeout_s=10)
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

    engine = quick("http://127.0.0.1:1/v1", concurrency=4)
    engine._complete = complete
    start = time.monotonic()
    ask(engine, *map(str, range(12)))
    assert most == 4 and time.monotonic() - start < 12 * 0.05


def test_addresses(backbone):
    with pytest.raises(UserError, match="names no model: write http://127.0.0.1:1/v1#NAME"):
        HTTPEngine("http://127.0.0.1:1/v1")
    with serve(backbone) as (url, _):
        assert open_engine("transformers", f"{url}#backbone", "cpu", None).model == "backbone"
