"""Attacks on the sandbox, and honest programs that it must not mistake for attacks.

Each attack is written with the verdict that a careless grader would give it, and most are run in
every isolation that this system grants. The weaker ones are reached by taking the stronger ones
out of the guard's start line, as a system that refuses them would.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import algebra
import sandbox
import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs run on Linux and macOS only")
DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\nassert add(10, 20) == 30"
REFUSED = {"namespaces": "", "own user": "namespaces", "process only": "namespaces own_user"}


@pytest.fixture(scope="module", autouse=True)
def no_other_process():
    algebra.worker(os.getpid()).close()  # sympy's, of other tests: it would count as left behind


def refuse(monkeypatch, names: str):
    lines = "".join(f"sandbox.{name} = None; " for name in names.split())
    monkeypatch.setattr(
        sandbox, "START", sandbox.START.replace("sandbox.guard", lines + "sandbox.guard")
    )


@pytest.fixture(params=["best", "process only"])
def isolation(request, monkeypatch):
    if request.param == "process only":
        refuse(monkeypatch, REFUSED["process only"])
    return request.param


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def status(source, tests=TESTS, timeout=3.0, **task):
    return verify.program(textwrap.dedent(source), tests, timeout, **task).status


def children() -> set[int]:
    """The processes below this one, zombies too (Linux; elsewhere ps says the same)."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True).stdout
    below, rows = {os.getpid()}, [line.split(None, 2) for line in lines.splitlines()]
    for _ in rows:
        below |= {int(pid) for pid, parent, name in rows if int(parent) in below and name != "ps"}
    return below - {os.getpid()}


# --- programs that must pass ----------------------------------------------------------------------

HONEST = {
    "plain": (ADD, TESTS),
    "byte order mark": ("\ufeff" + ADD, TESTS),
    "carriage returns": (ADD.replace("\n", "\r\n"), TESTS),
    "main guard": (ADD + "if __name__ == '__main__':\n    raise SystemExit(input())", TESTS),
    "200 kB printed": ("print('x' * 200_000)\n" + ADD, TESTS),
    "dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x",
        "assert f(3) == 3",
    ),
    "module of the program": (
        "import sys\ndef f(x): return sys.getsizeof(x)",
        "assert f(1) == sys.getsizeof(1)",
    ),
    "a builtin's name": ("def sum(a, b): return a * b", "assert sum(10, 15) == 150"),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(9999)\ndef f(n): return n and 1 + f(n - 1)",
        "assert f(5000) == 5000",
    ),
    "scratch file": (
        "def f(s):\n    open('x', 'w').write(s)\n    return open('x').read()",
        "assert f('é') == 'é'",
    ),
    "temporary file": (
        (
            "import tempfile\ndef f():\n    with tempfile.TemporaryFile() as t:\n"
            "        return t.write(b'12')"
        ),
        "assert f() == 2",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor as T\n"
        "def f(x):\n    with T(8) as t:\n        return sum(t.map(abs, x))",
        "assert f([-1, 2]) == 3",
    ),
    "tree, attributes set by the test": (
        "class Node:\n    def __init__(self, d):\n        self.d, self.left = d, None\n"
        "def depth(n): return 1 + depth(n.left) if n else 0",
        (
            "r = Node(1)\nr.left = Node(2)\n"
            "assert depth(r) == 2 and r.left.d == 2 and r.left is r.left"
        ),
    ),
    "generator": (
        "def f(n):\n    i = 0\n    while True:\n        yield i * n\n        i += 1",
        "import itertools\nassert list(itertools.islice(f(3), 4)) == [0, 3, 6, 9]",
    ),
    "raises as asked": (
        "def f(x): raise ValueError('no ' + x)",
        (
            "try:\n    f('luck')\nexcept ValueError as e:\n"
            "    assert str(e) == 'no luck'\nelse:\n    assert 0"
        ),
    ),
    "function that asks back": (
        "def f(g, xs): return sorted(xs, key=g)",
        "assert f(lambda x: f(lambda y: y, [x])[0] * -1, [1, 3, 2]) == [3, 2, 1]",
    ),
    "type as argument": ("def f(t): return isinstance(3, t), type(t)", "assert f(int)[0]"),
    "in place": (
        "def f(x, d):\n    x.sort()\n    d['k'] = 1",
        "x, d = [2, 1], {}\nf(x, d)\nassert (x, d) == ([1, 2], {'k': 1})",
    ),
    "in place, candidate": (
        "def f(x): x.reverse()",
        "def check(candidate):\n    x = [1, 2]\n    candidate(x)\n    assert x == [2, 1]\ncheck(f)",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(name, isolation):
    verdict = verify.program(*HONEST[name], 10.0)
    assert verdict.reward == 1, verdict
    assert isolation == "best" or verdict.detail == "process only"


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
    assert verify.program(source, tests, 10.0).reward == 1


def test_an_honest_subclass_comes_back_as_its_base():
    source = """
        import collections, decimal, enum, fractions
        def f(): return collections.Counter("aab"), enum.IntEnum("E", "A B")(2), Point(1, 2), S("x")
        def g(): return fractions.Fraction(1, 3), decimal.Decimal("0.50")
        class S(str): pass
        Point = collections.namedtuple("Point", "x y")
    """
    tests = (
        "import fractions, decimal\n"
        "assert [type(x) for x in f()] == [dict, int, tuple, str]\n"
        "assert f() == ({'a': 2, 'b': 1}, 2, (1, 2), 'x')\n"
        "assert g() == (fractions.Fraction(1, 3), decimal.Decimal('0.5'))"
    )
    assert status(source, tests) == "right"


# --- programs that must not pass ------------------------------------------------------------------

EQUAL = """
    class A:
        def __eq__(self, other): return True
        __ne__ = lambda self, other: False
        __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
        __hash__ = lambda self: 5
        __class__ = property(lambda self: int)
        __getattr__ = __call__ = __getitem__ = lambda self, *a: self
        __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = lambda self, *a: self
        __bool__ = lambda self: True
        __len__ = lambda self: 0
        __iter__ = lambda self: iter(())
        __reduce_ex__ = __index__ = __float__ = lambda self, *a: 5
"""
FRAME = """
    import json, os
    def frame(message):
        body = json.dumps(message).encode()
        return len(body).to_bytes(4, "big") + body
    def write(data):
        for fd in range(3, 64):
            try: os.write(fd, data)
            except OSError: pass
"""
EVIL = {
    "exit": "raise SystemExit(0)",
    "exit in the call": "def add(a, b): raise SystemExit(0)",
    "_exit": "import os\nos._exit(0)",
    "_exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "exit by a thread": (
        "import os, threading, time\nthreading.Timer(.1, os._exit, (0,)).start()\n"
        "def add(a, b): time.sleep(1)"
    ),
    "abort": "import os\ndef add(a, b): os.abort()",
    "kills its group": "import os\nos.kill(0, 9)\n" + WRONG,
    "own BaseException": "class X(BaseException): pass\ndef add(a, b): raise X",
    "AssertionError, StopIteration": "def add(a, b): raise StopIteration",
    "ImportError, as if ours": "def add(a, b): raise ModuleNotFoundError('numpy')",
    "import that fails": "import numpy_that_nobody_has\n" + ADD,
    "error that cannot be told": (
        "class E(Exception):\n    def __str__(self): raise self\ndef add(a, b): raise E"
    ),
    "equals everything": EQUAL + "    def add(a, b): return A()",
    "list of such": EQUAL + "    def add(a, b): return [A()]",
    "lying int": (
        "class I(int):\n    __eq__ = lambda *a: True\n    __hash__ = int.__hash__\n"
        "def add(a, b): return I(a)"
    ),
    "lying str": (
        "class S(str):\n    __eq__ = lambda *a: True\n    __hash__ = str.__hash__\n"
        "def add(a, b): return S()"
    ),
    "wrong on one test": "def add(a, b): return a + b if a < 9 else 31",
    "shadowed check": "def check(*a): pass\ndef isinstance(*a): return True\n" + WRONG,
    "patched builtins": (
        "import builtins\nfor n in ('abs', 'isinstance', 'all', 'len', 'type'):\n"
        "    setattr(builtins, n, lambda *a: True)\n"
    )
    + WRONG,
    "no such name": "def plus(a, b): return a + b",
    "not a function": "add = 5",
    "frames": (
        "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
        "        for v in (f.f_globals, f.f_locals):\n"
        "            for x in list(v.values()):\n"
        "                if type(x) is str and 'assert' in x: return 5\n"
        "        f = f.f_back\n"
    ),
    "closed descriptors": "import os\nos.closerange(0, 256)\n" + WRONG,
    "garbage on all descriptors": FRAME + "    write(b'passed\\n1true' * 99)",
    "replies ahead of time": FRAME
    + ("    for i in range(9): write(frame([str(i), None, 5]))\n    def add(a, b): return 6"),
    "reply without a nonce": FRAME
    + ("    def add(a, b):\n        write(frame([None, None, a + b]))\n        return 6"),
    "reply that is no message": FRAME + "    def add(a, b): write(frame(7))",
    "reply of five, forever": FRAME
    + (
        "    def add(a, b):\n"
        "        write(frame(['n', 0, 'getattr', ['tuple', '__globals__'], ['dict']]))\n"
        "        return 6"
    ),
    "reply that is not JSON": FRAME + "    def add(a, b): write(b'\\0\\0\\0\\4[[[[')",
    "reply of unknown type": FRAME + "    def add(a, b): write(frame(['n', None, ['eval', '5']]))",
    "reply with a deep value": FRAME
    + "    def add(a, b): write((10**6).to_bytes(4, 'big') + b'[' * 10**6)",
    "reply of 4 GB": FRAME + "    def add(a, b): write(b'\\xff\\xff\\xff\\xff')",
    "deep value": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "cyclic value": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "value of 80 MB": "def add(a, b): return 'x' * 80_000_000",
    "5 million commas": "def add(a, b): return ',' * 5_000_000",
    "memory": "def add(a, b): return len(bytearray(3 << 30))",
    "raised limits": (
        "import resource\nfor r in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):\n"
        "    resource.setrlimit(r, (-1, -1))\n"
    )
    + ADD,
    "recursion": "def add(a, b): return add(a, b)",
    "empty": "",
}
SLOW = {
    "endless import": "while True: pass",
    "endless call": (
        "def add(a, b):\n    while True:\n        try:\n"
        "            while True: pass\n        except BaseException: pass"
    ),
    "sleep": "import time\ndef add(a, b): time.sleep(10**6)",
    "lock": (
        "import threading\ndef add(a, b): threading.Lock().acquire() and threading.Event().wait()"
    ),
    "backtracking": "import re\ndef add(a, b): re.match('(a+)+$', 'a' * 60 + 'b')",
    "trickled reply": FRAME
    + (
        "    import time\n    def add(a, b):\n        for x in b'\\0\\1\\0\\0' + b' ' * 9999:\n"
        "            write(bytes([x]))\n            time.sleep(.001)"
    ),
    "child keeps the channel": (
        "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\ntime.sleep(60)"
    ),
    "stopped": (
        "import os\nif os.fork() == 0: os.kill(os.getpid(), 19)\nimport time\ntime.sleep(60)"
    ),
    "processes": "import os, time\nfor _ in range(5): os.fork()\ntime.sleep(60)",
    "daemons": (
        "import os, time\nfor _ in range(9):\n    if os.fork() == 0:\n"
        "        os.setsid()\n        if os.fork(): os._exit(0)\n"
        "        time.sleep(60)\ntime.sleep(60)"
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_attack_earns_nothing_and_leaves_nothing(name, isolation, temporary):
    verdict = verify.program(textwrap.dedent(EVIL[name]), TESTS, 5.0)
    assert (verdict.reward, verdict.status) == (0, "wrong"), verdict
    assert verdict.detail.isprintable() and len(verdict.detail) < 300
    assert not list(temporary.iterdir()) and not children()


@pytest.mark.parametrize("name", SLOW)
def test_a_program_that_does_not_end_is_ended_with_all_it_started(name, isolation, temporary):
    start = time.monotonic()
    verdict = verify.program(textwrap.dedent(SLOW[name]), TESTS, 0.7)
    assert verdict.reward == 0 and verdict.status in ("timeout", "wrong"), verdict
    assert time.monotonic() - start < 0.7 + 1.5
    assert not list(temporary.iterdir()) and not children()


def test_fork_bombs_without_end_are_ended(isolation):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    if isolation == "process only" and os.getuid() == 0:
        bomb = "import os\nfor _ in range(8): os.fork()\nwhile True: pass"  # root has no bound
    assert status(bomb, timeout=0.7) == "timeout"
    assert not children()


ARGUMENT = "def f(xs):\n    xs.clear()\n    return []"
TRICKS = {
    "argument emptied": (ARGUMENT, "xs = [2, 1]\nassert f(xs) == sorted(xs)"),
    "argument emptied, later": (ARGUMENT, "xs = [2, 1]\nys = f(xs)\nassert ys == sorted(xs)"),
    "isclose patched": (
        "import math\nmath.isclose = lambda *a: True\ndef f(x): return 9.0",
        "assert math.isclose(f(3.0), 1.5)",
    ),
    "abs shadowed": ("def abs(x): return 0\ndef f(x): return 9", "assert abs(f(1) - 2) < 1e-9"),
    "contains everything": (EQUAL + "    def f(): return A()", "assert 3 in f()"),
    "all are equal": (
        EQUAL + "    def f(): return A()",
        "r = f()\nassert all(x == r for x in (1, 2))",
    ),
    "hash and eq in a set": (EQUAL + "    def f(): return A()", "assert f() in {5}"),
    "caught by a bare except": ("import os\ndef f(): os._exit(0)", "try: f()\nexcept: pass"),
    "endless iterator": (
        "import itertools\ndef f(): return itertools.count()",
        "assert list(f()) == [0, 1]",
    ),
    "prompt's stub": ("x = 1", "def check(c):\n    assert c(1) is None"),
    "digits that are slow": (
        "def f(): return 10**10**7 * 0 + (1 << 30_000_000)",
        "import sys\nsys.set_int_max_str_digits(0)\nassert str(f()) == '1'",
    ),
    "hash bomb": ("def f(): return {i * (2**61 - 1) for i in range(10**5)}", "assert f() == 1"),
    "error in the message": (
        "class A:\n    def __str__(self): raise KeyError\ndef f(): return A()",
        "assert f() == 1, f()",
    ),
    "builtin instead of a value": ("def f(): return eval", "assert f()('1 + 1') == 3"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_on_the_tests_earns_nothing(name):
    source, tests = TRICKS[name]
    task = dict(entry_point="f", prompt="def f(x):\n    '''Do it.'''\n") if "stub" in name else {}
    verdict = verify.program(textwrap.dedent(source), tests, 1.5, **task)
    assert verdict.reward == 0 and verdict.status in ("wrong", "timeout"), verdict
    assert not children()


@pytest.mark.parametrize("name", ["d", "d" * 200])
def test_directories_that_resist_are_removed(name, isolation, temporary):
    """Also below a path of 8000 characters, of which a system call accepts 4096."""
    source = f"import os\nfor _ in range(40):\n    os.mkdir('{name}')\n    os.chdir('{name}')\n"
    source += "open('x', 'w').close()\nos.symlink('/', 'root')\n"
    source += "os.chmod('..', 0o500)\nos.chmod('.', 0)\n"
    assert verify.program(source + ADD, TESTS, 5.0).reward == 1
    assert not list(temporary.iterdir())


def test_a_program_finds_neither_the_tests_nor_a_secret_nor_its_parents(monkeypatch):
    """In its memory, its environment, its arguments, its descriptors."""
    monkeypatch.setenv("SECRET", "s3cr3t-of-the-caller")
    source = """
        import gc, os, sys
        def look():
            seen = [str(v) for o in gc.get_objects() for t in gc.get_referents(o)
                    for v in (t.values() if type(t) is dict else [t]) if type(v) is str]
            seen += [*os.environ.values(), *sys.argv]
            for fd in (0, 1, 2):
                seen += [os.path.realpath(f"/proc/self/fd/{fd}")]
            needle = "-".join(["needle", "in-the-tests"])
            secret = "-".join(["s3cr3t", "of-the-caller"])
            return sum(needle in s or secret in s for s in seen), len(os.environ)
    """
    assert status(source, "assert look() == (0, 3)\nassert 'needle-in-the-tests'") == "right"


def test_namespaces_hide_files_processes_and_the_network(temporary):
    """Nothing outside may be written or reached, and the disk is not what a tmpfs fills."""
    if not verify.program(ADD, TESTS).detail.endswith("namespaces"):
        pytest.skip("this system grants no namespaces")
    (temporary / "victim").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"""
            import os, socket
            def attempt(f, *a):
                try: f(*a)
                except OSError: return False
                return True
            def big(): open("big", "wb").write(bytes(65 << 20))
            def outcomes():
                s = socket.socket()
                return [attempt(*x) for x in (
                    (s.connect, ("127.0.0.1", {server.getsockname()[1]})),
                    (os.unlink, {str(temporary / "victim")!r}), (os.listdir, {str(DATA.parent)!r}),
                    (open, "/usr/probe", "w"), (open, "/probe", "w"), (open, "/etc/shadow"),
                    (os.kill, {os.getpid()}, 0), (open, "/proc/{os.getpid()}/environ"), (big,),
                    (os.setuid, 0), (os.chroot, "/tmp"), (os.mknod, "m", 0o60666, 0x801))]
        """
        assert status(source, f"assert outcomes() == {[False] * 12}") == "right"
    assert (temporary / "victim").read_text() == "kept"


# --- what is not the program's fault --------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["def f()\n return 1", "x = 1\0", "x = '\ud800'", "```\n```", "-" * 10**5 + "1", "#" * 10**7],
)
def test_what_is_not_python_is_unparsed(source):
    assert verify.program(source, TESTS).status in ("unparsed",)


@pytest.mark.parametrize(
    ("tests", "task"),
    [
        ("assert add(2, 3 ==", {}),
        ("import numpy_that_nobody_has\nassert add(2, 3) == 5", {}),
        ("assert 1 == 1", {}),
        ("", {"entry_point": "add"}),
        ("def check(candidate):\n    assert candidate(2, 3) == 5", {}),
        ("def test():\n    assert add(2, 3) == 0", {}),
        (TESTS, {"prompt": "def add(a, b)"}),
    ],
)
def test_tests_that_test_nothing_or_cannot_run_are_our_error(tests, task):
    verdict = verify.program(ADD, tests, **task)
    assert (verdict.reward, verdict.status) == (None, "error"), verdict


def test_a_guard_that_is_killed_or_cannot_start_is_our_error(monkeypatch):
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(verify.program, "while True: pass", TESTS, 5.0)
        time.sleep(0.5)
        line = ["ps", "-o", "pid=", "--ppid", str(os.getpid())]
        for pid in subprocess.run(line, capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)  # the guard, or ps, which has ended
        assert future.result()[:2] == (None, "error")
    assert not children()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert verify.program(ADD, TESTS)[:2] == (None, "error")


def test_a_start_that_is_too_slow_is_our_error_and_not_a_wrong_program():
    assert verify.program(ADD, TESTS, 0.001)[:2] == (None, "error")


def test_what_a_caller_gets_wrong_is_said(monkeypatch):
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout"):
            verify.program(ADD, TESTS, timeout)
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(OSError, match="Linux and macOS"):
        verify.program(ADD, TESTS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_each_refusal_falls_back_by_one_and_is_named(monkeypatch, temporary):
    found = {name: None for name in REFUSED}
    for name, refused in REFUSED.items():
        with monkeypatch.context() as patch:
            refuse(patch, refused)
            found[name] = verify.program(ADD, TESTS)
    assert all(verdict.reward == 1 for verdict in found.values())
    assert found["process only"].detail == "process only"
    assert found["own user"].detail in ("own user", "process only")  # if python is root's alone


# --- the caller -----------------------------------------------------------------------------------


def test_many_threads_verify_at_once_and_leave_no_process_and_no_descriptor(temporary):
    verify.program(ADD, TESTS)
    jobs = [
        (ADD, "right"),
        (WRONG, "wrong"),
        ("import os\nos.fork()\n1 / 0", "wrong"),
        ("(", "unparsed"),
    ]
    descriptors, threads = len(os.listdir("/dev/fd")), threading.active_count()
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda job: status(job[0], timeout=20.0), jobs * 8))
    assert found == [expected for _, expected in jobs] * 8
    assert len(os.listdir("/dev/fd")) == descriptors and threading.active_count() == threads
    assert not list(temporary.iterdir()) and not children()


def test_a_large_caller_is_not_slower():
    def seconds():
        start = time.perf_counter()
        assert verify.program(ADD, TESTS).reward == 1
        return time.perf_counter() - start

    small = min(seconds() for _ in range(5))
    heap = bytearray(os.urandom(1 << 20) * 1024)  # a fork of this would copy its page tables
    assert min(seconds() for _ in range(5)) < small + 0.1
    del heap


# --- data sets ------------------------------------------------------------------------------------


def rows_of(*parts):
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}")
    return [row for _, row in verify.rows_of(path)]


def verdicts(rows):
    """Two at a time: the verdicts on (source, tests, keywords)."""
    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(lambda row: verify.program(row[0], row[1], 10.0, **row[2]), rows))


def test_humaneval_solutions_pass_and_solutions_without_a_body_fail():
    tasks = rows_of("humaneval", "HumanEval.jsonl.gz")
    keys = [{"entry_point": task["entry_point"], "prompt": task["prompt"]} for task in tasks]
    right = [
        (t["prompt"] + t["canonical_solution"], t["test"], k)
        for t, k in zip(tasks, keys, strict=True)
    ]
    wrong = [
        (t["prompt"] + "    return None\n", t["test"], k) for t, k in zip(tasks, keys, strict=True)
    ]
    helped = {32, 38, 50}  # their tests call a helper that the prompt defines
    some = [i for i in range(164) if i % 4 == 0 or i in helped]
    assert [v.reward for v in verdicts([right[i] for i in some])] == [1] * len(some)
    assert [v.reward for v in verdicts([wrong[i] for i in some])] == [0] * len(some)


def test_mbpp_solutions_pass():
    tasks = rows_of("mbpp", "mbpp.jsonl")
    odd = {126, 367, 533, 596, 601, 927}  # trees, a type as argument, a function named sum
    tasks = [task for task in tasks if task["task_id"] % 12 == 0 or task["task_id"] in odd]
    rows = [(t["code"], "\n".join([t["test_setup_code"], *t["test_list"]]), {}) for t in tasks]
    failed = [t["task_id"] for t, v in zip(tasks, verdicts(rows), strict=True) if v.reward != 1]
    assert failed == []


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not here")
def test_worked_answers_of_files_earn_1_in_the_form_that_is_imitated():
    """And HumanEval's answers are programs of their own, or the prompt's completion, fenced or not
    where that makes no difference."""
    for path, every in (("humaneval/HumanEval.jsonl.gz", 20), ("mbpp/mbpp.jsonl", 80)):
        problems = verify.load(DATA / path)[::every]
        answers = [f"Here it is.\n\n{p.solution}\n\nDone." for p in problems]
        assert [verify.judge(p, a).reward for p, a in zip(problems, answers, strict=True)] == [
            1
        ] * len(problems)
    gsm8k = verify.load(DATA / "gsm8k/train.jsonl")[:300]
    assert all("<<" not in p.solution and "####" not in p.solution for p in gsm8k)
    assert all(verify.judge(p, p.solution).reward == 1 for p in gsm8k)


def test_the_last_fenced_block_is_the_program():
    two = "```\ndef add(a, b): return 0\n```\nNo:\n```python\ndef add(a, b): return a + b\n```\n"
    problem = verify.Problem("Add.", "assert add(2, 3) == 5", "program")
    assert verify.judge(problem, two).reward == 1
    assert verify.judge(problem, "Sure.\n" + two[:28]).reward == 0  # a block that has no end
    right = "def add(a, b):\n    return a + b\n"
    for text in (
        f"```text\nplan\n```\nThen:\n```python\n{right}```",
        f"```bash\nls\n```\n```Python\n{right}```\nas in\n```\nadd(1, 1)\n```",
        f"```python3\n{right}```".replace("\n", "\r\n"),
        "1. So:\n" + "".join(f"   {line}\n" for line in f"```py\n{right}```".split("\n")),
        f"~~~python\ntext = '''\n```\n'''\n{right}~~~",
        f"```\n{right}```\n```text\nDone.\n```",
        f"```python\nx\n```\n```py\nx\n```\n```python\n{right}```",
    ):
        assert verify.judge(problem, text).reward == 1, text
    head = verify.Problem(
        "import math\ndef f(x):\n    'The root.'\n",
        "def check(candidate):\n    assert candidate(4) == 2", "program", "f",
    )  # fmt: skip
    for answer, reward in (
        ("    return math.sqrt(x)", 1),
        ("```python\ndef f(x):\n    return math.sqrt(x)\n```", 1),
        ("```python\ndef f(x):\n    return x\n```", 0),
        ("def f(x):\n    return math.sqrt(x)", 1),
    ):
        assert verify.judge(head, answer).reward == reward, answer


# --- what a program must not bring about ----------------------------------------------------------


@pytest.mark.parametrize(("source", "due"), [("", 0), ("add = 5", 0), (ADD, None)])
def test_tests_that_never_run_pay_nobody(source, due):
    tests = "def test():\n    assert add(2, 3) == 0"
    assert verify.program(source, tests).reward == due
    catching = (
        "def test():\n    try:\n        add('a', 1)\n    except Exception:\n        pass\ntest()"
    )
    assert verify.program(source, catching).reward == (due if source != ADD else 1)
    assert status("x = 5", "assert x == 5") == "right"
    assert status("x = 5", "def test():\n    assert x == 5\ntest()") == "error"


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_a_program_makes_no_namespaces_of_its_own():
    source = """
        import ctypes
        def f(flags):
            return ctypes.CDLL(None).unshare(flags)
    """
    verdict = verify.program(textwrap.dedent(source), "assert f(0x10000000) == -1  # CLONE_NEWUSER")
    if verdict.detail.endswith("namespaces"):
        assert verdict.status == "right"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's out-of-memory killer")
def test_a_program_is_the_first_to_go_when_memory_runs_out(monkeypatch):
    refuse(monkeypatch, REFUSED["process only"])
    source = "def f(): return open('/proc/self/oom_score_adj').read()"
    assert status(source, "assert f() == '1000\\n'") == "right"


def test_what_cannot_be_cleared_away_is_no_error_of_ours(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE", -2.5)  # the caller loses its patience after 0.5 s
    slow = "import time\ntime.sleep(1)\n" + ADD
    assert verify.program(slow, TESTS, 3.0)[:2] == (0, "timeout")


def test_a_range_is_a_value():
    source = "def f(x): return range(len(x))"
    assert (
        status(source, "assert f(range(5)) == range(5)\nassert list(f('ab')) == [0, 1]") == "right"
    )


def test_a_task_may_be_named_as_a_builtin():
    tests = "def check(x, y):\n    assert abs(x - y) < 1\ncheck(sum([1, 2]), 3)"
    assert status("def sum(xs): return xs[0] + xs[1]", tests) == "right"
    assert status("def sum(xs): return xs[0]", tests) == "wrong"
