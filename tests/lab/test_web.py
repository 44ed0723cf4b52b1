"""The web tools against real local servers that speak the real formats, and against hostile ones."""

import asyncio
import gzip
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import agent
from agent import AgentSystem
from eval import evaluate
from lab import web
from lab.web import WEB_TOOLS, Web, best_passages, is_public, passages, readable
from llm import Completion
from tasks import Example
from tools import ToolEnv, UserError, find_tools, parse_command, run_tool

KEY = "AIzaSyNotARealKey-0123456789abcdefghijk"
PUBLIC = "93.184.216.34"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    settings = ("WEB_CACHE", "WEB_FROZEN", "WEB_SUMMARY", "WEB_PRIVATE", *web.GOOGLE_KEYS, "GOOGLE_CSE_ID")
    for name in (*settings, "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server(http.server.ThreadingHTTPServer):
    """Answers by path from `pages`: (status, headers, body), or a function of the handler. Keeps what it was asked."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.seen = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that hung up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(path.query).items()}
        self.server.seen.append((self.path, dict(self.headers), body))
        page = self.server.pages.get(path.path, (404, {}, b"nothing here"))
        if callable(page):
            page = page(self, query, body)
        if page is None:
            self.close_connection = True
            return
        status, headers, body = page
        self.send_response(status)
        for name, value in ({"Content-Type": "text/html"} | headers).items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def answering(value, status=200, **headers):
    return status, {"Content-Type": "application/json; charset=utf-8"} | headers, json.dumps(value).encode()


@pytest.fixture
def client(server, tmp_path):
    """A client of the server, as a run would have it but for base URLs, patience and loopback."""

    def make(**options):
        services = {name: f"{server.url}/{name}" for name in ("wikipedia", "gemini", "custom_search")}
        usual = dict(cache=tmp_path / "cache", waits_s=(0.01, 0.01), timeout_s=5, allow_private=True)
        return Web(**services | usual | options)

    return make


def environment_of(asked: list | None = None) -> ToolEnv:
    async def ask(role: str, prompt: str) -> str:
        asked.append((role, prompt))
        return " It is {written} in 1923. "

    return ToolEnv(ask, None, None, WEB_TOOLS)


@contextmanager
def installed(client: Web):
    """The tools use this client instead of the one that the environment describes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "client", lambda: client)
        yield


def call(client: Web, command: str, asked: list | None = None) -> tuple[str, bool]:
    with installed(client):
        return asyncio.run(run_tool(environment_of(asked), parse_command(command, WEB_TOOLS)))


def read(client: Web, url: str, query: str = "anything") -> tuple[str, bool]:
    return call(client, f"Web_Search(url={url!r}, query={query!r})")


def together(client: Web, commands: list[str]) -> tuple[list, float, int]:
    """Results, seconds, and how often another coroutine had its turn meanwhile."""
    turns = 0

    async def other():
        nonlocal turns
        while True:
            await asyncio.sleep(0.005)
            turns += 1

    async def run():
        ticker = asyncio.ensure_future(other())
        start = time.perf_counter()
        results = await asyncio.gather(*(run_tool(environment_of(), parse_command(c, WEB_TOOLS)) for c in commands))
        seconds = time.perf_counter() - start
        ticker.cancel()
        return results, seconds, turns

    with installed(client):
        return asyncio.run(run())


# --- Wikipedia --------------------------------------------------------------------------------------------------------

FILLER = " ".join(f"word{n}" for n in range(3000))
ARTICLES = {
    736: ("Albert Einstein", f"A physicist.\n\n\n== Life ==\n{FILLER} His zither was green. {FILLER}"),
    9988: ("Elsa Einstein", "Elsa Einstein was born in Hechingen. \ud83d\ude00 \ud800 \x00"),
}


def wikipedia(handler, query, _):
    """The two requests of MediaWiki's API that the tool makes, answered as en.wikipedia.org does."""
    assert query["action"] == "query" and query["format"] == "json" and query["formatversion"] == "2"
    if "list" in query:
        hits = [{"ns": 0, "title": title, "pageid": page} for page, (title, _) in ARTICLES.items()]
        hits = hits[: int(query["srlimit"])] if "Einstein" in query["srsearch"] else []
        info = {"totalhits": len(hits)}
        return answering({"batchcomplete": True, "query": {"searchinfo": info, "search": hits}})
    assert query["explaintext"] == "1" and query["prop"] == "extracts|info" and query["inprop"] == "url"
    title, text = ARTICLES[int(query["pageids"])]
    url = f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}"
    page = {
        "pageid": int(query["pageids"]), "ns": 0, "title": title, "extract": text, "contentmodel": "wikitext",
        "pagelanguage": "en", "touched": "2026-11-01T00:00:00Z", "lastrevid": 1, "length": len(text), "fullurl": url,
        "editurl": f"{url}?action=edit", "canonicalurl": url,
    }  # fmt: skip
    return answering({"batchcomplete": True, "query": {"pages": [page]}})


def test_wikipedia_gives_title_url_and_the_best_passages(server, client):
    server.pages["/wikipedia"] = wikipedia
    text, ok = call(client(), 'Wikipedia_Search(query="the  zither of\\nEinstein")')
    assert ok and "Albert Einstein (https://en.wikipedia.org/wiki/Albert_Einstein)\n" in text
    assert "His zither was green." in text.split(" [...] ")[0] and len(text.split()) < 3 * 220
    assert parse_qs(urlsplit(server.seen[0][0]).query)["srsearch"] == ["the zither of Einstein"]
    assert all("nano-agentflow" in headers["User-Agent"] for _, headers, _ in server.seen) and len(server.seen) == 3


def test_wikipedia_summary_by_the_frozen_model(server, client):
    server.pages["/wikipedia"], asked = wikipedia, []
    text, ok = call(client(summary=True), 'Wikipedia_Search(query="zither of {query} Einstein")', asked)
    assert ok and text.endswith("\nIt is {written} in 1923.") and "wiki/Albert_Einstein)" in text
    [(role, prompt)] = asked
    assert role == "summary" and "Query: zither of {query} Einstein" in prompt and "His zither was green" in prompt
    asked.clear()
    assert call(client(summary=True), 'Wikipedia_Search(query="nobody")', asked) == ("No results.", True) and not asked


def test_wikipedia_with_odd_text_and_without_results_or_query(server, client):
    server.pages["/wikipedia"] = wikipedia
    text, ok = call(client(), 'Wikipedia_Search(query="Elsa Einstein Hechingen")')
    assert ok and "Hechingen. 😀 ?" in text and text.encode()  # as tokenizers want it
    assert call(client(), 'Wikipedia_Search(query="nobody")') == ("No results.", True)
    assert call(client(), 'Wikipedia_Search(query=" \\n")') == ("Error: the query is empty", False)
    assert call(client(), f'Wikipedia_Search(query="{"x " * 3000}")')[1]
    assert len(parse_qs(urlsplit(server.seen[-1][0]).query)["srsearch"][0]) == 300


def test_wikipedia_errors_come_with_status_200(server, client):
    error = {"code": "cirrussearch-query-too-long", "info": "Search request is longer than allowed", "docref": "See"}
    server.pages["/wikipedia"] = lambda *_: answering({"error": error, "servedby": "mw-api-ext"})
    text, ok = call(client(), 'Wikipedia_Search(query="x")')
    assert text == "Error: Wikipedia: Search request is longer than allowed" and not ok
    error |= {"code": "ratelimited", "info": "You've exceeded your rate limit."}
    with pytest.raises(UserError, match="does not answer .*rate limit.*network and the quota"):
        call(client(), 'Wikipedia_Search(query="y")')
    assert len(server.seen) == 1 + 3


def test_services_get_another_chance_after_the_pause_that_they_ask_for(server, client):
    faults = [(429, {"Retry-After": "1"}, b"slow down"), answering({}, 503, **{"Retry-After": "0"})]
    server.pages["/wikipedia"] = lambda *request: faults.pop(0) if faults else wikipedia(*request)
    start = time.monotonic()
    assert call(client(), 'Wikipedia_Search(query="Einstein")')[1] and 1 <= time.monotonic() - start < 3


@pytest.mark.parametrize(
    "page, message",
    [
        ((500, {}, b"<html>oops"), "does not answer .HTTP 500"),
        ((403, {}, b"Please set a user-agent"), "answered HTTP 403"),
        ((301, {"Location": "https://elsewhere.test/"}, b""), "answered HTTP 301"),
        ((200, {}, b"<html>Log in to the hotel's network"), "form unknown"),
        ((200, {}, b"[1, 2]"), "form unknown"),
        ((200, {}, b'{"query": {"search": [{}]}}'), "form unknown"),
        ((200, {}, b"[" * 100000), "form unknown"),
        ((200, {"Content-Type": "application/json"}, b'{"batchcomplete": true}'), "form unknown"),
    ],
)
def test_a_service_that_is_broken_stops_the_run(server, client, page, message):
    server.pages["/wikipedia"] = page
    with pytest.raises(UserError, match=message) as error:
        call(client(), 'Wikipedia_Search(query="Einstein")')
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not list(Path(client().cache).glob("*/*"))


def test_a_service_that_is_not_there_stops_the_run(server, client):
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ does not answer \(ConnectionError\): look at the network"):
        call(client(wikipedia=url), 'Wikipedia_Search(query="Einstein")')


# --- Google -----------------------------------------------------------------------------------------------------------

REDIRECT = "https://vertexaisearch.cloud.google.com/grounding-api-redirect"
GROUNDED = {
    "candidates": [{  # as Gemini answers
        "content": {
            "parts": [
                {"text": "I think.", "thought": True}, {"text": "Zoë won. "}, {"text": "The cup was 🥇 gold."},
            ],
            "role": "model",
        },
        "finishReason": "STOP",
        "groundingMetadata": {
            "searchEntryPoint": {"renderedContent": "<style>...</style>"},
            "groundingChunks": [
                {"web": {"uri": f"{REDIRECT}/A", "title": "a.org"}},
                {"web": {"uri": f"{REDIRECT}/B", "title": "b.org"}},
            ],
            "groundingSupports": [  # positions count bytes of UTF-8
                {"segment": {"endIndex": 9, "text": "Zoë won."}, "groundingChunkIndices": [0]},
                {
                    "segment": {"startIndex": 10, "endIndex": 32, "text": "The cup was 🥇 gold."},
                    "groundingChunkIndices": [0, 1],
                    "confidenceScores": [0.9, 0.8],
                },
            ],
            "webSearchQueries": ["who won the cup"],
        },
    }],
    "usageMetadata": {"totalTokenCount": 80},
    "modelVersion": "gemini-2.5-flash",
}  # fmt: skip


def everything_stored(folder: Path) -> str:
    return "".join(str(path) + path.read_text() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("variable", web.GOOGLE_KEYS)
def test_google_by_gemini_with_grounding(server, client, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, f" {KEY}\n")
    (tmp_path / "netrc").write_text("default login me password other")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.pages["/gemini"] = answering(GROUNDED)
    text, ok = call(client(), 'Google_Search(query="who won the cup")')
    cited = "Zoë won.[1] The cup was 🥇 gold.[1][2]"
    assert ok and text == f"{cited}\n[1] a.org {REDIRECT}/A\n[2] b.org {REDIRECT}/B"
    [(path, headers, body)] = server.seen
    assert json.loads(body) == dict(contents=[{"parts": [{"text": "who won the cup"}]}], tools=[{"google_search": {}}])
    assert headers["x-goog-api-key"] == KEY and KEY not in path and "Authorization" not in headers
    assert "who won the cup" in everything_stored(tmp_path) and KEY not in everything_stored(tmp_path)


def test_google_without_grounding_or_answer(server, client, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    candidate = {"content": {"parts": [{"text": "4"}]}, "finishReason": "STOP"}
    server.pages["/gemini"] = answering({"candidates": [candidate]})
    assert call(client(), 'Google_Search(query="2 + 2")') == ("4", True)
    server.pages["/gemini"] = answering({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {}})
    assert call(client(), 'Google_Search(query="bad")') == ("Error: Google gives no answer (PROHIBITED_CONTENT)", False)
    server.pages["/gemini"] = answering({"candidates": [{"finishReason": "MAX_TOKENS"}]})
    assert call(client(), 'Google_Search(query="long")') == ("No results.", True)
    assert call(client(), 'Google_Search(query="")') == ("Error: the query is empty", False)


def test_google_by_custom_search(server, client, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    monkeypatch.setenv("GOOGLE_CSE_ID", "engine:1")
    item = {"kind": "customsearch#result", "title": "The cup", "htmlTitle": "<b>", "link": "https://a.org/cup"}
    items = [item | {"snippet": "Zoë won\nthe cup"}, {"title": "B", "link": "https://b.org"}]
    server.pages["/custom_search"] = answering({"kind": "customsearch#search", "items": items})
    text, ok = call(client(), 'Google_Search(query="who won & lost")')
    assert ok and text == "The cup (https://a.org/cup)\nZoë won the cup\n\nB (https://b.org)"
    path, headers, _ = server.seen[0]
    assert parse_qs(urlsplit(path).query) == {"cx": ["engine:1"], "q": ["who won & lost"]}
    assert headers["x-goog-api-key"] == KEY and KEY not in everything_stored(tmp_path)
    server.pages["/custom_search"] = answering({"searchInformation": {"totalResults": "0"}})
    assert call(client(), 'Google_Search(query="none")') == ("No results.", True)
    call(client(), f'Google_Search(query="{"cup " * 1000}")')
    assert len(server.seen[-1][0]) < 1000  # a longer address would be refused, and that would stop the run

    monkeypatch.delenv("GOOGLE_CSE_ID")  # Gemini answers otherwise: what the other service said is not its answer
    server.pages["/gemini"] = answering(GROUNDED)
    assert call(client(), 'Google_Search(query="none")')[0].startswith("Zoë won.")


@pytest.mark.parametrize(
    "status, message",
    [
        (400, "API key not valid. Please pass a valid API key."),
        (403, f"Permission denied: Consumer 'api_key:{KEY}' has been suspended."),
        (429, f"You exceeded your current quota of {KEY},\nplease check your plan."),
        (500, f"internal {KEY}"),
    ],
)
def test_a_refused_key_is_one_line_without_the_key(server, client, monkeypatch, tmp_path, capsys, status, message):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    server.pages["/gemini"] = answering({"error": {"code": status, "message": message, "status": "X"}}, status)
    with pytest.raises(UserError) as error:
        call(client(), 'Google_Search(query="x")')
    line = str(error.value)
    assert " ".join(message.split()).replace(KEY, "[key]") in line and f"HTTP {status}" in line and "\n" not in line
    assert KEY not in line + everything_stored(tmp_path) + "".join(capsys.readouterr())
    assert error.value.__cause__ is None


@pytest.mark.parametrize("key", ["line\nbreak", "ключ", "\x00"])
def test_a_key_that_is_no_header_is_not_shown(server, client, monkeypatch, key):
    monkeypatch.setattr(os.environ, "get", lambda name, default="": key if name == "GEMINI_API_KEY" else default)
    with pytest.raises(UserError, match="does not answer|HTTP 404") as error:
        call(client(), 'Google_Search(query="x")')
    assert key not in str(error.value)


def test_the_key_follows_no_redirect(server, client, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    server.pages["/gemini"] = (307, {"Location": f"{server.url}/thief"}, b"")
    with pytest.raises(UserError, match="HTTP 307"):
        call(client(), 'Google_Search(query="x")')
    assert [path for path, *_ in server.seen] == ["/gemini"]


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_gives_its_best_passages(server, client):
    html = f"""<!doctype html><html><head><title> The
        zither </title><style>p {{}}</style></head><body><nav>Home Zither Login</nav><h1>Strings</h1>
        <p>{FILLER}</p><script>var zither = "evil"</script><p>The <b>zith</b>er of H<sub>2</sub>O was green.</p>
        <table><tr><td>Zither</td><td>12</td></tr></table><!-- zither --><p>{FILLER}</p></body></html>"""
    server.pages["/a page"] = server.pages["/a%20page"] = (200, {}, html.encode())
    text, ok = read(client(), f"{server.url}/a page?x=é y#zither", "zither")
    assert ok and text.startswith(f"The zither ({server.url}/a%20page?x=%C3%A9%20y#zither)\n")
    assert "The zither of H2O was green.\nZither\n12" in text
    assert "evil" not in text and "Login" not in text and "{}" not in text and "<" not in text
    assert server.seen[0][0] == "/a%20page?x=%C3%A9%20y" and server.seen[0][1]["Host"] == urlsplit(server.url).netloc
    assert "Cookie" not in server.seen[0][1] and "Authorization" not in server.seen[0][1]


def test_a_page_without_type_or_word_of_the_query_gives_its_beginning(server, client):
    server.pages["/"] = (200, {"Content-Type": None}, f"<p>Beginning. {FILLER}".encode())
    text, ok = read(client(), server.url, "xyzzy")
    assert ok and "Beginning. word0" in text and len(text.split()) < 3 * 210


CAFE, TOKYO = "Café “Zürich” – naïve", "東京タワー"


@pytest.mark.parametrize(
    "body, content_type, expected",
    [
        (CAFE.encode(), "text/html; charset=utf-8", CAFE),
        (CAFE.encode(), "text/html", CAFE),
        (CAFE.encode() + "…".encode()[:2], "text/html", CAFE + "��"),
        (CAFE.encode(), "text/html; charset=nonsense", CAFE),
        (CAFE.encode(), "text/html; charset=unicode_escape", CAFE),
        (CAFE.encode(), "text/html; charset=\x00", CAFE),
        (b"\xef\xbb\xbf" + CAFE.encode(), "text/html", CAFE),
        (CAFE.encode("cp1252"), "text/html", CAFE),
        (CAFE.encode("cp1252"), "text/html; charset=ISO-8859-1", CAFE),
        (CAFE.encode("utf-16"), "text/html", CAFE),
        (CAFE.encode("utf-16-be"), "text/html; charset=utf-16be", CAFE),
        (TOKYO.encode("shift_jis"), "text/html; charset=Shift_JIS", TOKYO),
        (b'<meta charset="shift_jis">' + TOKYO.encode("shift_jis"), "text/html", TOKYO),
        (b"<meta http-equiv=Content-Type content='text/html; charset=euc-jp'>" + TOKYO.encode("euc-jp"), "", TOKYO),
        (b'<meta charset="latin-1">' + TOKYO.encode(), "text/html; charset=utf-8", TOKYO),
        ("<p>Москва".encode("koi8-r"), "text/html;charset='koi8-r'", "Москва"),
        ("<p>北京".encode("gb18030"), 'text/html; charset="gb18030"', "北京"),
        (TOKYO.encode("iso-2022-jp"), "text/html; charset=iso-2022-jp", TOKYO),
        (b'<?xml version="1.0" encoding="utf-8"?><html><p>' + TOKYO.encode(), "application/xhtml+xml", TOKYO),
        (b"<p>a\x00b &#xD800; &#0; &lt;b&gt;", "text/html", "a�b � � <b>"),
        (b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><p>&e;x', "text/html", "]>\n&e;x"),
        (b"a <b> is\n kept", "text/plain", "a <b> is\nkept"),
        (CAFE.encode("cp1252"), "text/plain", CAFE),
        (TOKYO.encode("euc-jp"), "text/plain; charset=euc-jp", TOKYO),
        (b"<p>a\x01\x0b\x1b[31mb<!-- x -->c<?php y ?>d", "text/html", "a\x01\n\x1b[31mbcd"),
        (b'{"a": 1}', "application/json", '{"a": 1}'),
        (b"<a>1</a>", "application/rss+xml", "<a>1</a>"),
    ],
)
def test_encodings_and_kinds(body, content_type, expected):
    text = readable(body, content_type or "text/html")[1]
    assert text == expected and text.encode()


@pytest.mark.parametrize(
    "page, message",
    [
        ((200, {"Content-Type": "application/pdf"}, b"%PDF-1.7"), "application/pdf, not text"),
        ((200, {"Content-Type": "image/png"}, b"\x89PNG"), "image/png, not text"),
        ((200, {"Content-Type": "; x"}, b"hi"), "of no kind"),
        ((200, {}, b""), "empty"),
        ((200, {}, b"<script>x</script>"), "it has no text"),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(b"<p>hi")), "compressed"),
        ((404, {}, b"<p>no"), "HTTP 404 Not Found"),
        ((410, {}, b""), "HTTP 410 Gone"),
        ((403, {}, b""), "HTTP 403 Forbidden"),
        ((429, {}, b""), "HTTP 429 Too Many Requests"),
        ((500, {}, b""), "HTTP 500"),
        ((599, {}, b""), "HTTP 599"),
        ((302, {}, b""), "HTTP 302 Found"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "'file:///etc/passwd' is not an http:// or https:// URL"),
        ((302, {"Location": "gopher://127.0.0.1/1"}, b""), "not an http:// or https:// URL"),
        ((302, {"Location": "http://[::1"}, b""), "not an http:// or https:// URL"),
        ((302, {"Location": "/loop"}, b""), "more than 5 redirects"),
    ],
)
def test_what_a_page_does_wrong_is_a_failure(server, client, page, message):
    server.pages["/"] = server.pages["/loop"] = page
    text, ok = read(client(), server.url)
    assert not ok and text.startswith("Error: cannot read the page: ") and message in text


def test_redirects_are_followed_and_a_page_gets_another_chance(server, client):
    for n, target in enumerate(["/1", "2", "./3?x=1", f"{server.url}/4", f"//{urlsplit(server.url).netloc}/end"]):
        server.pages[f"/{n}"] = ([301, 302, 303, 307, 308][n], {"Location": target, "Set-Cookie": "a=b"}, b"moved")
    ends = [None, (503, {}, b""), (200, {}, b"<p>arrived")]
    server.pages["/end"] = lambda *_: ends.pop(0)
    assert read(client(), f"{server.url}/0") == (f"({server.url}/end)\narrived", True)
    assert not any("Cookie" in headers for _, headers, _ in server.seen)


def raw(*chunks: bytes, pause: float = 0.0, forever: bytes = b""):
    """A page that writes bytes as they are, and then others again and again."""

    def page(handler, *_):
        try:
            for chunk in chunks:
                handler.wfile.write(chunk)
                time.sleep(pause)
            while forever:
                handler.wfile.write(forever)
                time.sleep(pause)
        except OSError:  # the other side had enough
            pass

    return page


OK_LINE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


@pytest.mark.parametrize(
    "page",
    [
        raw(OK_LINE, b"\r\n<p>zither ", forever=b"again and again " * 4096),
        raw(OK_LINE, b"Transfer-Encoding: chunked\r\n\r\n", forever=b"1000\r\n" + b"zither " * 585 + b"z\r\n"),
        raw(OK_LINE, b"Content-Length: 99999999999\r\n\r\n", forever=b"<p>zither " * 4096),
    ],
)
def test_of_an_endless_page_the_beginning_is_read(server, client, page):
    server.pages["/"] = page
    text, ok = read(client(max_bytes=300_000), server.url, "zither")
    assert ok and "zither" in text


def test_a_page_that_breaks_off_is_tried_again_and_not_kept(server, client):
    server.pages["/"] = raw(OK_LINE, b"Content-Length: 5000\r\n\r\n<p>half a page")
    text, ok = read(client(), server.url)
    assert not ok and "in the middle of the page" in text and len(server.seen) > 1
    server.pages["/"] = (200, {}, b"<p>the whole")
    assert read(client(), server.url) == (f"({server.url}/)\nthe whole", True)


def test_the_whole_page_has_one_time_limit(server, client):
    chunked = OK_LINE + b"Transfer-Encoding: chunked\r\n\r\n"
    server.pages |= {
        "/body": raw(OK_LINE, b"\r\n", forever=b"x", pause=0.05),
        "/headers": raw(OK_LINE, forever=b"x", pause=0.05),
        "/status_line": raw(forever=b"x", pause=0.05),
        "/1xx_forever": raw(forever=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01),
        "/chunks": raw(chunked, forever=b"1\r\nx\r\n", pause=0.05),
        "/trailers": raw(chunked, b"0\r\n", forever=b"a: b\r\n", pause=0.01),
        "/silence": lambda *_: time.sleep(2),
    }
    commands = [f'Web_Search(url="{server.url}{path}", query="x")' for path in server.pages]
    results, seconds, _ = together(client(timeout_s=0.4), commands)
    assert results == [("Error: cannot read the page: it took longer than 0.4 s", False)] * 7 and seconds < 1.2


@pytest.mark.parametrize(
    "page",
    [
        raw(OK_LINE, b"X: " + b"y" * 100_000 + b"\r\n\r\n"),
        raw(OK_LINE, b"X: y\r\n" * 300, b"\r\n"),
        raw(b"\x16\x03\x01 garbage\r\n\r\n"),
        raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
        raw(b""),
        raw(OK_LINE, b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n"),
    ],
)
def test_broken_http_is_a_failure(server, client, page):
    server.pages["/"] = page
    text, ok = read(client(), server.url)
    assert not ok and text.startswith("Error: cannot read the page: ") and len(text) < 400


def test_hostile_html_is_parsed_in_time():
    bombs = [b"<div>", b"<b>", b"<form><p><a>", b"<table><tr><td>", b"<b><i>x</b>", b"<p>x", b"<a href=/>x</a> "]
    for bomb in (*bombs, b"<", b"&"):
        start = time.process_time()
        with suppress(web.PageError):
            readable(bomb * (1_000_000 // len(bomb)), "text/html")
        assert time.process_time() - start < 3, bomb


# --- addresses that a model must not reach ----------------------------------------------------------------------------

LOCAL = [
    "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://127.1:{port}/", "http://2130706433:{port}/",
    "http://0x7f000001:{port}/", "http://0x7f.1:{port}/", "http://0177.0.0.1:{port}/", "http://0.0.0.0:{port}/",
    "http://0:{port}/", "http://127.255.255.254:{port}/", "http://[::1]:{port}/", "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/", "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/",
    "http://[::127.0.0.1]:{port}/", "http://[64:ff9b::7f00:1]:{port}/", "http://[2002:7f00:1::]:{port}/",
    "http://example.com@127.0.0.1:{port}/", "http://example.com:80@127.0.0.1:{port}/",
    "http://user:password@localhost:{port}/", "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}?@example.com/", " \thttp://127.0.0.1:{port}/", "HTTP://127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/", "http://10.0.0.1:{port}/", "http://172.16.0.1/", "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://100.100.100.200/", "http://198.18.0.1/",
    "http://224.0.0.1/", "http://240.0.0.1/", "http://255.255.255.255/", "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[ff02::1]/", "http://[fec0::1]/", "http://[2001:db8::1]/", "http://[2001::1]/",
]  # fmt: skip
NO_URLS = [
    "", " ", "/etc/passwd", "file:///etc/passwd", "file://localhost/etc/passwd", "gopher://127.0.0.1:{port}/_GET",
    "ftp://127.0.0.1/", "dict://127.0.0.1:{port}/", "data:text/html,hi", "javascript:alert(1)", "http:", "http://",
    "http:///", "http://:{port}/", "http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:port/", "//127.0.0.1/",
    "127.0.0.1:{port}", "http+unix://%2Fvar%2Frun%2Fdocker.sock/", "httpx://127.0.0.1:{port}/", "ws://127.0.0.1/",
]  # fmt: skip
ODD_HOSTS = [  # refused for one reason or another: not all resolvers know them
    "http://LOCALHOST.:{port}/", "http://[fe80::1%25lo]:{port}/", "http://①②⑦.⓪.⓪.①:{port}/", "http://a b/", "http://*/",
    "http://１２７.0.0.1:{port}/", "http://127。0。0。1:{port}/", "http://exa\\mple/", "http://a\r\nHost: b/", "http://\x00/",
    f"http://{'a' * 64}.test/", "http://.../", "http://%31%32%37.0.0.1:{port}/", "http://127.0.0.1%00.test:{port}/",
    "http://1.2.3.4.5/", "http://[1::2::3]/",
]  # fmt: skip


@pytest.mark.parametrize(
    "urls, message",
    [(LOCAL, "is not a public address"), (NO_URLS, "is not an http:// or https:// URL"), (ODD_HOSTS, "")],
)
def test_what_a_model_must_not_open_is_refused(server, client, urls, message):
    strict = client(allow_private=False)
    for url in urls:
        text, ok = read(strict, url.format(port=server.server_port))
        assert not ok and text.startswith("Error: cannot read the page: ") and message in text, url
    assert not server.seen


def test_no_header_is_smuggled_in_by_a_url(server, client):
    server.pages["/"] = (200, {}, b"<p>ok")
    for url in ("/?a\r\nX-Evil: 1", "/?a HTTP/1.1\r\nX-Evil: 1\r\n\r\n", "/?%0d%0aX-Evil:%201", "/?é\nX-Evil: 1"):
        read(client(), server.url + url)
    assert server.seen and not any("X-Evil" in headers for _, headers, _ in server.seen)


@pytest.fixture
def internet(server, monkeypatch):
    """Names for addresses, the public ones of which lead to the local server; and the addresses connected to."""
    names, connected, resolve, connect = {}, [], socket.getaddrinfo, socket.create_connection

    def getaddrinfo(host, port, *rest, **options):
        if host not in names:
            return resolve(host, port, *rest, **options)
        found = names[host]() if callable(names[host]) else names[host]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    def create_connection(address, *rest, **options):
        connected.append(address[0])
        return connect(("127.0.0.1", address[1]) if address[0] == PUBLIC else address, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    return names, connected


def test_a_public_host_is_connected_by_the_address_that_was_checked(server, client, internet):
    names, connected = internet
    names["site.test"] = [PUBLIC]
    server.pages["/"] = (200, {}, b"<p>public")
    assert all(map(is_public, [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001:81b::200e"]))
    url = f"http://site.test:{server.server_port}/"
    assert read(client(allow_private=False), url) == (f"({url})\npublic", True)
    assert connected == [PUBLIC] and server.seen[0][1]["Host"] == f"site.test:{server.server_port}"


def test_rebinding_changes_nothing(server, client, internet):
    """A name server that answers with a public address first, and with a private one from then on."""
    names, connected = internet
    answers = iter([[PUBLIC]])
    names["rebind.test"] = lambda: next(answers, ["127.0.0.1"])
    server.pages["/"] = (302, {"Location": "/secret"}, b"")
    server.pages["/secret"] = (200, {}, b"<p>secret")
    text, ok = read(client(allow_private=False), f"http://rebind.test:{server.server_port}/")
    assert not ok and "rebind.test is not a public address" in text
    assert connected == [PUBLIC] and [path for path, *_ in server.seen] == ["/"]


@pytest.mark.parametrize("addresses", [[PUBLIC, "127.0.0.1"], ["::1", PUBLIC], ["10.0.0.1"], ["::ffff:10.0.0.1"]])
def test_one_private_address_is_enough_to_refuse(server, client, internet, addresses):
    names, connected = internet
    names["mixed.test"] = addresses
    text, ok = read(client(allow_private=False), f"http://mixed.test:{server.server_port}/")
    assert not ok and "not a public address" in text and not connected and not server.seen


def test_redirects_pass_the_same_gate(server, client, internet):
    names, _ = internet
    names["site.test"] = [PUBLIC]
    strict = client(allow_private=False)
    for n, target in enumerate([url.strip() for url in LOCAL + ODD_HOSTS if url.isascii()] + NO_URLS[3:10]):
        server.seen.clear()
        server.pages["/"] = (302, {"Location": "/next"}, b"")
        server.pages["/next"] = raw(
            f"HTTP/1.1 302 Found\r\nLocation: {target.format(port=server.server_port)}\r\n\r\n".encode()
        )
        text, ok = read(strict, f"http://site.test:{server.server_port}/?{n}")
        assert not ok and [path.split("?")[0] for path, *_ in server.seen] == ["/", "/next"], target


def test_a_second_address_is_tried(server, client, internet):
    names, connected = internet
    names["site.test"] = ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first
    server.pages["/"] = (200, {}, b"<p>ok")
    assert read(client(), f"http://site.test:{server.server_port}/")[1] and connected == ["127.0.0.2", "127.0.0.1"]


@pytest.fixture
def certificate(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=site.test"
    command += f" -addext subjectAltName=DNS:site.test -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


def test_https_checks_the_certificate_against_the_name(server, client, internet, certificate):
    names, connected = internet
    names |= {"site.test": [PUBLIC], "other.test": [PUBLIC]}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.pages["/"] = (200, {}, b"<p>secure")
    trusting = client(allow_private=False)
    trusting.tls.load_verify_locations(certificate[0])
    url = f"https://site.test:{server.server_port}/"
    assert "certificate verify failed" in read(client(allow_private=False, cache=""), url)[0] and not server.seen
    assert read(trusting, url) == (f"({url})\nsecure", True) and set(connected) == {PUBLIC}
    text, ok = read(trusting, url.replace("site", "other"))
    assert not ok and "not valid for 'other.test'" in text and len(server.seen) == 1


def test_a_tls_handshake_has_the_time_limit_too(client):
    def drip(listener):
        connection, _ = listener.accept()
        try:
            for byte in b"\x16\x03\x03\x40\x00\x02" + bytes(500):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=drip, args=[listener], daemon=True).start()
        start = time.monotonic()
        text, ok = read(client(timeout_s=0.4), f"https://127.0.0.1:{listener.getsockname()[1]}/")
    assert not ok and "took longer" in text and time.monotonic() - start < 1.2


# --- whose fault it is ------------------------------------------------------------------------------------------------


def test_a_dead_host_is_the_models_mistake_but_not_a_dead_network(server, client, internet):
    names, _ = internet

    def unknown():
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def broken():
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    names |= {"unknown.test": unknown, "broken.test": broken}
    assert read(client(), "http://unknown.test/") == (
        f"Error: cannot read the page: unknown.test: [Errno {socket.EAI_NONAME}] Name or service not known", False,
    )  # fmt: skip
    text, ok = read(client(), "http://broken.test/")
    assert not ok and "Temporary failure" in text
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    assert "refused" in read(client(), nobody)[0]
    with pytest.raises(UserError, match="no network: neither broken.test nor 127.0.0.1 can be reached"):
        read(client(wikipedia=nobody, cache=""), "http://broken.test/")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_stored_answer_is_not_asked_for_again(server, client):
    server.pages |= {"/wikipedia": wikipedia, "/page": (200, {}, b"<p>stored")}
    first = [call(client(), 'Wikipedia_Search(query="Einstein")'), read(client(), f"{server.url}/page")]
    asked = len(server.seen)
    again = [call(client(), 'Wikipedia_Search(query=" Einstein ")'), read(client(), f"{server.url}/page", "other")]
    assert again == first and len(server.seen) == asked
    read(client(cache=""), f"{server.url}/page")
    assert len(server.seen) == asked + 1


def test_a_frozen_cache_touches_no_network(server, client, monkeypatch, tmp_path):
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    server.pages |= {"/wikipedia": wikipedia, "/gemini": answering(GROUNDED), "/page": (200, {}, b"<p>stored")}
    commands = [
        'Wikipedia_Search(query="Einstein")',
        'Google_Search(query="cup")',
        f'Web_Search(url="{server.url}/page", query="x")',
        f'Web_Search(url="{server.url}/missing", query="x")',
        'Web_Search(url="file:///etc/passwd", query="x")',
    ]
    first = [call(client(), command) for command in commands]
    assert [ok for _, ok in first] == [True, True, True, False, False]

    def no_network(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.delenv("GEMINI_API_KEY")
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert [call(client(frozen=True), command) for command in commands] == first
    before = everything_stored(tmp_path)
    for command in ('Wikipedia_Search(query="other")', 'Web_Search(url="http://127.0.0.1:1/", query="x")'):
        with pytest.raises(UserError, match="has no answer to .*run once without WEB_FROZEN") as error:
            call(client(frozen=True), command)
        assert "\n" not in str(error.value)
    assert everything_stored(tmp_path) == before


def test_errors_are_tried_again_unless_frozen(server, client):
    assert not read(client(), f"{server.url}/later")[1]
    server.pages["/later"] = (200, {}, b"<p>now")
    assert not read(client(frozen=True), f"{server.url}/later")[1]
    assert read(client(), f"{server.url}/later")[1] and read(client(frozen=True), f"{server.url}/later")[1]


def test_a_damaged_answer_is_fetched_anew(server, client, tmp_path):
    server.pages["/"] = (200, {}, b"<p>whole")
    assert read(client(), server.url)[1]
    [path] = (tmp_path / "cache").glob("*/*.json")
    for damage in (b"", b'{"request": ', b"[1]", b"\xff"):
        path.write_bytes(damage)
        assert read(client(), server.url)[1] and json.loads(path.read_bytes())["answer"]["text"] == "whole"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has no answer"):
        read(client(frozen=True), server.url)


def test_a_cache_that_cannot_be_written_stops_the_run(server, client, tmp_path):
    (tmp_path / "file").write_text("")
    server.pages["/"] = (200, {}, b"<p>x")
    with pytest.raises(UserError, match="cannot write to the web cache .*file"):
        read(client(cache=tmp_path / "file"), server.url)


def test_processes_share_a_cache(server, client, tmp_path):
    """Three of them store the same pages at once; whoever reads meanwhile sees whole answers only."""
    server.pages["/"] = (200, {}, b"<p>" + b"word " * 100_000)

    def store():
        shared = client()

        async def pages():
            urls = [f"{server.url}/?{n}" for n in range(5)]
            return await asyncio.gather(
                *(shared.answer(["page", url], lambda url=url: shared.page(url)) for url in urls)
            )

        assert all(len(page["text"]) > 400_000 for page in asyncio.run(pages()))

    processes = [multiprocessing.get_context("fork").Process(target=store) for _ in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for path in (tmp_path / "cache").glob("*/*.json"):
            assert len(json.loads(path.read_bytes())["answer"]["text"]) > 400_000
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(list((tmp_path / "cache").glob("*/*"))) == 5


# --- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, command",
    [("/gemini", 'Google_Search(query="cup {n}")'), ("/slow", 'Web_Search("{url}/slow?n={n}", "page")')],
)
def test_64_slow_calls_run_at_once(server, client, monkeypatch, path, command):
    def slow(handler, query, _):
        time.sleep(0.2)
        return answering(GROUNDED) if path == "/gemini" else (200, {}, f"<p>page {query['n']}".encode())

    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    server.pages[path] = slow
    commands = [command.format(url=server.url, n=n) for n in range(64)]
    measured = []
    while len(measured) < 3 and not (measured and measured[-1][0] < 1):  # other processes share the machine
        server.seen.clear()
        results, *seconds_and_turns = together(client(cache=""), commands)
        assert all(ok for _, ok in results) and len(server.seen) == 64
        measured.append(seconds_and_turns)
    assert path == "/gemini" or results == [(f"({server.url}/slow?n={n})\npage {n}", True) for n in range(64)]
    seconds, turns = measured[-1]
    assert seconds < 1 and turns > 15, measured


def test_a_group_that_asks_the_same_asks_once(server, client):
    def slow(handler, *_):
        time.sleep(0.05)
        return 200, {}, f"<p>answer {len(server.seen)}".encode()

    server.pages["/"] = slow
    results, _, _ = together(client(), [f'Web_Search(url="{server.url}", query="page")'] * 16)
    assert results == [(f"({server.url}/)\nanswer 1", True)] * 16 and len(server.seen) == 1


# --- passages ---------------------------------------------------------------------------------------------------------


def test_passages_overlap_and_lose_nothing():
    words = [f"w{n}" for n in range(1000)]
    pieces = passages("  " + " ".join(words) + "\n")
    assert [len(piece.split()) for piece in pieces] == [200, 200, 200, 200, 200, 100]
    assert [piece.split()[0] for piece in pieces] == ["w0", "w180", "w360", "w540", "w720", "w900"]
    assert all(a.split()[-20:] == b.split()[:20] for a, b in zip(pieces, pieces[1:]))
    assert passages("") == passages(" \n") == [] and passages("one two") == ["one two"]
    assert [len(passages(" ".join(words[:n]))) for n in (199, 200, 201, 380, 381)] == [1, 1, 2, 2, 3]
    assert max(map(len, passages("東京" * 10_000))) == 8000


def test_the_best_passages_of_all_pages():
    pages = [
        {"title": "Zilath", "url": "u1", "text": f"{FILLER} nothing here"},
        {"title": "", "url": "u2", "text": f"{FILLER} the green zither " + FILLER},
    ]
    found = best_passages(pages, "what is the green zither?")
    assert list(found) == ["(u2)"] and "the green zither" in found["(u2)"][0]
    assert best_passages([], "x") == {}


# --- the tools of a run -----------------------------------------------------------------------------------------------

NAMES = ["lab.web.Wikipedia_Search", "lab.web.Web_Search", "lab.web.Google_Search"]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has not made its client yet, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    web.client.cache_clear()
    yield
    web.client.cache_clear()


def test_a_run_names_the_tools_and_one_line_prints_their_settings(fresh, capsys, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    assert list(find_tools(["Search", *NAMES])) == ["Search", "Wikipedia_Search", "Web_Search", "Google_Search"]
    line = "lab.web: WEB_CACHE=web_cache WEB_FROZEN=0 WEB_SUMMARY=0 WEB_PRIVATE=0; keys: GOOGLE_API_KEY\n"
    assert capsys.readouterr().out == line
    chosen = web.client()
    assert chosen is web.client() and chosen.cache == Path("web_cache") and chosen.google_key == KEY
    assert not (chosen.frozen or chosen.summary or chosen.allow_private)


def test_the_settings_come_from_the_environment(fresh, capsys, monkeypatch, tmp_path):
    (tmp_path / "stored").mkdir()
    for name, value in {"CACHE": "stored", "FROZEN": "1", "SUMMARY": "1", "PRIVATE": "0"}.items():
        monkeypatch.setenv(f"WEB_{name}", value)
    assert list(find_tools(NAMES[2:])) == ["Google_Search"]  # needs no key: the cache answers
    chosen = web.client()
    assert chosen.cache == Path("stored") and chosen.frozen and chosen.summary and not chosen.allow_private
    assert "WEB_CACHE=stored WEB_FROZEN=1 WEB_SUMMARY=1 WEB_PRIVATE=0; keys: none\n" in capsys.readouterr().out
    web.client.cache_clear()
    for name, value in {"CACHE": "", "FROZEN": "", "SUMMARY": "0", "PRIVATE": "1"}.items():
        monkeypatch.setenv(f"WEB_{name}", value)
    chosen = web.client()
    assert chosen.cache is None and not chosen.frozen and not chosen.summary and chosen.allow_private


@pytest.mark.parametrize(
    "variables, name, message",
    [
        ({}, NAMES[2], "Google_Search needs GOOGLE_API_KEY or GEMINI_API_KEY: .* leave Google_Search out of --tools"),
        ({"GEMINI_API_KEY": " "}, NAMES[2], "Google_Search needs"),
        ({"WEB_FROZEN": "1"}, NAMES[0], "WEB_FROZEN=1 needs a filled cache, and WEB_CACHE=web_cache is no folder"),
        ({"WEB_FROZEN": "1", "WEB_CACHE": ""}, NAMES[0], "WEB_FROZEN=1 needs a filled cache"),
        ({"WEB_FROZEN": "yes"}, NAMES[0], "WEB_FROZEN=yes in the environment: write 1 for on, or 0 for off"),
        ({}, "lab.web.Searsh", "there is no lab.web.Searsh .*Wikipedia_Search, Web_Search, Google_Search"),
    ],
)
def test_wrong_settings_end_a_run_before_it_begins(fresh, monkeypatch, variables, name, message):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message) as error:
        find_tools(["Search", name])
    assert "\n" not in str(error.value)


def test_the_planner_is_told_of_the_tools():
    lines = agent.toolbox(WEB_TOOLS).split("\n")
    assert lines[1].startswith("Web_Search(url: str, query: str): Opens one web page")
    assert all("Limits:" in line and "env" not in line for line in lines) and len(lines) == 3
    assert agent.parse_plan("Sub-Goal: x\nTool Name: wikipedia_search_tool", WEB_TOOLS).tool == "Wikipedia_Search"


class Scripted:
    """An engine whose text depends on the module that asks."""

    def __init__(self, **texts):
        self.texts, self.prompts = texts, []

    def encode(self, prompt):
        self.prompts.append(prompt)
        return [len(self.prompts) - 1]

    def generate_batch(self, requests):
        texts = [self._text(self.prompts[request.prompt_ids[0]]) for request in requests]
        return [Completion([0], [1], [0.0], text, "stop", (1, 1)) for text in texts]

    def _text(self, prompt):
        return next(text for mark, text in self.texts.items() if mark in prompt)


def system(command: str) -> AgentSystem:
    plan = "Context: none\nSub-Goal: read the page\nTool Name: Web Search"
    frozen = Scripted(prepare="look", turn=command, check="Conclusion: STOP", Answer="<answer>green</answer>")
    return AgentSystem(Scripted(plan=plan), frozen, None, None, tools=find_tools(["lab.web.Web_Search"]))


def test_a_question_through_the_whole_system(fresh, server, monkeypatch):
    monkeypatch.setenv("WEB_PRIVATE", "1")
    server.pages["/"] = (200, {}, b"<p>the zither is green")
    examples, solver = [Example("What colour?", "green")], system(f'Web_Search(url="{server.url}", query="zither")')
    result = evaluate(solver, examples, (0,))[0]
    assert result["accuracy"] == 1.0 and result["tool_shares"] == {"Web_Search": 1.0} and not result["tool_error_rate"]
    assert any("the zither is green" in prompt for prompt in solver.frozen.prompts)
    solver.frozen.texts["turn"] = f'Web_Search(url="{server.url}/none", query="zither")'
    assert evaluate(solver, examples, (0,))[0]["tool_error_rate"] == 1.0
    solver.frozen.texts["turn"] = f'Web_Search(url="{server.url}/other", query="zither")'

    monkeypatch.setenv("WEB_FROZEN", "1")
    web.client.cache_clear()
    with pytest.raises(UserError, match="has no answer to"):
        evaluate(solver, examples, (0,))
