"""An engine for any server with the OpenAI API: `--frozen_model http://localhost:8000/v1#NAME`.

The trainer cannot give it new weights, so it serves the frozen modules, and any planner that is only evaluated.

A server sends a whole answer, a fault or a refusal. A fault may pass, so the engine asks again. A refusal, such as that
of a wrong key, stays. So it ends the run at once.
"""

import asyncio
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy
from tqdm import tqdm

from llm import Completion, Engine, EngineError, Request
from tools import UserError

TRIES = 6  # the pauses between them double: 31 seconds in all
MAX_WAIT_S = 60  # of one pause, whatever the server asks for
CONNECT_S = 5
AGAIN = {408, 409, 425, 429, *range(500, 600)}  # the statuses of faults; from 300 on, the others are refusals
MAX_BYTES = 64 << 20  # of an answer


class Fault(Exception):
    """A failure that may pass: (message, seconds that the server asks to wait)."""


class HTTPEngine(Engine):
    """A model behind a server with chat completions. `address` is the server's base URL and the model's name, such as
    http://localhost:8000/v1#NAME. OPENAI_API_KEY holds the key."""

    def __init__(self, address: str, thinking=True, concurrency=64, timeout_s=300.0, backoff_s=1.0):
        self.url, _, self.model = address.partition("#")
        if not self.model.strip():
            raise UserError(f"{self.url} names no model: write {self.url}#NAME")
        check(self.url)
        self.timeout_s, self.backoff_s = timeout_s, backoff_s
        self.thinking = thinking
        self.announced = 0.0  # when the longest pause ends that was announced
        self.threads = ThreadPoolExecutor(concurrency)  # one per request in flight
        self.session = requests.Session()
        self.session.auth = lambda request: request  # else `requests` takes a key from ~/.netrc instead of ours
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=concurrency))
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):  # the error of `requests` would print it
                raise UserError("OPENAI_API_KEY holds a character that no key has: copy the key again")
            self.session.headers["Authorization"] = f"Bearer {key}"

    def encode(self, prompt: str) -> str:
        return prompt  # the server has the tokenizer

    async def generate(self, request: Request) -> Completion:
        """The first whole answer. If all tries end in faults, the `EngineError` names the last one."""
        for attempt in range(1, TRIES + 1):
            try:
                return await asyncio.get_running_loop().run_in_executor(self.threads, self._complete, request)
            except Fault as fault:
                message, asked_s = fault.args
                if attempt == TRIES:
                    raise EngineError(f"{message} ({TRIES} tries)") from None
            wait_s = min(MAX_WAIT_S, max(asked_s, self.backoff_s * 2 ** (attempt - 1)))
            end = time.monotonic() + wait_s
            if wait_s > 1 and end > self.announced + 1:  # one line for all requests that wait side by side
                self.announced = end
                tqdm.write(f"{message}; try {attempt + 1} of {TRIES} in {wait_s:.0f} s", file=sys.stderr)
            await asyncio.sleep(wait_s)

    def _complete(self, request: Request) -> Completion:
        """One try: the answer, a `Fault`, or the `EngineError` of a refusal."""
        body = dict(model=self.model, max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed)
        body["messages"] = [{"role": "user", "content": request.prompt_ids}]
        if not self.thinking:  # vLLM and SGLang hand this to the chat template; a stricter server must not see it
            body["chat_template_kwargs"] = {"enable_thinking": False}
        options = dict(timeout=(CONNECT_S, self.timeout_s), allow_redirects=False, stream=True)
        try:
            with self.session.post(f"{self.url}/chat/completions", json=body, **options) as response:
                if response.status_code < 300:
                    return read_answer(response)
                start = b""
                with suppress(requests.RequestException):  # without a message, the status says enough
                    start = next(response.iter_content(4096), start)
        except (requests.RequestException, ValueError, RecursionError) as error:
            cause = next((part.reason for part in error.args if hasattr(part, "reason")), error)  # urllib3 wraps it
            raise Fault(self._line(f"{type(error).__name__}: {cause}"), 0) from None
        message = self._line(f"HTTP {response.status_code}: {start.decode(errors='replace')}")
        if response.status_code in AGAIN:
            asked = response.headers.get("Retry-After", "")
            raise Fault(message, float(asked) if asked.isdecimal() else 0)
        raise EngineError(message)

    def _line(self, reason: str) -> str:
        """The reason on one printable line. A server may quote the key in its message, so the key is taken out."""
        if key := self.session.headers.get("Authorization", "").removeprefix("Bearer "):
            reason = reason.replace(key, "***")
        return f"{self.url} failed: " + "".join(c if c.isprintable() else " " for c in reason)[:300]


def check(url: str) -> None:
    """`UserError` if the URL is malformed, or if nothing listens there. Behind a proxy, only the proxy knows that."""
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.password:
            raise ValueError("it needs a host and no password")
        port = (443 if parts.scheme == "https" else 80) if parts.port is None else parts.port
        if not select_proxy(url, get_environ_proxies(url)):
            socket.create_connection((parts.hostname, port), CONNECT_S).close()
    except ValueError as error:
        raise UserError(f"{url} is no URL of a server ({error}): write http://HOST:PORT/v1#NAME") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"nothing answers at {url} ({reason}): start the server, or correct the URL") from None


def read_answer(response: requests.Response) -> Completion:
    """The completion in an answer. The error says what is damaged in it."""
    data = bytearray()
    for piece in response.iter_content(1 << 16):
        data += piece
        if len(data) > MAX_BYTES:
            raise ValueError(f"an answer of more than {MAX_BYTES} bytes")
    match answer := json.loads(data):
        case {"choices": [{"message": {"content": str(text)}, "finish_reason": "stop" | "length" as reason}, *_]}:
            text.encode()  # half a surrogate pair is no text: a tokenizer would fail on it
        case {"choices": [{"finish_reason": reason}, *_]}:
            raise ValueError(f"no text, finish_reason {reason!r}")
        case _:
            raise ValueError("no choice in the answer")
    usage = {} if answer.get("usage") is None else answer["usage"]  # some servers do not count
    tokens = isinstance(usage, dict) and (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
    if not tokens or not all(type(count) is int and 0 <= count < 10**9 for count in tokens):
        raise ValueError(f"usage {usage!r}")
    if not text and not tokens[1]:
        raise ValueError("an empty text of no tokens")
    return Completion([], [], [], text, reason, tokens)
