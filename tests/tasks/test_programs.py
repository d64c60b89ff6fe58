"""Attacks on the sandbox, honest programs that it must not mistake for attacks, and completions.

The programs stand in programs.txt; each attack is one that a careless grader falls for. They are
judged several at a time, most in the strongest and in the weakest isolation that this system
grants: weaker ones are reached by taking the stronger ones out of the guard's start line, as a
system that refuses them would. After every test no process and no file may be left.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import verify
from tasks import files, programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs run on Linux and macOS only")
DATA = Path(__file__).parents[3] / "shared" / "data"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\nassert add(10, 20) == 30"
REFUSED = {"namespaces": "", "own user": "namespaces", "process only": "namespaces own_user"}


def read_programs() -> dict[str, dict[str, tuple[str, str]]]:
    """Return, by kind and name, (program, tests)."""
    text = Path(__file__).with_name("programs.txt").read_text()
    found = {}
    for kind, name, body in re.findall(r"^### (\w+): (.+)\n((?:(?!###).*\n)*)", text, re.M):
        found.setdefault(kind, {})[name] = body
    texts = found.pop("text")
    for cases in found.values():
        for name, body in cases.items():
            body = re.sub("^([A-Z]+)\n", lambda match: texts[match[1]], body, flags=re.M)
            source, _, tests = body.partition(">>>\n")
            cases[name] = source, tests or TESTS
    return found | texts


PROGRAMS = read_programs()
ADD = PROGRAMS["ADD"]


def children() -> set[int]:
    """The processes below this one, zombies too (Linux; elsewhere ps says the same)."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True).stdout
    below, rows = {os.getpid()}, [line.split(None, 2) for line in lines.splitlines()]
    for _ in rows:
        below |= {int(pid) for pid, parent, name in rows if int(parent) in below and name != "ps"}
    return below - {os.getpid()}


def adopt_orphans(yes: int):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, yes)  # PR_SET_CHILD_SUBREAPER


@pytest.fixture(autouse=True)
def temporary(monkeypatch):
    """Where files may stand; afterwards nothing may be left, there or running."""
    before, folder = children(), Path(tempfile.mkdtemp())
    folder.chmod(0o711)  # another user, too, may come to a directory of its own in it
    monkeypatch.setenv("TMPDIR", str(folder))
    adopt_orphans(1)  # or daemons would be lost out of sight
    yield folder
    for _ in range(50):  # of a guard that was killed some are still dying
        left = children() - before
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left:
            break
    adopt_orphans(0)
    assert not left
    folder.rmdir()


def refuse(monkeypatch, isolation: str):
    lines = "".join(f"sandbox.{name} = None; " for name in REFUSED[isolation].split())
    start = programs.START.replace("sandbox.guard(", lines + "sandbox.guard(")
    monkeypatch.setattr(programs, "START", start)


@pytest.fixture(params=["namespaces", "process only"])
def isolation(request, monkeypatch):
    refuse(monkeypatch, request.param)
    return request.param


def verdicts(cases: dict, timeout=10.0, at_once=4) -> dict:
    """Return the verdict on each (program, tests) or (program, tests, keywords), by name."""

    def judged(case):
        source, tests, task = (*case, {})[:3]
        return verify.program(textwrap.dedent(source), tests, timeout, **task)

    with ThreadPoolExecutor(at_once) as executor:
        return dict(zip(cases, executor.map(judged, cases.values()), strict=True))


def status(source, tests=TESTS, timeout=10.0):
    return verify.program(textwrap.dedent(source), tests, timeout).status


# --- honest programs ------------------------------------------------------------------------------


def test_honest_programs_pass(isolation):
    as_bytes = {"byte order mark": "\ufeff" + ADD, "carriage returns": ADD.replace("\n", "\r\n")}
    cases = PROGRAMS["right"] | {name: (source, TESTS) for name, source in as_bytes.items()}
    for name, verdict in verdicts(cases).items():
        assert verdict[:2] == (1, "right"), (name, verdict)
        assert isolation == "namespaces" or verdict.detail == isolation


VALUES = [
    "None", "True", "0", "-1", "2**63 - 1", "2**63", "-2**63", "-(10**5000)", "0.1 + 0.2", "5e-324",
    "float('inf')", "-float('inf')", "''", "'\\ud800\\0é'", "b'\\xff'", "bytearray(b'a')", "1j",
    "[]", "()", "set()", "frozenset({1, (2,)})", "{}", "{(1, 2): [{3}], None: {}, 2.5: ()}",
    "[[], [[1], (2, [3])]]", "['list', 1]", "['mine', 0]", "('yours', 0)", "{'int': 'ff'}", "int",
]  # fmt: skip


def test_every_plain_value_comes_back_as_it_went_and_as_its_exact_type():
    """Out as arguments, back as values, and made by the program itself."""
    same = "def same(a, b):\n    return type(a) is type(b) and repr(a) == repr(b)\n"
    source = "def echo(x): return x\ndef make(s): return eval(s)\n"
    tests = same + "assert str(echo(float('nan'))) == 'nan' and str(echo(-0.0)) == '-0.0'\n"
    for value in VALUES:
        if "5000" in value:  # repr of so many digits is refused
            tests += f"assert echo({value}) == {value} and make({value!r}) == {value}\n"
        else:
            tests += f"assert same(echo({value}), {value}), 1\n"
            tests += f"assert same(make({value!r}), {value}), 2\n"
    assert status(source, tests) == "right"


# --- attacks --------------------------------------------------------------------------------------


def test_attacks_earn_nothing(isolation):
    for name, verdict in verdicts(PROGRAMS["wrong"]).items():
        assert verdict[:2] == (0, "wrong"), (name, verdict)
        assert verdict.detail.isprintable() and len(verdict.detail) < 300
        assert {"value of 80 MB": "bytes", "5 million commas": "items"}.get(
            name, ""
        ) in verdict.detail


def test_tricks_on_the_tests_earn_nothing():
    for name, verdict in verdicts(PROGRAMS["trick"], timeout=2.5, at_once=6).items():
        assert verdict.reward == 0 and verdict.status in ("wrong", "timeout"), (name, verdict)


def test_programs_that_do_not_end_are_ended_with_all_that_they_started(isolation):
    def judged(case):
        start = time.monotonic()
        return verify.program(*case, 2.0), time.monotonic() - start

    with ThreadPoolExecutor(9) as executor:
        found = executor.map(judged, PROGRAMS["slow"].values())
        for name, (verdict, seconds) in zip(PROGRAMS["slow"], found, strict=True):
            assert verdict.reward == 0 and verdict.status in ("timeout", "wrong"), (name, verdict)
            assert seconds < 2.0 + 1.5, name


def test_fork_bombs_without_end_are_ended(isolation):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    if isolation == "process only" and os.getuid() == 0:
        bomb = "import os\nfor _ in range(8): os.fork()\nwhile True: pass"  # root has no bound
    assert status(bomb, timeout=1.0) == "timeout"


def test_a_program_finds_neither_the_tests_nor_a_secret_nor_the_callers_streams(monkeypatch):
    """In its memory, its environment, its arguments, its descriptors."""
    monkeypatch.setenv("SECRET", "s3cr3t-of-the-caller")
    source = """
        import gc, os, sys
        def look():
            seen = [str(v) for o in gc.get_objects() for t in gc.get_referents(o)
                    for v in (t.values() if type(t) is dict else [t]) if type(v) is str]
            seen += [*os.environ.values(), *sys.argv]
            streams = [os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in (0, 1, 2)]
            needle = "-".join(["needle", "in-the-tests"])
            secret = "-".join(["s3cr3t", "of-the-caller"])
            return sum(needle in s or secret in s for s in seen), len(os.environ), streams
    """
    assert status(source, "assert look() == (0, 3, [True] * 3), 'needle-in-the-tests'") == "right"


def test_namespaces_hide_files_processes_and_the_network(tmp_path):
    """Nothing outside may be written or reached, no right be won back, and no disk be filled."""
    if not verify.program(ADD, TESTS, 10.0).detail.endswith("namespaces"):
        pytest.skip("this system grants no namespaces")
    (tmp_path / "victim").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"""
            import ctypes, os, socket, time
            def attempt(f, *a):
                try: return f(*a) != -1
                except OSError: return False
            def big(): open("big", "wb").write(bytes(65 << 20))
            def change(path): return -1 if os.statvfs(path).f_flag & os.ST_RDONLY else 0
            def forks(): [os.fork() or time.sleep(9) for _ in range(100)]
            def outcomes():
                s = socket.socket()
                return [attempt(*x) for x in (
                    (s.connect, ("127.0.0.1", {server.getsockname()[1]})),
                    (os.unlink, {str(tmp_path / "victim")!r}), (os.listdir, {os.getcwd()!r}),
                    (change, "/usr"), (change, "/"), (open, "/etc/shadow"),
                    (os.kill, {os.getpid()}, 0), (open, "/proc/{os.getpid()}/environ"), (big,),
                    (os.setuid, 0), (os.chroot, "/tmp"), (os.mknod, "m", 0o60666, 0x801),
                    (ctypes.CDLL(None).unshare, 0x10000000), (forks,))]
        """
        assert status(source, f"assert outcomes() == {[False] * 14}") == "right"
    assert (tmp_path / "victim").read_text() == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's out-of-memory killer")
def test_a_program_is_the_first_to_go_when_memory_runs_out(monkeypatch):
    refuse(monkeypatch, "process only")
    source = "def f(): return open('/proc/self/oom_score_adj').read()"
    assert status(source, "assert f() == '1000\\n'") == "right"


@pytest.mark.parametrize("isolation", ["own user", "process only"], indirect=True)
@pytest.mark.parametrize("name", ["d", "d" * 200])
def test_directories_that_resist_are_removed_and_what_they_link_is_left(name, isolation, tmp_path):
    """Also below a path of 8000 characters, of which a system call accepts 4096."""
    (tmp_path / "victim").touch(0o400)
    source = f"""
        import os
        try: os.link({str(tmp_path / "victim")!r}, 'link')
        except OSError: pass
        for _ in range(40):
            os.mkdir('{name}')
            os.chdir('{name}')
        open('x', 'w').close()
        os.symlink('/', 'root')
        os.chmod('..', 0o500)
        os.chmod('.', 0)
    """
    assert status(textwrap.dedent(source) + ADD) == "right"
    assert (tmp_path / "victim").stat().st_mode & 0o777 == 0o400


# --- what is not the program's fault --------------------------------------------------------------


def test_what_is_not_python_is_unparsed():
    texts = ["def f()\n return 1", "x = 1\0", "x = '\ud800'", "```\n```", "-" * 10**5 + "1"]
    for text, verdict in verdicts({x: (x, TESTS) for x in [*texts, "#" * 10**7]}).items():
        assert verdict[:2] == (0, "unparsed"), (text[:9], verdict)


def test_tests_that_ask_nothing_or_cannot_run_are_our_error():
    cases = [
        (ADD, "assert add(2, 3 =="),
        (ADD, "import numpy_that_nobody_has\nassert add(2, 3) == 5"),
        (ADD, "assert 1 == 1"),
        (ADD, "", {"entry_point": "add"}),
        (ADD, "def check(candidate):\n    assert candidate(2, 3) == 5"),
        (ADD, TESTS, {"prompt": "def add(a, b)"}),
        (ADD, "def test():\n    assert add(2, 3) == 0"),
        ("x = 5", "def test():\n    assert x == 5\ntest()"),
    ]
    for i, verdict in verdicts(dict(enumerate(cases))).items():
        assert verdict[:2] == (None, "error"), (cases[i], verdict)


def test_a_guard_that_is_killed_or_cannot_start_is_our_error(monkeypatch):
    before = children()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(verify.program, "while True: pass", TESTS, 5.0)
        time.sleep(0.5)
        os.kill(min(children() - before), signal.SIGKILL)  # the guard, which came first
        assert future.result()[:2] == (None, "error")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert verify.program(ADD, TESTS)[:2] == (None, "error")


def test_a_start_that_is_too_slow_is_our_error_and_not_a_wrong_program():
    assert verify.program(ADD, TESTS, 0.001)[:2] == (None, "error")


def test_what_a_caller_gets_wrong_is_said(monkeypatch):
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout"):
            verify.program(ADD, TESTS, timeout)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Linux and macOS"):
        patch.setattr(os, "name", "nt")
        verify.program(ADD, TESTS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_each_refusal_falls_back_by_one_and_is_named(monkeypatch):
    found = {}
    for isolation in REFUSED:
        with monkeypatch.context() as patch:
            refuse(patch, isolation)
            found[isolation] = verify.program(ADD, TESTS, 10.0)
    assert all(verdict.reward == 1 for verdict in found.values())
    assert found["process only"].detail == "process only"
    assert found["own user"].detail in ("own user", "process only")  # if python is root's alone


def test_what_cannot_be_cleared_away_is_no_error_of_ours(monkeypatch):
    monkeypatch.setattr(programs, "GRACE", -2.5)  # the caller loses its patience after 0.5 s
    slow = "import time\ntime.sleep(1)\n" + ADD
    assert verify.program(slow, TESTS, 3.0)[:2] == (0, "timeout")


def test_files_that_cannot_be_removed_are_named(monkeypatch, temporary):
    refuse(monkeypatch, "process only")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")  # where the guard looks for rm
        verdict = verify.program(ADD, TESTS, 10.0)
    (left,) = temporary.iterdir()
    shutil.rmtree(left)
    assert verdict == (1, "right", f"process only; files are left in {left}")


# --- the caller -----------------------------------------------------------------------------------


def test_many_threads_verify_at_once_and_leave_no_thread_and_no_descriptor():
    jobs = {"right": ADD, "wrong": "import os\nos.fork()\n1 / 0", "unparsed": "("}
    cases = {(due, i): (source, TESTS) for i in range(8) for due, source in jobs.items()}
    status(ADD)
    descriptors, threads = len(os.listdir("/dev/fd")), threading.active_count()
    found = verdicts(cases, timeout=20.0, at_once=8)
    assert [due for due, _ in cases] == [verdict.status for verdict in found.values()]
    assert len(os.listdir("/dev/fd")) == descriptors and threading.active_count() == threads


def test_the_caller_is_not_forked():
    """A fork copies a large process's page tables, 0.1 s a GB here, and locks of its threads."""
    forks = []
    os.register_at_fork(before=lambda: forks.append(1))
    assert status(ADD) == "right" and not forks


# --- completions, and the data sets ---------------------------------------------------------------


def rewards(problems, answers) -> list:
    """Return the rewards of answers to problems, whose verifiers are patient here."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as executor:
        patch.setattr(verify, "program", partial(verify.program, timeout=20.0))
        return [v.reward for v in executor.map(verify.judge, problems, answers, [False] * 999)]


def test_the_last_fenced_block_is_the_program():
    block = f"```python\n{ADD}```"
    two = f"```\ndef add(a, b): return 0\n```\nNo:\n{block}\n"
    adds = {
        two: 1,
        f"Sure.\n{two[:28]}": 0,  # a block that has no end
        f"```text\nplan\n```\nThen:\n{block}": 1,
        f"```bash\nls\n```\n{block.replace('p', 'P')}\nas in\n```\nadd(1, 1)\n```": 1,
        block.replace("python", "python3").replace("\n", "\r\n"): 1,
        "1. So:\n" + textwrap.indent(block.replace("python", "py"), "   "): 1,
        f"~~~python\ntext = '''\n```\n'''\n{ADD}~~~": 1,
        f"```\n{ADD}```\n```text\nDone.\n```": 1,
        f"```python\nx\n```\n```py\nx\n```\n{block}": 1,
    }
    roots = {
        "    return math.sqrt(x)": 1,
        "def f(x):\n    return math.sqrt(x)": 1,
        "```python\ndef f(x):\n    return math.sqrt(x)\n```": 1,
        "```python\ndef f(x):\n    return x\n```": 0,
    }
    head = dict(entry_point="f", prompt="import math\ndef f(x):\n    'The root.'\n")
    check = "def check(candidate):\n    assert candidate(4) == 2"
    add = verify.Problem("Add.", TESTS, programs.attempt)
    root = verify.Problem(head["prompt"], check, partial(programs.attempt, **head))
    for problem, answers in ((add, adds), (root, roots)):
        assert rewards([problem] * len(answers), answers) == list(answers.values())


def test_the_prompts_helpers_are_the_tests_own_and_its_stub_is_nobodys():
    task = dict(entry_point="f", prompt="def g(x): return x\ndef f(x):\n    '''Do it.'''\n")
    cases = {  # by the reward
        0: (
            "def g(x): return 5\ndef f(x): return 5",
            "def check(c):\n    assert c(3) == g(3)",
            task,
        ),
        1: (
            "def g(x): return 5\ndef f(x): return 3",
            "def check(c):\n    assert c(3) == g(3)",
            task,
        ),
        "stub": ("x = 1", "def check(c):\n    assert c(1) is None", task),
    }
    found = [verdict.reward for verdict in verdicts(cases).values()]
    assert found == [0, 1, 0]


def published(name: str):
    """Return the problems of a data set, and their worked answers in prose."""
    if not (DATA / name).exists():
        pytest.skip(f"no {DATA / name}")
    problems, solutions = zip(*files.read(DATA / name), strict=True)
    return problems, [f"Here it is.\n\n{x}\n\nDone." for x in solutions]


def test_humaneval_solutions_pass_and_functions_without_a_body_fail():
    problems, answers = published("humaneval/HumanEval.jsonl.gz")
    helped = {32, 38, 50}  # their tests call a helper that the prompt defines
    some = [i for i in range(164) if i % 16 == 0 or i in helped]
    problems, answers = [problems[i] for i in some], [answers[i] for i in some]
    assert rewards(problems, answers) == [1] * len(some)
    assert rewards(problems, ["    return None\n"] * len(some)) == [0] * len(some)


def test_mbpp_solutions_pass():
    problems, answers = published("mbpp/mbpp.jsonl")
    odd = {126, 367, 533, 596, 601, 927}  # trees, a type as argument, a function named sum
    some = [i for i in range(974) if i % 48 == 0 or i + 1 in odd]
    found = rewards([problems[i] for i in some], [answers[i] for i in some])
    assert [i for i, reward in zip(some, found, strict=True) if reward != 1] == []
