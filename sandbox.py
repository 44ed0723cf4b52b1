"""Where code that a model wrote runs: a separate process, limited and killable.

Each program runs once, without inherited environment or stdin, in an empty scratch directory that is removed
afterwards (after a kill: at the next start). Wall-clock time, CPU time, memory, file size and output are limited, and
the program can start no other process or thread. The sandbox uses the first of these levels that works on the machine:

    bubblewrap   no network; the program sees a read-only Python runtime and its scratch directory, nothing else
    namespaces   no network and no sight of other processes; the program reads and writes what file permissions allow
    process      the limits only, and the rights of `nobody` when we are root

Not covered: at every level, what `Sandbox.describe()` says, and files without a name (memfd), which take up to 192 MB
beside the memory limit; at the weaker two, that a sleeping program outlives a trainer that was killed outright, and
that `nobody` sees what lies beside a Python below /root. The sandbox is made for a model that errs, not for an enemy.
"""

import ast
import asyncio
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNREADABLE = (SyntaxError, ValueError, TypeError, LookupError, RecursionError, MemoryError)  # what a bad text raises


def reply(text: str) -> str:
    """What a model says once it has thought. Thinking that never ends leaves nothing of what follows it."""
    said = re.split(r"(?i)</think(?:ing)?>", text)[-1]
    return re.split(r"(?i)<think(?:ing)?>", said)[0]


def parse(code: str, mode: str = "eval") -> Any:
    """The syntax tree of a model's expression, or of its statements if the mode is exec. Nothing runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about "\d" in a model's string, which nobody here can mend
        return ast.parse(code.strip(), mode=mode).body


def extract_code(text: str) -> str:
    """The whole text if it is Python. Else the last block fenced as Python or in <code> tags (a model corrects itself
    further down), the last one after a line `Code:`, the first one (a second is often sample output), or the text.

    A program may hold a fence in a string. So a block ends at the last fence, or the end of the text, up to which it
    is valid Python; a block that never is ends at the next fence.
    """
    text = textwrap.dedent(reply(text)).strip()
    with contextlib.suppress(*UNREADABLE):
        parse(text, "exec")
        return text
    fence = r"(?m)(?:`{3,}|^~{3,})[^`\n]*\n|`{3,}python |`{3,}|^~{3,}|<code>(?!\s*`)|</code>"
    fences = list(re.finditer(fence, text))[:40]  # a flood of fences would take too long
    best, code = -1, re.split(r"(?im)^[^\w\n#]*(?:code|here .*):\W*$", text)[-1]
    while fences:
        opening, *fences = fences
        ends, last = [*(fence.start() for fence in fences), len(text)], 0
        for i, end in enumerate(ends):
            with contextlib.suppress(*UNREADABLE):
                parse(textwrap.dedent(text[opening.end() : end]), "exec")
                last = i
        tagged = re.match(r"(?i)[`~]+[ \t]*(python3?|py)\b|<code", opening[0])
        rank = 2 if tagged else 1 if re.search(r"(?im)^\W*code\W*\Z", text[: opening.start()]) else 0
        if opening[0].endswith(("\n", " ", "<code>")) and (rank > best or rank == best > 0):
            best, code = rank, text[opening.end() : ends[last]]
        fences = fences[last + 1 :]
    return textwrap.dedent(code).strip()


ENVIRONMENT = {"TMPDIR": "."}  # all that a program inherits
SCRATCH = "nano-agentflow-sandbox-"  # how the name of a scratch folder begins
SCRATCH_MB = 8  # of one file
MAX_OUTPUT = 1 << 20  # bytes that a program may print; one that prints more is killed, and its exit code says nothing
START_TIMEOUT_S = 60  # a busy machine is slow to start; the program's own clock begins when the sandbox is READY
READY = b"ready\n"

# BOOT runs in the sandbox: it gives up rights, sets limits, says that it is ready, and only then reads the program.
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
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, or raise OSError if another process holds it. A kill releases it, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """An empty folder that is removed afterwards, whatever a program has put into it."""
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch, locked(scratch):
            yield scratch
    except RecursionError:  # folders nested deeper than Python can walk
        subprocess.run(["rm", "-rf", "--", scratch])


def remove_abandoned_folders() -> None:
    """Remove the scratch folders of processes that were killed: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):  # it is locked, or another process has just removed it
            status = folder.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > 1:  # a new one has no lock yet
                with locked(folder), scratch_folder() as scratch:
                    folder.rename(scratch)  # over the empty folder, to be removed in its place


class Sandbox:
    """Runs Python source in a separate, limited, killable process."""

    LEVELS = {  # strongest first; the text says what a program still reaches, besides what no level closes
        "bubblewrap": "",
        "namespaces": "the files that {user} may read or write",
        "process": "the network, and the files and processes of {user}",
    }

    def __init__(self, timeout_s: float = 5.0, memory_mb: int = 512, output_chars: int = 2000, level: str = "auto"):
        self.timeout_s, self.memory_mb, self.output_chars = timeout_s, memory_mb, output_chars
        remove_abandoned_folders()
        # One sandbox serves several asyncio.run. So each event loop has its own semaphore and its own running programs.
        self._slots, self._running = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()
        self.level, self.command = self._choose(list(self.LEVELS) if level == "auto" else [level])

    def describe(self) -> str:
        """One line to print at start."""
        user = "the user nobody" if os.getuid() == 0 else "this user"
        reach = self.LEVELS[self.level].format(user=user)
        reach += " (bubblewrap closes this, if you can install it), " if reach else "only "
        return f"sandbox: {self.level}; in reach of a program: {reach}vsock sockets, the session keyring, kernel holes"

    async def run(self, code: str) -> str:
        """Run the program -> what it printed. If it failed, this is a `Failure` that ends with the traceback. Equal
        programs that are asked for at the same time run once: the rollouts of a question often write the same one."""
        running = self._running.setdefault(asyncio.get_running_loop(), {})
        if code not in running:
            running[code] = asyncio.ensure_future(self._run(code))
            running[code].add_done_callback(lambda _: running.pop(code))
        return await running[code]

    async def _run(self, code: str) -> str:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes share them
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(cores or 1))
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
            if len(output) > MAX_OUTPUT:
                return
        await process.wait()

    async def _kill_whole(self, process: asyncio.subprocess.Process) -> None:
        children: list[str] = []
        if process.returncode is None:
            with contextlib.suppress(OSError):  # a program may have left the group: kill the first of its namespace
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for child in map(int, children):
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # it ended this moment
                os.killpg(process.pid, signal.SIGKILL)

        async def drain() -> None:
            while await process.stdout.read(65536):  # ends when no process can write to it any more
                pass
            await process.wait()
            # If we are process 1 of a container, orphans become our children, and stay as zombies until we wait.
            for orphans in (-process.pid, *map(int, children)):  # its group, then those that may have left it
                with contextlib.suppress(ChildProcessError):  # no more of them are ours
                    while True:
                        os.waitpid(orphans, os.WNOHANG)
                        await asyncio.sleep(0.001)

        await asyncio.wait_for(drain(), START_TIMEOUT_S)  # an error is better than a run that hangs

    def _result(self, output: bytes, exit_code: int, timed_out: bool) -> str:
        text = output.decode(errors="replace").strip()
        if len(text) > self.output_chars:
            failed = exit_code == 1 and len(output) <= MAX_OUTPUT  # then a traceback stands at the end
            end = f"\n{text[-300:]}" if failed else ""
            text = f"{text[: self.output_chars]}\n... (cut at {self.output_chars} characters){end}"
        if timed_out:
            return Failure(f"{text}\nError: timed out after {self.timeout_s:g} s".strip())
        if len(output) > MAX_OUTPUT:
            return Failure(f"{text}\nError: the program printed more than {MAX_OUTPUT:,} bytes")
        if exit_code not in (0, 1):  # 1: the traceback has said why
            text = f"{text}\nError: the program died (exit code {exit_code})".strip()
        text = text or "(no output; use print)"
        return Failure(text) if exit_code else text

    def _choose(self, levels: list[str]) -> tuple[str, list[str]]:
        """The first level at which a program really runs, and its command."""
        problems = []
        for level in levels:
            with scratch_folder() as scratch:
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
            "RLIMIT_NOFILE": 24,  # files without a name are memory that no other limit counts: 24 of SCRATCH_MB at most
            "RLIMIT_FSIZE": SCRATCH_MB << 20,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,  # no child: it could outlive the program and would have limits of its own
        }
        if sys.platform == "darwin":
            del limits["RLIMIT_AS"]  # macOS refuses it
        # This is the interpreter below any virtual environment. -I -S leave it only the standard library.
        interpreter = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        python = [interpreter, *"-I -S -B -u -X utf8 -c".split(), BOOT, *(f"{k}={v}" for k, v in limits.items())]
        root = os.getuid() == 0  # any other user needs a user namespace before the other namespaces
        if level == "process":
            return python
        if level == "namespaces":
            user = "" if root else "--user --map-current-user"
            return [*f"unshare {user} --net --ipc --pid --mount-proc --fork --kill-child".split(), *python]
        if level == "bubblewrap":
            runtime = [sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
            options = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
            size = f"--size {SCRATCH_MB << 20}" if "--size" in options else ""  # since bubblewrap 0.7
            capabilities = "--cap-add CAP_SETUID --cap-add CAP_SETGID" if root else ""  # BOOT gives them up again
            return [
                *"bwrap --unshare-ipc --unshare-net --unshare-pid --unshare-uts --die-with-parent".split(),
                *(word for parent in reversed(Path(sys.base_prefix).parents) for word in ("--dir", str(parent))),
                *(word for path in runtime for word in ("--ro-bind-try", path, path)),
                *f"--dev-bind /dev/null /dev/null {size} --tmpfs /tmp --chdir /tmp --remount-ro /".split(),
                *capabilities.split(),
                *python,
            ]
        raise ValueError(f"unknown sandbox level {level!r}; there are auto, {', '.join(self.LEVELS)}")
