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
from llm import EngineError, HTTPEngine, Request, TransformersEngine, UserError, open_engine
from tasks import load_corpus, load_examples
from tinyworld.pretrain import BACKBONE
from tools import Sandbox

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

        def do_GET(self):
            self.send(200, {"object": "list", "data": [{"id": "backbone"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, body, self.headers.get("Authorization")))
                fault = always or (faults.pop(0) if faults else None)
                answer = None if fault in (429, 500, "drop") else self.answer(body)
            self.fail(fault, answer) if fault else self.send(200, answer)

        def answer(self, body):
            sampling = body["max_tokens"], body["temperature"], body.get("seed", 0)
            if self.path.endswith("/chat/completions"):
                ids = backbone.encode(body["messages"][0]["content"])
                done = backbone.generate_batch([Request(ids, *sampling)])[0]
                choice = {"message": {"role": "assistant", "content": done.text}}
            else:
                done = backbone.generate_batch([Request(tuple(body["prompt"]), *sampling)])[0]
                choice = {"text": done.text, "token_ids": done.completion_ids, "prompt_token_ids": body["prompt"]}
                choice["logprobs"] = {"token_logprobs": done.logprobs}
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
            elif fault == "trickle":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(10):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.1)
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
                answer["choices"][0] |= {"message": {"role": "assistant", "content": None}, "token_ids": []}
                self.send(200, answer)
            elif fault == "empty":
                self.send(200, {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})
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
    return HTTPEngine(url, **({"backoff_s": 0.01, "timeout_s": 0.3, "retries": 3} | options))


FAULTS = [429, 500, 503, "slow", "trickle", "half", "not json", "no choice", "no text", "empty", "unfinished", "drop"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(backbone, fault):
    with serve(backbone, [fault, fault]) as (url, seen):
        assert ask(quick(url), "hello")[0].text == ask(backbone_of(backbone), "hello")[0].text
        assert len(seen) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_one_clear_error(backbone, fault):
    with serve(backbone, always=fault) as (url, seen):
        with pytest.raises(EngineError, match=r"/chat/completions failed 3 times, the last time with") as error:
            ask(quick(url, retries=2), "hello")
        assert len(seen) == 3 and "\n" not in str(error.value)
        assert fault != "trickle" or "no whole answer in 0.3 s" in str(error.value)


def backbone_of(engine):
    """The in-process engine under the HTTP engine's surface."""

    class Direct:
        encode = staticmethod(engine.encode)

        async def generate(self, request):
            return engine.generate_batch([request])[0]

    return Direct()


@pytest.mark.parametrize("status", [400, 404, 302, 422])
def test_a_refusal_is_not_tried_again(backbone, status):
    with serve(backbone, always=status) as (url, seen):
        with pytest.raises(EngineError, match=f"refuses the request: HTTP {status}"):
            ask(quick(url), "hello")
        assert len(seen) == 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "netrc").write_text("default login me password other")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(backbone, always=401) as (url, seen):
        engine = quick(url)
        with pytest.raises(EngineError, match="refuses the key in OPENAI_API_KEY") as error:
            ask(engine, "hello")
        assert seen[0][2] == f"Bearer {KEY}"  # not what ~/.netrc has for the host
        assert KEY not in str(error.value) and KEY not in repr(engine) and KEY not in str(vars(engine))


def test_a_run_that_is_stopped_does_not_try_again(backbone):
    with serve(backbone, always="slow") as (url, seen):
        engine = quick(url, retries=8)

        async def stopped():
            task = asyncio.ensure_future(engine.generate(Request(engine.encode("hello"), 16, 0.0)))
            while not seen:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(stopped())
        engine.threads.shutdown()  # as the interpreter does at its end
        assert len(seen) <= 2


def test_sampling_through_token_ids(backbone):
    """A planner behind a server: the ids, log-probs and text of the engine itself."""
    with serve(backbone) as (url, seen):
        engine = quick(url, tokenizer=str(BACKBONE), timeout_s=10)
        request = Request(engine.encode("What is 1 + 1?"), 16, 1.0, seed=7)
        sampled = asyncio.run(engine.generate(request))
        assert sampled == backbone.generate_batch([request])[0]
        body = seen[0][1]
        assert body["prompt"] == list(request.prompt_ids) and body["seed"] == 7 and body["return_token_ids"]
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


SAMPLED = {"text": "", "token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop"}
LACKING = "no token ids or no log-probs: serve the planner with vLLM"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"token_ids": None}, LACKING),
        ({"logprobs": None}, LACKING),
        ({"prompt_token_ids": [1, 2, 3]}, "do not belong to the prompt"),
        ({"token_ids": [5]}, "do not belong to the prompt"),
        ({"finish_reason": "abort"}, "finish_reason 'abort'"),
    ],
)
def test_a_server_without_the_ids_and_logprobs_of_its_tokens(backbone, monkeypatch, wrong, message):
    with serve(backbone) as (url, _):
        engine = quick(url, tokenizer=str(BACKBONE))
        request = Request(engine.encode("hello"), 8, 1.0, seed=1)
        answers = [SAMPLED, SAMPLED | wrong]
        monkeypatch.setattr(engine, "_exchange", lambda *_: (200, {}, json.dumps({"choices": [answers[0]]}).encode()))
        assert asyncio.run(engine.generate(request)).completion_ids == [5, 6]
        answers.pop(0)
        with pytest.raises(EngineError, match=message):
            asyncio.run(engine.generate(request))


def test_trajectories_are_the_same_through_a_failing_server(backbone):
    """Rollouts with every third answer of the frozen modules' server damaged: nothing is lost, nothing judged empty."""
    questions = [example.question for example in load_examples("tinyworld", "dev")[:4]]
    corpus, sandbox = load_corpus(), Sandbox()
    direct = AgentSystem(backbone, backbone, corpus, sandbox, max_turns=2).rollout(questions, 2, 1.0, (0,))
    faults = [fault for kind in FAULTS[:3] + FAULTS[5:] for fault in (kind, None)]
    with serve(backbone, faults) as (url, seen):
        engine = quick(url, timeout_s=10, retries=9)
        through = AgentSystem(backbone, engine, corpus, sandbox, max_turns=2).rollout(questions, 2, 1.0, (0,))
        assert engine.tokens_generated > 0 and len(seen) > len(faults)
    for one, two in zip(sum(through, []), sum(direct, [])):
        assert one.memory == two.memory and one.answer == two.answer and one.tokens == two.tokens
        assert [turn.completion_ids for turn in one.turns] == [turn.completion_ids for turn in two.turns]


def test_a_dead_server_ends_the_rollouts(backbone):
    with serve(backbone, always=500) as (url, seen):
        engine = quick(url, retries=2)
        system = AgentSystem(backbone, engine, load_corpus(), Sandbox(), max_turns=2)
        with pytest.raises(EngineError, match="failed"):
            system.solve_all([("Who?", (0, n)) for n in range(8)], 1.0, keep_crashed=True)
        assert len(seen) <= 8 * 3


def test_requests_run_together_within_the_bound(backbone):
    running, most, lock = 0, 0, threading.Lock()

    def exchange(*_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 200, {}, json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()

    with serve(backbone) as (url, _):
        engine = quick(url, concurrency=4)
        engine._exchange = exchange
        start = time.monotonic()
        ask(engine, *map(str, range(12)))
        assert most == 4 and time.monotonic() - start < 12 * 0.05


def test_bad_addresses(backbone):
    with pytest.raises(UserError, match="http://127.0.0.1:1/v1/models failed"):
        quick("http://127.0.0.1:1/v1", retries=0)
    with serve(backbone) as (url, _):
        with pytest.raises(UserError, match=f"serves backbone: name one, as in {url}#NAME"):
            quick(f"{url}#other")
        assert open_engine("transformers", f"{url}#backbone", "cpu").model == "backbone"
        with pytest.raises(UserError, match="cannot be trained"):
            quick(url).load_weights({})
        with pytest.raises(UserError, match="no tokenizer.json in it"):
            quick(url, tokenizer="nowhere")
    with pytest.raises(UserError, match="takes a URL as its model"):
        open_engine("http", "tinyworld/backbone", "cpu")
    with pytest.raises(UserError, match="no engine nonsense"):
        open_engine("nonsense", "tinyworld/backbone", "cpu")
