"""The sandbox in real processes, at each level that this machine allows."""

import asyncio
import contextlib
import http.server
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import sandbox as module
from sandbox import Failure, Sandbox, extract_code

_sandboxes: dict[str, Sandbox] = {}


def sandbox_at(level: str) -> Sandbox:
    if level not in _sandboxes:
        try:
            _sandboxes[level] = Sandbox(level=level)
        except RuntimeError as error:
            pytest.skip(f"level {level} does not work here: {error}")
    return _sandboxes[level]


@pytest.fixture(params=list(Sandbox.LEVELS))
def sandbox(request) -> Sandbox:
    return sandbox_at(request.param)


@pytest.fixture(params=["bubblewrap", "namespaces"])
def isolated(request) -> Sandbox:
    return sandbox_at(request.param)


@pytest.fixture
def impatient(sandbox, monkeypatch) -> Sandbox:
    monkeypatch.setattr(sandbox, "timeout_s", 0.5)
    return sandbox


def run(sandbox: Sandbox, code: str) -> str:
    return asyncio.run(sandbox.run(code))


def processes(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it ended while we looked
            continue
    return found


def marked(sandbox: Sandbox, monkeypatch) -> str:
    """Put a harmless argument on the sandbox's command line, by which its processes can be found."""
    marker = f"RLIMIT_CORE={time.time_ns()}"
    monkeypatch.setattr(sandbox, "command", [*sandbox.command, marker])
    return marker


def gone(marker: str) -> bool:
    deadline = time.time() + 2
    while processes(marker) and time.time() < deadline:
        time.sleep(0.02)
    return not processes(marker)


# --- the sandbox runs honest programs ---------------------------------------------------------------------------------

HONEST = {
    "arithmetic": ("print(12 * 34)", "408"),
    "recursion": ("def fact(n):\n    return 1 if n < 2 else n * fact(n - 1)\nprint(fact(20))", "2432902008176640000"),
    "helper functions": ("def f(x): return g(x) + 1\ndef g(x): return 2 * x\nprint(f(4))", "9"),
    "imports inside functions": ("import math\ndef f(): return math.comb(5, 2)\nprint(f())", "10"),
    "comprehension over a top-level name": ("k = 3\nprint([k * i for i in range(3)])", "[0, 3, 6]"),
    "classes": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\nprint(P(2))", "P(x=2)"),
    "standard library": ("import decimal, datetime, itertools, json, re, sqlite3, statistics\nprint(7)", "7"),
    "main guard": ("if __name__ == '__main__':\n    print('main')", "main"),
    "main module": ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)", "True"),
    "sys.exit(0)": ("import sys\nprint('before')\nsys.exit(0)\nprint('after')", "before"),
    "exit()": ("print('before')\nexit()", "before"),
    "no newline": ("print('abc', end='')", "abc"),
    "unicode": ("print('é ☃ 漢')", "é ☃ 漢"),
    "argv": ("import sys\nprint(sys.argv)", "['program.py']"),
    "encodings": ("print('é'.encode('utf-16-le'), 'é'.encode('cp1252'))", r"b'\xe9\x00' b'\xe9'"),
    "temporary files": ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", "3"),
}


def test_equal_programs_at_the_same_time_run_once():
    sandbox, code = Sandbox(), "import os; print(os.urandom(8).hex())"

    async def ask(codes):
        return await asyncio.gather(*map(sandbox.run, codes))

    one, two, other = asyncio.run(ask([code, code, code + " "]))
    assert one == two != other
    assert asyncio.run(ask([code])) != [one]  # later it runs again


def test_honest_programs_work(sandbox):
    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(sandbox.run(code) for code, _ in HONEST.values()))

    results = asyncio.run(all_of_them())
    assert dict(zip(HONEST, results)) == {name: expected for name, (_, expected) in HONEST.items()}
    assert not any(isinstance(result, Failure) for result in results)


def test_a_program_runs_once_in_a_clean_module(sandbox):
    assert run(sandbox, "with open('n', 'a') as f: f.write('x')\nprint('once', open('n').read())") == "once x"
    assert "NameError" in run(sandbox, "print(sys.path)")
    assert "NameError" in run(sandbox, "print(source)")
    assert run(sandbox, "print('\ud800')") == "?"  # code that is not text is no fault of the machine


def test_failures_end_with_the_traceback(sandbox):
    result = run(sandbox, "print('partial')\ndef f(x):\n    return 1 / x\nf(0)")
    assert isinstance(result, Failure)
    assert result.startswith("partial\n") and result.endswith("ZeroDivisionError: division by zero")
    assert "return 1 / x" in result and len(result.splitlines()) <= 5
    failures = {
        "print(": "SyntaxError",
        "def f(): f()\nf()": "RecursionError",
        "raise SystemExit('bad')": "bad",
        "x = '\0'": "null bytes",
        "import os\nos.abort()": "the program died",
    }
    for code, error in failures.items():
        result = run(sandbox, code)
        assert isinstance(result, Failure) and error in result, code


def test_silence_is_reported(sandbox):
    for code in ("x = 1", "", "print()", "import sys; sys.exit(0)"):
        assert run(sandbox, code) == "(no output; use print)"


# --- the sandbox keeps its promises -----------------------------------------------------------------------------------


def test_busy_loop_is_killed_in_time(impatient, monkeypatch):
    marker, start = marked(impatient, monkeypatch), time.time()
    result = run(impatient, "print('so far')\nwhile True: pass")
    assert result == "so far\nError: timed out after 0.5 s" and isinstance(result, Failure)
    assert time.time() - start < 3 and gone(marker)


def test_stubborn_sleeper_is_killed(impatient, monkeypatch):
    """It is deaf to signals and has closed its output, so the end of the pipe says nothing."""
    marker = marked(impatient, monkeypatch)
    code = """import os, signal, time
for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)
os.close(1), os.close(2)
time.sleep(60)"""
    assert "timed out" in run(impatient, code) and gone(marker)


def test_no_other_processes_or_threads(sandbox):
    attempts = ["os.fork()", "subprocess.run(['/usr/bin/true'])", "threading.Thread(target=print).start()"]
    for attempt in attempts:
        code = f"import os, subprocess, threading\ntry:\n    {attempt}\nexcept (OSError, RuntimeError): print('denied')"
        assert run(sandbox, code) == "denied", attempt


def test_even_daemons_are_killed(isolated, monkeypatch):
    """The levels with a pid namespace kill double forks even without the limit on processes."""
    marker = marked(isolated, monkeypatch)
    monkeypatch.setattr(isolated, "timeout_s", 0.5)
    monkeypatch.setattr(isolated, "command", [word for word in isolated.command if "RLIMIT_NPROC" not in word])
    daemon = """import os, time
if os.fork():
    time.sleep({0})
    os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
print('daemon', flush=True)
time.sleep(60)"""
    assert run(isolated, daemon.format(60)) == "daemon\nError: timed out after 0.5 s" and gone(marker)
    assert run(isolated, daemon.format(0.2)) == "daemon" and gone(marker)  # the program ends by itself


def test_a_program_that_leaves_its_group_is_killed(isolated, monkeypatch):
    marker = marked(isolated, monkeypatch)
    monkeypatch.setattr(isolated, "timeout_s", 0.5)
    assert "timed out" in run(isolated, "import os, time\nos.setsid()\ntime.sleep(60)") and gone(marker)


def test_memory_is_limited(sandbox):
    small = Sandbox(level=sandbox.level, memory_mb=128)
    assert "MemoryError" in run(small, "x = bytearray(10**9)")
    assert "MemoryError" in run(small, "x = []\nwhile True: x.append(bytearray(10**6))")
    assert run(small, "print(len(bytearray(5 * 10**7)))") == "50000000"


def test_file_size_is_limited(sandbox):
    code = "f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))"
    assert "OSError" in run(sandbox, code)


def test_scratch_as_a_whole_is_limited():
    """Many small files would fill the memory of the machine too."""
    sandbox = sandbox_at("bubblewrap")
    if "--size" not in sandbox.command:
        pytest.skip("this bubblewrap is older than 0.7")
    code = "for i in range(40): open(str(i), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(sandbox, code)


def test_limits_cannot_be_raised(sandbox):
    code = """import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)
    except ValueError: print('denied', end=' ')
print(resource.getrlimit(resource.RLIMIT_CPU))"""
    assert run(sandbox, code) == "denied denied denied denied (6, 6)"


def test_cpu_limit_works_without_the_clock(sandbox):
    hurried, start = Sandbox(level=sandbox.level, timeout_s=0.5), time.time()
    hurried.timeout_s = 30
    result = run(hurried, "while True: pass")
    assert isinstance(result, Failure) and "timed out" not in result and time.time() - start < 10


def test_endless_output_is_cut(sandbox, monkeypatch):
    marker, start = marked(sandbox, monkeypatch), time.time()
    result = run(sandbox, "while True: print('spam' * 1000)")
    assert isinstance(result, Failure) and result.endswith("printed more than 1,048,576 bytes")
    assert "(cut at 2000 characters)" in result and len(result) < 2200 and time.time() - start < 4
    assert gone(marker)
    assert run(sandbox, "print('é' * 2000)") == "é" * 2000


def test_long_output_does_not_hide_what_went_wrong(impatient):
    fails = run(impatient, "print('x' * 3000)\nraise ValueError('boom')")
    assert isinstance(fails, Failure) and "(cut at 2000 characters)" in fails and fails.endswith("ValueError: boom")
    longer = run(impatient, "print('x' * 300_000)\nraise ValueError('boom')")
    assert isinstance(longer, Failure) and longer.endswith("ValueError: boom") and len(longer) < 2600
    hangs = run(impatient, "print('x' * 3000)\nwhile True: pass")
    assert isinstance(hangs, Failure) and "(cut at 2000 characters)" in hangs and "timed out" in hangs
    assert not isinstance(run(impatient, "print('x' * 3000)"), Failure)


def test_a_folder_too_deep_to_walk_is_removed(sandbox, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os\nfor i in range(1500):\n    os.mkdir('a')\n    os.chdir('a')\nprint('deep')"
    assert run(sandbox, code) == "deep" and not list(tmp_path.iterdir())


def test_scratch_is_empty_and_removed(sandbox, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os\nprint(os.listdir('.'))\nos.mkdir('d')\nopen('d/left behind', 'w').close()\nos.chmod('d', 0)"
    assert run(sandbox, code) == run(sandbox, code) == "[]"
    assert list(tmp_path.iterdir()) == []


def test_no_environment_of_others_in_proc(isolated, monkeypatch):
    marker = "sk-secret-elsewhere"
    as_nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    other = subprocess.Popen(["sleep", "30"], env={"KEY": marker}, **as_nobody)
    try:
        code = """import glob
for path in glob.glob('/proc/*/environ'):
    try: print(open(path).read())
    except OSError: pass
print('done')"""
        result = run(isolated, code)
        assert "done" in result and marker not in result
    finally:
        other.kill()
        other.wait()


def test_no_network(isolated):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.server_port}), 1)\nprint('connected')"
    try:
        assert run(sandbox_at("process"), code) == "connected"
        assert run(isolated, code).endswith(("Network is unreachable", "Connection refused"))
    finally:
        server.server_close()


def test_no_sight_of_files():
    sandbox = sandbox_at("bubblewrap")
    with tempfile.NamedTemporaryFile("w") as secret:
        secret.write("secret")
        secret.flush()
        os.chmod(secret.name, 0o644)
        paths = [secret.name, "/etc/passwd", __file__, str(Path.home() / ".bashrc"), "/proc/1/environ", "/sys", "/var"]
        seen = run(sandbox, f"import os\nprint(len({paths}), [path for path in {paths} if os.path.exists(path)])")
        assert seen == f"{len(paths)} []"
    top = set(run(sandbox, "import os\nprint(*os.listdir('/'))").split())
    assert top <= {"usr", "lib", "lib64", "etc", "dev", "tmp", Path(sys.base_prefix).parts[1]}


def test_no_writes_outside_scratch(sandbox):
    places = ["/", "/usr/lib", "/dev", sys.base_prefix, "/etc", "/root"]
    if sandbox.level != "bubblewrap" and os.access("/usr/lib", os.W_OK) and os.getuid() != 0:
        pytest.skip("this user may write to the system")
    code = f"""for place in {places}:
    try: open(place + '/left-by-sandbox', 'w'); print('wrote to', place)
    except OSError: pass"""
    assert run(sandbox, code) == "(no output; use print)"


def test_a_program_inherits_nothing(sandbox, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "secret" not in run(sandbox, "import os\nprint(dict(os.environ))")
    assert run(sandbox, "import sys\nprint(repr(sys.stdin.read()))") == "''"
    assert "EOFError" in run(sandbox, "input()")
    assert "ModuleNotFoundError" in run(sandbox, "import pytest")
    assert run(sandbox, "import os\nprint(os.getuid() != 0)") == "True"
    assert isinstance(run(sandbox, "import os\nos.setuid(0)"), Failure)


def test_killing_everything_harms_nobody(isolated):
    async def both():
        killer = "import os, signal, time\ntime.sleep(0.2)\nos.kill(-1, signal.SIGKILL)"
        return await asyncio.gather(isolated.run("import time\ntime.sleep(0.6)\nprint('alive')"), isolated.run(killer))

    assert asyncio.run(both())[0] == "alive"
    assert run(isolated, "print('next')") == "next"


def test_programs_run_at_once_and_the_loop_goes_on(sandbox):
    async def many() -> tuple[list[str], float, int]:
        ticks, start = 0, time.time()
        together = asyncio.gather(*(sandbox.run(f"import time\ntime.sleep(0.3)\nprint({i})") for i in range(2)))
        while not together.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return together.result(), time.time() - start, ticks

    measured = []
    for _ in range(3):  # a second event loop, too; and as other tests share the machine, the fastest counts
        results, seconds, ticks = asyncio.run(many())
        assert results == ["0", "1"] and ticks > 10
        measured.append(seconds)
    assert min(measured) < 2 * 0.3 or os.cpu_count() == 1


def test_cancelled_program_is_killed(sandbox, monkeypatch):
    marker = marked(sandbox, monkeypatch)

    async def cancel() -> None:
        task = asyncio.ensure_future(sandbox.run("while True: pass"))
        await asyncio.sleep(0.3)
        assert processes(marker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert gone(marker)


def test_program_dies_with_its_trainer():
    """A program that sleeps does not see its input end. The strongest level kills it all the same."""
    strongest = sandbox_at("bubblewrap")
    marker = f"RLIMIT_CORE={time.time_ns()}"
    script = f"""import asyncio, sys
sys.path.insert(0, {str(Path(module.__file__).parent)!r})
from sandbox import Sandbox
sandbox = Sandbox(level={strongest.level!r}, timeout_s=60)
sandbox.command.append({marker!r})
asyncio.run(sandbox.run("import time; time.sleep(60)"))"""
    trainer = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.time() + 5
        while not processes(marker) and time.time() < deadline:
            time.sleep(0.05)
        assert processes(marker)
        time.sleep(1)  # until it sleeps
    finally:
        trainer.kill()
        trainer.wait()
    assert gone(marker)


def test_process_1_of_a_container_keeps_no_dead_programs(sandbox):
    """It inherits what lives on after the first process of a program, and what was killed together with it."""
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user"]
    container = ["env", "unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc"]
    script = f"""import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path(module.__file__).parent)!r})
from sandbox import Sandbox
box = Sandbox(level={sandbox.level!r}, timeout_s=0.5)
box.command = ["sh", "-c", 'sleep 0.1 >/dev/null 2>&1 & exec "$0" "$@"', *box.command]
children = Path("/proc/1/task/1/children")
before = children.read_text()
programs = ["print(1)", "import time; time.sleep(9)", "import os, time; os.setsid(); time.sleep(9)"]
async def all_of_them():
    return await asyncio.gather(*(box.run(code) for code in 2 * programs))
print(asyncio.run(all_of_them()).count("1"), children.read_text() == before)"""
    process = subprocess.run([*container, sys.executable, "-c", script], capture_output=True, text=True)
    if "unshare: " in process.stderr:
        pytest.skip(f"this user may make no container: {process.stderr[-300:]}")
    assert process.stdout == "2 True\n", process.stderr


def test_a_start_removes_the_folders_of_killed_trainers_only(sandbox, monkeypatch, tmp_path):
    temporary, outside, marker = tmp_path / "tmp", tmp_path / "outside", f"RLIMIT_CORE={time.time_ns()}"
    temporary.mkdir()
    outside.mkdir()
    (outside / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    young, foreign, link = (temporary / f"{module.SCRATCH}{name}" for name in ("young", "foreign", "link"))
    young.mkdir()
    os.utime(young, times=(2 * time.time(),) * 2)  # it stays young
    foreign.mkdir()
    os.utime(foreign, times=(0, 0))
    if os.getuid() == 0:
        os.chown(foreign, 65534, 65534)
    link.symlink_to(outside)
    os.utime(link, times=(0, 0), follow_symlinks=False)
    others = {young, link} | ({foreign} if os.getuid() == 0 else set())

    script = f"""import asyncio, sys
sys.path.insert(0, {str(Path(module.__file__).parent)!r})
from sandbox import Sandbox
sandbox = Sandbox(level={sandbox.level!r}, timeout_s=60)
sandbox.command.append(sys.argv[1])
print("its trial is over", flush=True)
asyncio.run(sandbox.run("import time; time.sleep(60)"))"""
    trainers, folders = [], []
    try:
        for name in (f"{marker}1", f"{marker}2"):
            command, environment = [sys.executable, "-c", script, name], os.environ | {"TMPDIR": str(temporary)}
            trainers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
            trainers[-1].stdout.readline()
            deadline = time.time() + 20
            while len(processes(name)) < 2 and time.time() < deadline:  # the trainer and its program
                time.sleep(0.05)
            folders += set(temporary.iterdir()) - others - set(folders) - {foreign}
            os.utime(folders[-1], times=(0, 0))
        assert len(folders) == 2
        (folders[0] / "link").symlink_to(outside)
        (folders[0] / "deep" / "er").mkdir(parents=True)
        os.utime(folders[0], times=(0, 0))
        for trainer, left in zip(trainers, [{folders[1]}, set()]):
            trainer.kill()
            trainer.wait()
            Sandbox(level=sandbox.level)
            assert set(temporary.iterdir()) == others | left
        assert (outside / "file").exists()
    finally:
        for trainer in trainers:
            trainer.kill()
            trainer.wait()
            trainer.stdout.close()
        for process in processes(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


# --- faults of the machine are errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, error",
    [
        (["/no/such/bwrap"], OSError),
        (["/bin/false"], RuntimeError),
        (["/bin/echo", "no", "way"], RuntimeError),
        (["sleep", "9"], RuntimeError),
    ],
)
def test_a_broken_sandbox_raises(sandbox, monkeypatch, command, error):
    monkeypatch.setattr(sandbox, "command", command)
    monkeypatch.setattr(module, "START_TIMEOUT_S", 0.3)
    with pytest.raises(error):
        run(sandbox, "print(1)")


def test_no_scratch_space_raises(sandbox, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/directory")
    with pytest.raises(OSError):
        run(sandbox, "print(1)")


def test_levels(monkeypatch):
    auto = Sandbox()
    assert auto.level in Sandbox.LEVELS and auto.level in auto.describe() and "\n" not in auto.describe()
    advice = "bubblewrap closes this, if you can install it"
    assert advice in Sandbox(level="process").describe() and (advice in auto.describe()) == (auto.level != "bubblewrap")
    assert all("session keyring" in box.describe() for box in (auto, Sandbox(level="process")))
    with pytest.raises(ValueError, match="unknown sandbox level"):
        Sandbox(level="virtual machine")

    def without_bubblewrap(self, level, command=Sandbox._command):
        if level == "bubblewrap":
            raise FileNotFoundError("bwrap")
        return command(self, level)

    monkeypatch.setattr(Sandbox, "_command", without_bubblewrap)
    assert Sandbox().level in ("namespaces", "process")
    with pytest.raises(RuntimeError, match="no sandbox works.*bwrap"):
        Sandbox(level="bubblewrap")
    monkeypatch.setattr(Sandbox, "_command", lambda self, level: ["/bin/false"])
    with pytest.raises(RuntimeError, match="no sandbox works"):
        Sandbox()


# --- from a model's text to a program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("Sure! ```py\nprint(1)\n``` done", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("```Python\r\nprint(1)\r\n```", "print(1)"),
        ("print(1)\n", "print(1)"),
        ("```python\nprint(1)", "print(1)"),
        ("```python\nprint(1)\n```\nBetter:\n```python\nprint(2)\n```", "print(2)"),
        ("```python\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)"),
        ("```\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)"),
        ("1. Do:\n   ```python\n   if 1:\n       print(1)\n   ```", "if 1:\n    print(1)"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code
