"""Does a program that nobody trusts do what trusted tests ask?

A program that is graded inside the process that grades it can always win: it exits with status 0,
returns an object that equals everything, reads the expected value from memory, patches `abs`. So
it gets a process of its own, which has never held anything worth stealing:

    caller ── job ──> guard ── fork ──> candidate   runs the program; knows what it is asked
      ^                │                    ^
      │                │       names, arguments and values
      │                │                    v
      └── verdict ─────┴────── fork ────> judge     runs the tests; knows what is expected

* `run`, the caller, starts a guard for each program: a fresh interpreter that inherits nothing.
* The guard forks the candidate before it reads the job, so that they share no memory of the tests.
  It keeps the deadline, kills and reaps all that is below it, removes the files, and only then
  tells the verdict. It never reads what a program wrote, so nothing can hold it up.
* The judge runs the tests on proxies of what the program defines. A name and arguments go out, one
  value comes back as strictly parsed data, and `==` is Python's own, on exact built-in types. All
  that a forged reply can do is to be that value. Arguments are copies: what a program does to them
  counts only for a call that is a statement of its own, as `f(xs)` where `f` is to sort in place.
  Objects that are no data stay where they are and are proxies here, equal to themselves only.
* The candidate has no standard streams, hard limits, an empty directory, and the strongest
  isolation that the system grants. The verdict names it:
    namespaces    (Linux 5.12: root, or anybody where users may make them) its own processes,
                  network and users; read-only system libraries and a tmpfs are all the files.
    own user      (root otherwise) an own user id; what any user may reach is in reach.
    process only  (else, and macOS, where moreover a process that leaves the session survives) it
                  has the caller's rights: to files, to the network, and to kill the guard, which
                  is then an "error".

    python -c "import sandbox; print(sandbox.run('def f(): return 2', 'assert f() == 2', 3))"

Memory is limited for each process, not for all processes of a program together; they are the first
to go when the machine's runs out. Tests and programs have the standard library only; tests may call
a program's classes, but neither compare nor catch its objects. Values may be nested some 300 deep.
"""

import ast
import builtins
import json
import os
import select
import signal
import symtable
import sys
import time
import types

GRACE = 3.0  # seconds after the deadline in which the guard must have cleaned up
SOURCE = 10**6  # characters of a program
TRAFFIC = 64 * 2**20  # bytes that one program may say, all its values together
ITEMS = 4 * 10**6  # items in one of its values
MEMORY = 2 * 2**30  # bytes of address space of the candidate; the judge has twice as much
FILES = 64 * 2**20  # bytes of one file, or of all files where the directory is a tmpfs
PROCESSES, PROCESSES_SHARED = 64, 2048  # with a user id of its own; together with the caller's
READ_ONLY = ("/usr", "/lib", "/lib64", "/bin", "/etc", sys.base_prefix, sys.base_exec_prefix)
START = "import sys; sys.path.append(sys.argv[1]); import sandbox; sandbox.guard(*sys.argv[2:])"
CALL_IN_PLACE = "call in place"  # a name that no test can have


# --- the caller -----------------------------------------------------------------------------------


def run(
    source: str, tests: str, timeout: float, entry_point: str | None = None, prompt: str = ""
) -> tuple[str, str]:
    """Return a program's status (right, wrong, unparsed, timeout, or error: ours) and the reason.

    Safe in threads and in a large process: neither a fork of the caller nor a signal handler.

    Raises:
      OSError: the system is neither Linux nor macOS.
      ValueError: the timeout is out of range.
    """
    import subprocess  # here, not above: the guard, too, imports this file, and starts often

    if os.name != "posix":
        raise OSError(f"programs are run on Linux and macOS only, this is {sys.platform}")
    if not 0 < timeout <= 3600:
        raise ValueError(f"timeout must be above 0 and at most 3600 seconds, got {timeout}")
    if len(source) > SOURCE:
        return "unparsed", f"the program is longer than {SOURCE} characters"
    job = dict(source=source, tests=tests, entry_point=entry_point, prompt=prompt)
    here, temporary = os.path.dirname(os.path.abspath(__file__)), os.environ.get("TMPDIR", "/tmp")
    deadline = time.monotonic() + timeout  # this clock is the system's: the guard reads the same
    try:
        verdict = subprocess.run(
            [*(sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c"), START]
            + [here, repr(deadline), os.path.abspath(temporary)],
            input=json.dumps(job).encode() + b"\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout + GRACE,
            cwd="/",
            env={k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ},
            start_new_session=True,
        ).stdout
    except subprocess.TimeoutExpired:  # what a program can bring about must never be our error
        return "timeout", "the program could not be cleared away in time"
    except OSError as error:
        return "error", f"the guard failed: {brief(error)}"
    return tuple(json.loads(verdict)) if verdict else ("error", "the guard was lost")


# --- the guard ------------------------------------------------------------------------------------


def guard(deadline: str, temporary: str):
    """Run one job from standard input to its verdict on standard output, and leave nothing."""
    sys.path.pop()
    directory = f"{temporary}/sandbox-{os.urandom(8).hex()}"
    candidate = None
    try:
        if sys.platform == "linux":
            c_library("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: daemons come back to the guard
        for confine in (namespaces, own_user, process_only):
            candidate, ask, answer = start_candidate(confine, float(deadline), directory)
            if os.read(answer, 1):
                break
        else:
            raise OSError("no candidate process could be started")
        if sys.platform == "linux":
            c_library("prctl", 4, 0)  # PR_SET_DUMPABLE: the same user's programs cannot look in
        if time.monotonic() > float(deadline):
            raise TimeoutError("the machine was too slow to start")
        job = json.loads(sys.stdin.buffer.readline())
        status, detail = await_judge(job, ask, answer, float(deadline))
        isolation = confine.__name__.replace("_", " ")
        detail = f"{detail}; {isolation}" if detail else isolation
    except BaseException as error:
        status, detail = "error", brief(error)
    end_all(candidate)
    try:
        remove(directory, float(deadline) + GRACE - 1)
    except OSError as error:
        detail += f"; files are left in {directory}: {brief(error)}"
    os.write(1, json.dumps([status, detail]).encode())


def start_candidate(confine, deadline: float, directory: str) -> tuple[int, int, int]:
    """Fork a candidate; return its id and the descriptors to ask it and to hear its answers.

    The first byte it says is that it is confined; the end of file is that it could not be.
    """
    from_judge, to_candidate = os.pipe()
    from_candidate, to_judge = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(to_candidate)
            os.close(from_candidate)
            candidate(confine, deadline, directory, from_judge, to_judge)
        finally:
            os._exit(0)
    os.close(from_judge)
    os.close(to_judge)
    return pid, to_candidate, from_candidate


def await_judge(job: dict, ask: int, answer: int, deadline: float) -> tuple[str, str]:
    """Fork the judge and return what it says by the deadline."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            silence()
            limit(AS=2 * MEMORY, CORE=0)
            if sys.platform == "linux":
                c_library("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the guard
            verdict = judge(job, Peer(answer, ask, {"call": OPERATIONS["call"]}, {}))
        except BaseException as error:
            verdict = "error", f"the judge failed: {brief(error)}"
        os.write(write, json.dumps(verdict).encode())
        os._exit(0)
    for descriptor in (ask, answer, write):
        os.close(descriptor)
    told = select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]
    kill(pid)
    if not told:
        return "timeout", "the deadline passed"
    verdict = os.read(read, 2**16)
    return tuple(json.loads(verdict)) if verdict else ("error", "the judge was lost")


def end_all(candidate: int | None):
    """Kill and reap every process below the guard, until none is left.

    An orphan becomes the guard's child, so that having no child is having no descendant.
    """
    if candidate:
        kill(-candidate)  # its process group: all that a system without /proc can do
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for pid in file.read().split():
                    kill(int(pid))
        except OSError:
            pass
        time.sleep(0.001)


def kill(pid: int):
    """Send SIGKILL to a process, or to the group of a negative id, if it is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def remove(directory: str, until: float):
    """Remove a directory, whatever its modes are and however deep it goes, or raise OSError.

    It is walked step by step, as the path of a deep place is longer than the system accepts. The
    caller's patience ends soon after `until`; the verdict is worth more than the last directory.
    """
    if not os.path.isdir(directory):
        return
    os.chmod(directory, 0o700)
    os.chdir(directory)
    way, left = [], [unlink_files()]  # the names down to here; the directories left at each step
    while way or left[-1]:
        if time.monotonic() > until:
            raise TimeoutError("there are too many")
        if left[-1]:
            way.append(left[-1].pop())
            os.chmod(way[-1], 0o700)
            os.chdir(way[-1])
            left.append(unlink_files())
        else:
            left.pop()
            os.chdir("..")
            os.rmdir(way.pop())
    os.rmdir(directory)


def unlink_files() -> list[str]:
    """Remove all files from the current directory; return the names of its directories."""
    entries = list(os.scandir())
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name)
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def c_library(name: str, *arguments):
    """Call a function of the C library; raise the OSError that it reports."""
    import ctypes  # here, as no other process than the guard's needs it

    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def silence():
    """Replace the standard streams by /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def limit(**limits: int):
    """Set hard limits, as in limit(CORE=0), as far as the system has them and lets us."""
    import resource  # here, as Windows has none and still must be able to import this file

    for name, most in limits.items():
        try:
            which = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(which)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, most))
        except (AttributeError, OSError, ValueError):
            pass


def said(error: BaseException) -> str:
    """Return an error's message, or nothing where the error is one that cannot say it."""
    try:
        return str(error)[:1000]
    except BaseException:
        return ""


def brief(error: BaseException) -> str:
    """Describe an error in one short line that is safe to print."""
    text = f"{type(error).__name__}: {said(error)[:200]}".removesuffix(": ")
    return "".join(c if c.isprintable() else "?" for c in text)


# --- ways to confine the candidate, strongest first -----------------------------------------------


def namespaces(directory: str):
    """Enter namespaces of all kinds, and a root that holds no more than a program needs."""
    user, group = os.getuid(), os.getgid()
    flags = 0x20000 | 0x8000000 | 0x20000000 | 0x40000000  # CLONE_NEWNS, NEWIPC, NEWPID, NEWNET
    c_library("unshare", flags | (0x10000000 if user else 0))  # CLONE_NEWUSER
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    new_root()
    pid = os.fork()  # the child is process 1 of the namespace: when it ends, the kernel ends all
    if pid:
        os.closerange(0, 256)  # or the judge would not see the candidate close its end
        c_library("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.waitpid(pid, 0)
        os._exit(0)
    os.chdir("/tmp")
    if not user:
        change_user("/tmp")


def new_root():
    """Make a read-only root of the system's libraries and the interpreter, with a tmpfs in /tmp."""
    bind, recursive = 0x1000, 0x4000  # MS_BIND, MS_REC
    c_library("mount", None, b"/", None, recursive | 0x40000, None)  # MS_PRIVATE
    outer = "/proc"  # a directory that is surely there, and that nothing is taken from
    c_library("mount", b"tmpfs", outer.encode(), b"tmpfs", 0, b"mode=755")
    root = f"{outer}/root"
    os.mkdir(root)
    for path in filter(os.path.isdir, READ_ONLY):
        os.makedirs(root + path, exist_ok=True)
        c_library("mount", path.encode(), (root + path).encode(), None, bind | recursive, None)
    for path in ("/tmp", "/dev"):
        os.makedirs(root + path, exist_ok=True)
    for path in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        open(root + path, "w").close()
        c_library("mount", path.encode(), (root + path).encode(), None, bind, None)
    os.symlink("/tmp", f"{root}/dev/shm")  # for the semaphores of multiprocessing
    os.chdir(outer)
    c_library("pivot_root", b".", b".")
    c_library("umount2", b".", 2)  # MNT_DETACH
    attributes = (1 | 2).to_bytes(8, sys.byteorder) + bytes(24)  # MOUNT_ATTR_RDONLY, NOSUID
    c_library("syscall", 442, -100, b"/", 0x8000, attributes, 32)  # mount_setattr, AT_RECURSIVE
    os.chroot("/root")  # whoever is in a chroot may not make user namespaces, nor mounts in them
    os.chdir("/")
    options = f"size={FILES},nr_inodes=10000,mode=700".encode()
    c_library("mount", b"tmpfs", b"/tmp", b"tmpfs", 2 | 4, options)  # MS_NOSUID | MS_NODEV


def own_user(directory: str):
    """Become a user who owns an empty directory and nothing else; only root can."""
    os.mkdir(directory, 0o700)
    change_user(directory)
    os.chdir(directory)
    os.listdir(os.path.dirname(os.__file__))  # refused if the interpreter is for root alone


def process_only(directory: str):
    """Only go to an empty directory."""
    os.makedirs(directory, 0o700, exist_ok=True)
    os.chown(directory, os.getuid(), os.getgid())  # an attempt as another user may have made it
    os.chdir(directory)


def change_user(directory: str):
    """Become a user whom nobody else is: an id that systemd, too, keeps for passing users."""
    user = 61184 + int.from_bytes(os.urandom(4), "big") % 4336
    os.chown(directory, user, user)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


# --- the candidate --------------------------------------------------------------------------------


def candidate(confine, deadline: float, directory: str, read: int, write: int):
    """Confine this process, say so, then answer questions until the judge hangs up."""
    silence()
    os.setsid()
    user = os.getuid()
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, it is this process and its children that go
    except OSError:
        pass
    confine(directory)
    limit(AS=MEMORY, FSIZE=FILES, CORE=0, NOFILE=64, STACK=8 * 2**20)
    limit(CPU=int(max(0.0, deadline - time.monotonic())) + 2)
    limit(NPROC=PROCESSES_SHARED if os.getuid() == user else PROCESSES)
    if sys.platform == "linux":
        c_library("capset", (0x20080522).to_bytes(8, sys.byteorder), bytes(24))  # no capability
        c_library("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        c_library("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.environ.clear()
    os.environ.update(PATH=os.defpath, HOME=os.getcwd(), TMPDIR=os.getcwd())
    sys.argv = ["program.py"]
    module = sys.modules["program"] = types.ModuleType("program")
    os.write(write, b"+")
    peer = Peer(read, write, OPERATIONS, {0: module})
    while True:
        peer.answer(*peer.receive())


def compile_program(module, source: str):
    module.code = compile(source.encode(), "program.py", "exec", dont_inherit=True)  # as a file


OPERATIONS = {  # that the judge may ask for, on the program's module or on an object of it
    "compile": compile_program,
    "run": lambda module: exec(module.__dict__.pop("code"), module.__dict__),
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "call_in_place": lambda function, *args, **kwargs: (function(*args, **kwargs), args)[1],
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda value, key: value[key],
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
}


# --- the judge ------------------------------------------------------------------------------------


def judge(job: dict, peer) -> tuple[str, str]:
    """Run the tests on the program at the other end; return the status and the reason."""
    names = {"__name__": "tests", CALL_IN_PLACE: call_in_place}
    try:
        exec(compile(job["prompt"], "<prompt>", "exec"), names)
        tests, wanted, called, at_once = prepare(job["tests"], names, job["entry_point"])
    except Exception as error:
        return "error", f"the tests cannot be run: {brief(error)}"
    try:
        peer.ask(0, "compile", job["source"])
    except (Exception, Lost) as error:
        return "unparsed", brief(error)
    try:
        peer.ask(0, "run")
        for name in wanted:
            names.pop(name, None)  # the stub of the prompt
            try:
                names[name] = getattr(Remote(peer, 0), name)
            except AttributeError:
                pass
        missing = {name for name in called if not callable(names.get(name))}
        undefined = missing - set(dir(builtins))
        if undefined:  # said here: tests that catch every error would have asked for nothing
            return "wrong", f"the program does not define {', '.join(sorted(undefined))}"
        heard = peer.heard
        exec(tests, names)
    except BaseException as error:
        ours = isinstance(error, ImportError) and not hasattr(error, "of_program")
        return "error" if ours else "wrong", where(error) + brief(error)
    if peer.lost:
        return "wrong", peer.lost  # in spite of tests that catch all errors
    data = {name for name in wanted if name in names and type(names[name]) is not Remote}
    if peer.heard == heard and not data & at_once:  # as where they define functions, and call none
        return "error", "the tests have asked nothing of the program"
    return "right", ""


def prepare(tests: str, names: dict, entry_point: str | None):
    """Return the compiled tests, the names that they take from the program, which of these they
    call, and which names they use at once.

    Builtins and standard modules are never the program's: `def abs` in it changes no test. Only
    where the tests call nothing else are they taken for the task's, which may be to write a `sum`.
    """
    if entry_point and "def check(" in tests:
        tests += f"\ncheck({entry_point})\n"  # HumanEval's form
    top = symtable.symtable(tests, "<tests>", "exec")
    tables = [top]
    for table in tables:
        tables += table.get_children()
    used = {
        symbol.get_name()
        for table in tables
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table is top or symbol.is_global())
    }
    used -= {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    tree = ast.parse(tests)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    called = {call.func.id for call in calls}
    free = used - names.keys() - set(dir(builtins))
    for name in free & sys.stdlib_module_names - called:
        names[name] = __import__(name)
    wanted = free - names.keys() | used & {entry_point} or used & called - names.keys()
    if not wanted:
        raise ValueError("they use nothing of the program (`check` needs an entry_point)")
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and node.value in calls:
            call = node.value
            call.args.insert(0, call.func)
            call.func = ast.copy_location(ast.Name(CALL_IN_PLACE, ast.Load()), call.func)
    at_once = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    return compile(tree, "<tests>", "exec"), wanted, wanted & called, at_once


def call_in_place(function, *args, **kwargs):
    """Call a function whose value nobody uses: its effect on the arguments is what is asked."""
    if type(function) is not Remote:
        return function(*args, **kwargs)
    changed = function._peer.ask(function._number, "call_in_place", *args, **kwargs)
    for mine, theirs in zip(args, changed, strict=True):
        if type(mine) is type(theirs) is list:
            mine[:] = theirs
        elif type(mine) is type(theirs) and type(mine) in (dict, set):
            mine.clear()
            mine.update(theirs)


def where(error: BaseException) -> str:
    """Say on which line of the tests an error was met, if on one."""
    text, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            text = f"line {trace.tb_lineno} of the tests: "
        trace = trace.tb_next
    return text


# --- what the judge and the candidate say to each other -------------------------------------------

SCALARS = (type(None), bool, float, str)  # JSON's own; it also knows nan and the infinities
PARTS = {  # the other types: how to take a value apart, and to make one of the parts
    int: (lambda value: [hex(value)], lambda parts: int(*parts, 16)),  # the large ones
    complex: (lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    bytes: (lambda value: [value.hex()], lambda parts: bytes.fromhex(*parts)),
    bytearray: (lambda value: [value.hex()], lambda parts: bytearray.fromhex(*parts)),
    range: (lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    list: (list.__iter__, list),
    tuple: (tuple.__iter__, tuple),
    set: (set.__iter__, set),
    frozenset: (frozenset.__iter__, frozenset),
    dict: (dict.items, dict),
}
TYPES = {kind.__name__: kind for kind in (*SCALARS, *PARTS)}
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}  # with their modules, to import if met


class Lost(BaseException):
    """The other side has gone or talks nonsense: not for a test's `except Exception`."""


class Remote:
    """A stand-in for an object of the other side.

    It compares by identity, whatever the object would say: `==` is not among the operations.
    """

    def __init__(self, peer, number):
        vars(self).update(_peer=peer, _number=number)

    def __getattr__(self, name):
        if name.startswith("__"):  # hooks that copy and others look for
            raise AttributeError(name)
        return self._peer.ask(self._number, "getattr", name)


def forward(operation):
    return lambda self, *args, **kwargs: self._peer.ask(self._number, operation, *args, **kwargs)


for name in ("call", "setattr", "getitem", "iter", "next", "len", "bool", "str"):
    setattr(Remote, f"__{name}__", forward(name))


class Peer:
    """One end of the channel: it encodes and decodes values, asks the other end and answers it.

    A value travels as JSON, of types that JSON lacks as a list of the type's name and the parts,
    of a subclass as its base. An object of any other type stays, and its number travels.
    """

    def __init__(self, read: int, write: int, operations: dict, objects: dict):
        self.reader, self.writer = open(read, "rb"), open(write, "wb")
        self.operations = operations  # those that the other end may ask for
        self.objects = objects  # mine that the other end knows, by number
        self.remotes = {}  # the other end's that I know, by number
        self.heard, self.lost = 0, ""

    def send(self, message: list):
        body = json.dumps(message).encode()
        self.writer.write(len(body).to_bytes(4, "big") + body)
        self.writer.flush()

    def receive(self) -> list:
        size = int.from_bytes(self.reader.read(4), "big")
        self.heard += size
        if self.heard > TRAFFIC:
            raise ValueError(f"more than {TRAFFIC} bytes")
        body = self.reader.read(size)
        if not size or len(body) < size:
            raise EOFError("the process has ended")
        if body.count(b",") > ITEMS:
            raise ValueError(f"more than {ITEMS} items")
        return json.loads(body)

    def ask(self, number: int, operation: str, *args, **kwargs):
        """Ask for an operation on an object of the other end; return its value or raise its error.

        The nonce binds the answer to the question: one that was written before is not taken.
        """
        nonce = os.urandom(8).hex()
        question = [nonce, number, operation, self.encode(args), self.encode(kwargs)]
        try:
            if self.lost:
                raise EOFError(self.lost)
            self.send(question)
            while len(message := self.receive()) == 5:  # it asks back: a function was an argument
                self.answer(*message)
            echo, error, value = message
            if echo != nonce:
                raise ValueError("an answer to no question")
            value = self.decode(value)
        except Exception as error:
            self.lost = self.lost or brief(error)
            raise Lost(self.lost) from None
        if error is not None:
            raise their_error(error, value)
        return value

    def answer(self, nonce, number, operation, args, kwargs):
        """Perform an operation that the other end asks for, and tell the value or the error."""
        try:
            perform, target = self.operations[operation], self.objects[number]
            value = perform(target, *self.decode(args), **self.decode(kwargs))
            message = [nonce, None, self.encode(value)]
        except Lost:
            raise
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            message = [nonce, kinds[0], said(error)]
        self.send(message)

    def encode(self, value):
        kinds = type(value).__mro__
        kind = next((kind for kind in kinds if kind in SCALARS or kind in PARTS), None)
        if kind in SCALARS or kind is int and abs(value) < 2**63:
            return int(value) if kind is int else value
        if kind:
            return [kind.__name__, *map(self.encode, PARTS[kind][0](value))]
        if type(value) is Remote:
            return ["yours", value._number]
        if type(value) is type and TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        for kind in kinds:
            if NUMBERS.get(kind.__name__) == kind.__module__:
                return [kind.__name__, str(value)]
        self.objects[id(value)] = value
        return ["mine", id(value)]

    def decode(self, value):
        """Make exact built-in types and Remotes of parsed JSON, whatever it says, or raise."""
        if type(value) in (*SCALARS, int):
            return value
        if type(value) is not list:
            raise ValueError("not an encoded value")
        code, *parts = value
        if code == "yours":
            return self.objects[parts[0]]
        if code == "mine":
            return self.remotes.setdefault(parts[0], Remote(self, parts[0]))
        if code == "type":
            return TYPES[parts[0]]
        if code in NUMBERS:
            return getattr(__import__(NUMBERS[code]), code)(*parts)
        return PARTS[TYPES[code]][1]([self.decode(part) for part in parts])


def their_error(name: str, text: str) -> Exception:
    """Return an error like the one that the other side met: a built-in one of the same name."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError  # SystemExit and the like
    error = kind.__new__(kind, text)  # some cannot be initialised with only a text
    if isinstance(error, SyntaxError):
        error.msg = text
    error.of_program = True
    return error
