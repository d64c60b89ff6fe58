"""How is a program that nobody trusts held? A guard starts it, confines it, and clears it away.

A program that is graded inside the process that grades it can always win: it exits with status 0,
returns an object that equals everything, reads the expected value from memory, patches `abs`. So
it gets a process of its own, which has never held anything worth stealing:

    caller ── job ──> guard ── fork ──> candidate   runs the program; knows what it is asked
      ^                │                    ^
      │                │       names, arguments and values
      │                │                    v
      └── verdict ─────┴────── fork ────> judge     runs the tests; knows what is expected

* The caller, programs.py, starts a guard for each program: a fresh interpreter without its memory.
* The guard forks the candidate before it reads the job, so that they share no memory of the tests.
  It keeps the deadline, kills and reaps all that is below it, removes the files, and only then
  tells the verdict. It never reads what a program wrote, so nothing can hold it up.
* The candidate has no standard streams, hard limits (of memory for each process, not for all of
  them), an empty directory, and the strongest isolation that the system grants: `namespaces`,
  `own_user` or `process_only`. The verdict names it; tasks/README.md says where each is granted,
  and what a program still reaches.
"""

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress

from tasks import dialogue
from tasks.dialogue import brief

GRACE = 3.0  # seconds after the deadline in which the guard must have cleaned up
MEMORY = 2 * 2**30  # bytes of address space of the candidate; the judge has twice as much
FILES = 64 * 2**20  # bytes of one file, or of all files where the directory is a tmpfs
PROCESSES, PROCESSES_SHARED = 64, 2048  # with a user id of its own; together with the caller's
READ_ONLY = ("/usr", "/lib", "/lib64", "/bin", "/etc", sys.base_prefix, sys.base_exec_prefix)


def guard(deadline: float, temporary: str):
    """Run one job from standard input to its verdict on standard output, and leave nothing."""
    pid, directory = None, f"{temporary}/sandbox-{os.urandom(8).hex()}"
    try:
        prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: daemons come back to the guard
        for confine in (namespaces, own_user, process_only):
            pid, ask, answer = start_candidate(confine, deadline, directory)
            if os.read(answer, 1):  # it is confined; one that could not be has ended
                break
        else:
            raise OSError("no candidate process could be started")
        prctl(4, 0)  # PR_SET_DUMPABLE: the same user's programs cannot look in
        if time.monotonic() > deadline:
            raise TimeoutError("the machine was too slow to start")
        job = json.loads(sys.stdin.buffer.readline())
        status, detail = await_judge(job, ask, answer, deadline)
        detail = f"{detail}; {confine.__name__.replace('_', ' ')}".removeprefix("; ")
    except BaseException as error:
        status, detail = "error", brief(error)
    end_all(pid)
    if os.path.isdir(directory) and not remove(directory, deadline + GRACE - 1):
        detail += f"; files are left in {directory}"
    os.write(1, json.dumps([status, detail]).encode())


def start_candidate(confine, deadline: float, directory: str) -> tuple[int, int, int]:
    """Fork a candidate; return its id and the descriptors to ask it and to hear its answers."""
    from_judge, to_candidate = os.pipe()
    from_candidate, to_judge = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(to_candidate)
            os.close(from_candidate)
            give_up_rights(confine, deadline, directory)
            dialogue.answer_questions(from_judge, to_judge)
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
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the guard
            verdict = dialogue.run_tests(job, answer, ask)
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


def end_all(pid: int | None):
    """Kill and reap all below the guard: it inherits orphans, so without a child it is alone."""
    if pid:
        kill(-pid)  # its process group: all that a system without /proc can do
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for child in file.read().split():
                kill(int(child))
        time.sleep(0.001)


def kill(pid: int):
    """Send SIGKILL to a process, or to the group of a negative id, if it is there."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def remove(directory: str, until: float) -> bool:
    """Remove a directory, whatever its modes are and however deep it goes; return whether it went.

    The caller's patience ends soon after `until`; the verdict is worth more than the last file.
    Modes are changed only of what cannot be removed otherwise, as root can: a file may be a link.
    """
    import subprocess  # here, as few programs leave a directory

    with suppress(OSError, subprocess.TimeoutExpired):
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, directory], timeout=until - time.monotonic())
            if not os.path.isdir(directory):
                return True
    return False


def prctl(*arguments: int):
    """Set an attribute of this process; Linux has them, and other systems do without."""
    if sys.platform == "linux":
        c_library("prctl", *arguments)


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
        with suppress(AttributeError, OSError, ValueError):
            which = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(which)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, most))


def give_up_rights(confine, deadline: float, directory: str):
    """Confine this process, for good: one of the ways below, limits, and no way back."""
    silence()
    os.setsid()
    user = os.getuid()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, it is this process and its children that go
    confine(directory)
    limit(AS=MEMORY, FSIZE=FILES, CORE=0, NOFILE=64, STACK=8 * 2**20)
    limit(CPU=int(max(0.0, deadline - time.monotonic())) + 2)
    limit(NPROC=PROCESSES_SHARED if os.getuid() == user else PROCESSES)
    if sys.platform == "linux":
        c_library("capset", (0x20080522).to_bytes(8, sys.byteorder), bytes(24))  # no capability
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.environ.clear()
    os.environ.update(PATH=os.defpath, HOME=os.getcwd(), TMPDIR=os.getcwd())
    sys.argv = ["program.py"]


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
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.waitpid(pid, 0)
        os._exit(0)
    os.chdir("/tmp")
    if not user:
        change_user("/tmp")


def new_root():
    """Make a read-only root of the system's libraries and the interpreter, with a tmpfs in /tmp."""
    bind, recursive = 0x1000, 0x4000  # MS_BIND, MS_REC
    c_library("mount", None, b"/", None, recursive | 0x40000, None)  # MS_PRIVATE
    root = "/proc/root"  # in a directory that is surely there, and that nothing is taken from
    c_library("mount", b"tmpfs", b"/proc", b"tmpfs", 0, b"mode=755")
    for path in filter(os.path.isdir, READ_ONLY):
        os.makedirs(root + path, exist_ok=True)
        c_library("mount", path.encode(), (root + path).encode(), None, bind | recursive, None)
    for path in ("/tmp", "/dev"):
        os.makedirs(root + path, exist_ok=True)
    for path in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        open(root + path, "w").close()
        c_library("mount", path.encode(), (root + path).encode(), None, bind, None)
    os.symlink("/tmp", f"{root}/dev/shm")  # for the semaphores of multiprocessing
    os.chdir("/proc")
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
    process_only(directory)
    change_user(directory)
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
