"""What the executor can call: three tools, the encyclopedia they search, and the sandbox that code runs in.

To add a tool, write one async function (its docstring is what the planner reads) and name it in `TOOLS`.

The sandbox runs each program once, in a process of its own, without inherited environment or stdin, in an empty
scratch directory that is removed afterwards. Wall-clock time, CPU time, memory, file size and output are
limited, and the program can start no other process or thread. It uses the first level that is seen to work:

    bubblewrap   no network; the program sees a read-only Python runtime and its scratch directory, nothing else
    namespaces   no network and no sight of other processes; it may read and write what file permissions let it
    process      the limits only, and the rights of `nobody` where we are root

Not covered: at no level, holes in the kernel; at the weaker two what `Sandbox.describe()` says, and that a sleeping
program outlives a trainer that was killed outright. It is made for a model that errs, not for an enemy.
"""

import ast
import asyncio
import contextlib
import inspect
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

BASE_GENERATOR_PROMPT = """\
Answer the query from your own knowledge. Be brief and exact. If you do not know, say that you do not know.

Query: {query}"""

PYTHON_CODER_PROMPT = """\
Write a short Python program that computes the answer to the query and prints it.
Use only the standard library. Do not read input or files. Answer with one ```python block and nothing else.

Query: {query}"""

# In nearly every article: they rank nothing, and cost most of the time of a search.
STOP_WORDS = set("a an and are at by did do does for from how in is of on or that the to was what which who".split())
SEARCH_CHARS = 2000  # of each article: a long one would crowd the planner's memory
MAX_COMMAND_CHARS = 8000
SIMPLE_TYPES = (str, int, float, bool, list, dict)  # of arguments; other annotations are not checked


@dataclass
class ToolEnv:
    """What a tool may use. Every tool receives it first, so tools hold no state of their own."""

    ask: Callable[[str, str], Awaitable[str]]  # await ask(role, prompt) -> text of a frozen model; one call at a time
    corpus: "Corpus"
    sandbox: "Sandbox"
    tools: dict[str, Callable] = field(default_factory=lambda: TOOLS)  # what the planner may choose from, by name
    web: Any = None  # the client of the web tools, where they are on offer


class Corpus:
    """Articles (title, text) in SQLite's full-text index, ranked by BM25."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection  # one thread at a time, not always the same one: hence check_same_thread=False

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """An index on disk, read-only, so that any number of runs can share it."""
        try:
            uri = f"file:{quote(str(Path(path).resolve()))}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            connection.execute("SELECT title, text FROM articles LIMIT 1")
        except sqlite3.Error as error:
            advice = f"make one: python tools.py index articles.jsonl {path}"
            raise FileNotFoundError(f"no corpus at {path} ({error}); {advice}") from None
        return cls(connection)

    @classmethod
    def from_articles(cls, articles: Iterable[tuple[str, str]], path: str | Path = ":memory:") -> "Corpus":
        """A new index. On disk it is built beside its place and moved there when whole: nobody sees half of it."""
        in_memory = str(path) == ":memory:"
        place = ":memory:" if in_memory else f"{path}.partial-{os.getpid()}"
        try:
            connection = sqlite3.connect(place, check_same_thread=False)
            with contextlib.nullcontext() if in_memory else contextlib.closing(connection), connection:
                connection.execute("CREATE VIRTUAL TABLE articles USING fts5(title, text)")
                connection.executemany("INSERT INTO articles VALUES (?, ?)", articles)
            if in_memory:
                return cls(connection)
            os.replace(place, path)
        finally:
            Path(place).unlink(missing_ok=True)
        return cls.open(path)

    def search(self, query: str, k: int = 1) -> list[tuple[str, str]]:
        """The k best (title, text). Any text is a legal query: its words are quoted, then joined by OR."""
        words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))[:64]  # FTS5 bounds the depth of a query
        match = " OR ".join(f'"{word}"' for word in [w for w in words if w not in STOP_WORDS] or words)
        # A title counts tenfold: who names a thing wants its own article, not one that mentions it.
        ranked = """SELECT title, text FROM articles WHERE articles MATCH ?
                    ORDER BY bm25(articles, 10.0, 1.0), rowid LIMIT ?"""
        return self.connection.execute(ranked, (match, k)).fetchall() if words else []


def read_articles(path: str | Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each line of a JSONL file; a malformed line raises ValueError naming file and line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                article = json.loads(line)
                title, text = article["title"], article["text"]
                (title + text).encode()  # strings both, and no lone surrogate, which JSON allows and SQLite does not
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f'{path}:{number}: not {{"title": "...", "text": "..."}} ({reason})') from None
            yield title, text


ENVIRONMENT = {"TMPDIR": "."}  # all that a program inherits
SCRATCH_MB = 16
START_TIMEOUT_S = 60  # for the machine, however busy; the program's own clock starts when the sandbox is READY
READY = b"ready\n"

# Runs inside the sandbox before the program: gives up rights, sets limits, says it is ready, and only then reads it.
# A preexec_fn would do the same at the price of forking the whole training process for each program.
BOOT = r"""
import builtins, encodings, os, resource, sys
if os.getuid() == 0:  # limits and file permissions do not bind root
    os.chmod(".", 0o777)
    if os.path.isdir("/proc/self/fd"):  # a Python below /root stays importable through its open directories
        for path in (sys.path, encodings.__path__):
            path[:] = [f"/proc/self/fd/{os.open(p, os.O_RDONLY)}" for p in path if os.path.isdir(p)]
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for name, value in (pair.split("=") for pair in sys.argv[1:]):
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
    resource.setrlimit(kind, (value, value))
os.write(1, b"ready\n")
source = sys.stdin.buffer.read().decode()  # to its end: the program finds an empty stdin

def report(kind, error, trace):
    import linecache, traceback
    linecache.cache["program.py"] = (0, None, source.splitlines(True), "program.py")
    while trace and trace.tb_frame.f_code.co_filename != "program.py":
        trace = trace.tb_next
    print(*"".join(traceback.format_exception(kind, error, trace)).splitlines()[-4:], sep="\n")

sys.excepthook, sys.argv = report, ["program.py"]
builtins.exit = builtins.quit = sys.exit  # `site` would define them
main = sys.modules["__main__"] = type(sys)("__main__")  # a clean module: no name of this text reaches the program
exec(compile(source, "program.py", "exec"), main.__dict__)
"""


class Failure(str):
    """The text of a tool call that failed by the model's mistake."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """An empty folder, removed afterwards, whatever a program has made of it."""
    try:
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as scratch:
            yield scratch
    except RecursionError:  # folders in folders, more than Python can walk down
        subprocess.run(["rm", "-rf", "--", scratch])


class Sandbox:
    """Runs Python source in a separate, limited, killable process."""

    LEVELS = {  # strongest first, each with what it leaves in reach of the program
        "bubblewrap": "nothing but holes in the kernel",
        "namespaces": "the files that {user} may read or write",
        "process": "the network, and the files and processes of {user}",
    }

    def __init__(self, timeout_s: float = 5.0, memory_mb: int = 512, output_chars: int = 2000, level: str = "auto"):
        self.timeout_s, self.memory_mb, self.output_chars = timeout_s, memory_mb, output_chars
        self._slots = weakref.WeakKeyDictionary()  # event loop -> semaphore: one sandbox serves several asyncio.run
        self.level, self.command = self._choose(list(self.LEVELS) if level == "auto" else [level])

    def describe(self) -> str:
        """One line to print at start."""
        user = "the user nobody" if os.getuid() == 0 else "this user"
        advice = "" if self.level == "bubblewrap" else " (bubblewrap, where it can be installed, closes this)"
        return f"sandbox: {self.level}; in reach of a program: {self.LEVELS[self.level].format(user=user)}{advice}"

    async def run(self, code: str) -> str:
        """What the program printed; a Failure that ends with the traceback when it fails. Runs it once."""
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(os.cpu_count() or 1))
        async with slots:
            with scratch_folder() as scratch:
                process = await asyncio.create_subprocess_exec(
                    *self.command,
                    cwd=scratch,
                    env=ENVIRONMENT,
                    start_new_session=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                output, timed_out = bytearray(), False
                try:
                    await self._wait_until_ready(process)
                    try:
                        await asyncio.wait_for(self._feed_and_read(process, code, output), self.timeout_s)
                    except TimeoutError:
                        timed_out = True
                finally:  # also when this task is cancelled
                    await self._kill_whole(process)
        return self._result(output, process.returncode, timed_out)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
            problem = b"" if line == READY else line + await process.stdout.read(2000)
        except TimeoutError:
            problem = b"no answer in %d s" % START_TIMEOUT_S
        if problem or line != READY:
            raise RuntimeError(f"the {self.level} sandbox did not start: {problem.decode(errors='replace').strip()}")

    async def _feed_and_read(self, process: asyncio.subprocess.Process, code: str, output: bytearray) -> None:
        with contextlib.suppress(ConnectionError):  # it was killed before it had read all
            process.stdin.write(code.encode(errors="replace"))
            await process.stdin.drain()
        process.stdin.close()
        while chunk := await process.stdout.read(4096):
            output += chunk
            if len(output) > 4 * self.output_chars:  # UTF-8 takes up to four bytes for a character
                return
        await process.wait()

    async def _kill_whole(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            with contextlib.suppress(OSError):  # a program that has left the group: it is the first of its namespace
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for child in map(int, children):
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # it ended this moment
                os.killpg(process.pid, signal.SIGKILL)

        async def drain() -> None:
            while await process.stdout.read(65536):  # ends when nobody is left to write to it
                pass
            await process.wait()

        await asyncio.wait_for(drain(), START_TIMEOUT_S)  # better an error than a run that hangs

    def _result(self, output: bytes, exit_code: int, timed_out: bool) -> str:
        text = output.decode(errors="replace").strip()
        cut = f"{text[: self.output_chars]}\n... (cut at {self.output_chars} characters)"
        if len(output) > 4 * self.output_chars:
            return cut  # it was killed for it, so its exit code says nothing
        if len(text) > self.output_chars:
            text = f"{cut}\n{text[-300:]}" if exit_code == 1 else cut  # the end has the traceback
        if timed_out:
            return Failure(f"{text}\nError: timed out after {self.timeout_s:g} s".strip())
        if exit_code not in (0, 1):  # 1: the traceback has said why
            text = f"{text}\nError: the program died (exit code {exit_code})".strip()
        text = text or "(no output; use print)"
        return Failure(text) if exit_code else text

    def _choose(self, levels: list[str]) -> tuple[str, list[str]]:
        """The first level at which a program really runs, and its command."""
        problems = []
        for level in levels:
            with tempfile.TemporaryDirectory(prefix="sandbox-") as scratch:
                try:
                    command = self._command(level)
                    trial = subprocess.run(
                        command,
                        input=b"import json, math; print(6 * 7)",
                        cwd=scratch,
                        env=ENVIRONMENT,
                        capture_output=True,
                        timeout=START_TIMEOUT_S,
                    )
                except (OSError, subprocess.TimeoutExpired) as error:
                    problems.append(f"{level}: {error}")
                    continue
            if trial.stdout == READY + b"42\n":
                return level, command
            problems.append(f"{level}: {(trial.stdout + trial.stderr).decode(errors='replace').strip()[-300:]}")
        raise RuntimeError("no sandbox works on this machine: " + "; ".join(problems))

    def _command(self, level: str) -> list[str]:
        limits = {
            "RLIMIT_CPU": int(self.timeout_s) + 1,
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_FSIZE": SCRATCH_MB << 20,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,  # no child, so none to outlive its program or to share out the other limits
        }
        if sys.platform == "darwin":
            del limits["RLIMIT_AS"]  # macOS refuses it
        # The interpreter below any virtual environment; -I -S leave it the standard library alone.
        interpreter = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        python = [interpreter, *"-I -S -B -u -X utf8 -c".split(), BOOT, *(f"{k}={v}" for k, v in limits.items())]
        root = os.getuid() == 0  # anyone else gets namespaces by way of a user namespace of his own
        if level == "process":
            return python
        if level == "namespaces":
            user = "" if root else "--user --map-current-user"
            return [*f"unshare {user} --net --ipc --pid --mount-proc --fork --kill-child".split(), *python]
        if level == "bubblewrap":
            runtime = [sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
            options = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
            size = f"--size {SCRATCH_MB << 20}" if "--size" in options else ""  # since bubblewrap 0.7
            capabilities = "--cap-add CAP_SETUID --cap-add CAP_SETGID" if root else ""  # given up again in BOOT
            return [
                *"bwrap --unshare-ipc --unshare-net --unshare-pid --unshare-uts --die-with-parent".split(),
                *(word for parent in reversed(Path(sys.base_prefix).parents) for word in ("--dir", str(parent))),
                *(word for path in runtime for word in ("--ro-bind-try", path, path)),
                *f"--dev-bind /dev/null /dev/null {size} --tmpfs /tmp --chdir /tmp --remount-ro /".split(),
                *capabilities.split(),
                *python,
            ]
        raise ValueError(f"unknown sandbox level {level!r}; there are auto, {', '.join(self.LEVELS)}")


async def Base_Generator(env: ToolEnv, query: str) -> str:
    """Answers from what a language model knows: facts, explanations, reasoning.
    Args: query - the question, complete in itself.
    Limits: looks nothing up and computes nothing; it may be wrong.
    """
    return await env.ask("base", BASE_GENERATOR_PROMPT.format(query=query))


async def Python_Coder(env: ToolEnv, query: str) -> str:
    """Writes and runs a Python program: arithmetic, counting, dates, algorithms.
    Args: query - what to compute, with every number it needs.
    Limits: standard library only; no network, no files; a few seconds.
    """
    return await env.sandbox.run(extract_code(await env.ask("coder", PYTHON_CODER_PROMPT.format(query=query))))


async def Search(env: ToolEnv, query: str) -> str:
    """Finds the encyclopedia article that matches best.
    Args: query - the name of the thing to look up, and a few keywords.
    Limits: one article a call; knows nothing outside the encyclopedia.
    """
    articles = env.corpus.search(query)
    return "\n".join(f"{title}: {text[:SEARCH_CHARS]}" for title, text in articles) or "No results."


TOOLS = {tool.__name__: tool for tool in (Base_Generator, Python_Coder, Search)}


def extract_code(text: str) -> str:
    """The last block fenced as Python (a model corrects itself downwards), else the first fenced one (a second is
    often sample output), else the whole text. A fence that is never closed ends with the text."""
    blocks = re.findall(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    tagged = [code for tag, code in blocks if tag.lower() in ("python", "python3", "py")]
    return textwrap.dedent(tagged[-1] if tagged else blocks[0][1] if blocks else text).strip()


def _signature(tool: Callable) -> inspect.Signature:
    """As the model sees it: without env."""
    signature = inspect.signature(tool, eval_str=True)
    return signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=signature.empty)


def tool_metadata(tool: Callable) -> str:
    """One line for the prompts: name, arguments with their types, what it is for, limits."""
    return f"{tool.__name__}{_signature(tool)}: {' '.join(tool.__doc__.split())}"


@dataclass(frozen=True)
class Command:
    name: str
    kwargs: dict

    def __str__(self) -> str:
        """As the memory keeps it, however the model had written it: strings in double quotes."""
        arguments = (
            f"{key}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)}"
            for key, value in self.kwargs.items()
        )
        return f"{self.name}({', '.join(arguments)})"


class CommandError(ValueError):
    """Why a command cannot run, in words for the model that wrote it."""


# String literals and brackets: enough to find where a call ends.
_TOKEN = re.compile(
    r"""  "{3}(?:\\.|[^\\])*?"{3} | "(?:\\.|[^"\\\n])*"
                         | '{3}(?:\\.|[^\\])*?'{3} | '(?:\\.|[^'\\\n])*' | [()\[\]{}]""",
    re.DOTALL | re.VERBOSE,
)


def parse_command(text: str, tools: dict[str, Callable] = TOOLS) -> Command:
    """The first well-formed call of one of the tools in the model's text. Nothing in the text is ever executed."""
    if len(text) > MAX_COMMAND_CHARS:
        raise CommandError(f"the command is longer than {MAX_COMMAND_CHARS} characters")
    starts = [match.start() for match in re.finditer(rf"(?<![\w.])(?:{'|'.join(tools)})\s*\(", text)]
    if not starts:
        called = re.search(r"[A-Za-z_][\w.]*(?=\()", text)
        problem = f"unknown tool {called[0]!r}" if called else "no tool call found"
        *_, example = tools.values()
        arguments = ", ".join(f'{name}="..."' for name in _signature(example).parameters)
        raise CommandError(f"{problem}; write one call of {', '.join(tools)}, such as {example.__name__}({arguments})")
    errors = []
    for start in starts[:8]:  # chatter may name a tool before the call; a flood of names gets no more than this
        try:
            return _parse_call(_call_source(text, start), tools)
        except CommandError as error:
            errors.append(error)
    raise errors[0]


def _call_source(text: str, start: int) -> str:
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth == 0:
            return text[start : token.end()]
    raise CommandError(f"the call {text[start : start + 80]!r} is never closed")


def _parse_call(source: str, tools: dict[str, Callable]) -> Command:
    try:
        with warnings.catch_warnings():  # of "\d" in a model's string: nobody here can mend it
            warnings.simplefilter("ignore")
            call = ast.parse(source, mode="eval").body
        args = [ast.literal_eval(argument) for argument in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        json.dumps([args, kwargs], ensure_ascii=False).encode()  # no bytes, sets or lone surrogates pass
    except SyntaxError as error:
        raise CommandError(f"{source[:80]!r} is not a valid call: {error.msg}") from None
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise CommandError(f'the arguments of {source[:80]!r} must be literal values, such as "text" or 3') from None
    name, signature = call.func.id, _signature(tools[call.func.id])
    try:
        if len(kwargs) < len(call.keywords):
            raise TypeError("an argument is given twice")
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CommandError(f"{name}: {error}; write {name}{signature}") from None
    for key, value in arguments.items():
        wanted = signature.parameters[key].annotation
        fits = isinstance(value, (int, float) if wanted is float else wanted) if wanted in SIMPLE_TYPES else True
        if not fits:
            raise CommandError(f"{name}: {key} must be {wanted.__name__}, not {type(value).__name__}")
    return Command(name, arguments)


async def run_tool(env: ToolEnv, command: Command) -> tuple[str, bool]:
    """The tool's text, and whether it succeeded. What a tool raises is a fault of the machine and stops the run."""
    text = await env.tools[command.name](env, **command.kwargs)
    return str(text), not isinstance(text, Failure)


def main(argv: list[str]) -> int:
    if len(argv) != 3 or argv[0] != "index":
        print("usage: python tools.py index articles.jsonl corpus.db", file=sys.stderr)
        return 2
    try:
        corpus = Corpus.from_articles(read_articles(argv[1]), argv[2])
    except (OSError, ValueError, sqlite3.Error) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{argv[2]}: {corpus.connection.execute('SELECT count(*) FROM articles').fetchone()[0]} articles")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
