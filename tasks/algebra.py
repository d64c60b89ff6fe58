r"""Is the difference of two expressions zero? sympy, in a process that can be killed.

sympy can hang in C code or fill the memory, and no thread or signal stops it cleanly. So it runs in
a worker process that answers one question at a time and is killed when its time is up. Questions
are `nodes`, built into sympy expressions through constructors alone: no string is ever handed to
`sympify` or `parse_expr`. A numeric difference refutes; only a proof makes two equal.

    python -c "from tasks import equality; print(equality.same('(x+1)^2', 'x^2+2x+1'))"
"""

import atexit
import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from multiprocessing.connection import wait


class TimedOut(Exception):
    """sympy was still busy when the time was up."""


class WorkerDied(Exception):
    """The process ended, or could not be started, for no fault of the question's length."""


def ask(what: str, x, y, deadline: float, half: Fraction | None = None) -> bool:
    """Ask the worker about two nodes.

    what: "zero": is x - y provably 0? "near": is |x - y| at most `half`? "factor": is x / y a
    number but 0? "positive factor": and is it above 0? deadline: of time.monotonic(); waiting for
    other threads' questions does not count.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimedOut("no time left")
    return worker(os.getpid()).ask((what, x, y, half), seconds)


class Worker:
    """A process that answers one question at a time, and is killed when it takes too long.

    Any number of threads may ask. A fork gets its own (`worker`), as two could not share its pipes.
    """

    def __init__(self, owner: int):
        self.lock, self.process, self.owner = threading.Lock(), None, owner
        atexit.register(self.close)

    def start(self) -> None:
        command = [sys.executable, "-I", os.path.abspath(__file__)]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise WorkerDied(f"sympy's process could not be started: {error}") from None
        if not self.reply(60):  # sympy is imported: from here on the time counts
            raise WorkerDied("sympy's process did not start")

    def reply(self, seconds: float) -> bytes | None:
        """Return what the worker says, b"" if it died, None if it took too long."""
        return self.process.stdout.read(1) if wait([self.process.stdout], seconds) else None

    def close(self) -> None:
        if self.process is not None and os.getpid() == self.owner:  # not at the end of a fork
            self.process.kill()
            self.process.communicate()  # reaps it and closes its pipes
            self.process = None

    def ask(self, question, seconds: float) -> bool:
        with self.lock:
            for _ in range(2):  # it may have died since the last question: then a new one
                try:
                    if self.process is None:
                        self.start()
                    pickle.dump((question, seconds), self.process.stdin)
                    self.process.stdin.flush()
                    if reply := self.reply(seconds):
                        return reply == b"1"
                    if reply is None:
                        raise TimedOut(f"sympy took more than {seconds:.1f} s")
                except BrokenPipeError:
                    pass
                except BaseException:  # also Ctrl-C: a late answer is not for the next question
                    self.close()
                    raise
                self.close()
        raise WorkerDied("sympy's process died twice")


worker = functools.cache(Worker)  # of the process with this id


def serve() -> None:
    """Be the worker: read questions from standard input until it ends."""
    import resource

    with contextlib.suppress(ValueError):  # macOS has no such limit; the time limit remains
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    y = ("sym", "y")
    for what in ("zero", "factor"):  # sympy imports much of itself late: before the time counts
        decide(what, ("add", ("fn", "sin", y), y), ("mul", Fraction(2), y), None)
    print("!", end="", flush=True)
    while True:
        try:
            question, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        # the caller kills us before; this is for the day when it has died
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            proven = decide(*question)
        except Exception:  # whatever sympy could not do, it did not prove
            proven = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(proven), end="", flush=True)


def decide(what: str, x, y, half) -> bool:
    """Answer one question with sympy. A numeric difference refutes; only a proof accepts."""
    import sympy

    a, b = build(x), build(y)
    if any(z.has(sympy.nan, sympy.zoo, sympy.AccumBounds) for z in (a, b)):
        return False  # 1/0 is no number, and not equal to another
    if what == "near":
        gap = sympy.N(a - b, 60)
        return bool(gap.is_comparable and abs(gap) <= half)
    if what in ("factor", "positive factor"):
        quotient = sympy.simplify(a / b)
        number = quotient.is_number and quotient.is_real and quotient.is_zero is False
        return bool(number and (what == "factor" or quotient.is_positive))
    if a == b or refuted(a, b):
        return a == b
    return (a - b).expand() == 0 or (a - b).equals(0) is True


def build(x):
    """Return the sympy expression of a node, through constructors alone."""
    import sympy

    if isinstance(x, Fraction):
        return sympy.Rational(x.numerator, x.denominator)
    if x[0] == "sym":
        return sympy.Symbol(x[1])
    if x[0] == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[x[1]]
    if x[0] == "call" or x[1] == "prime":  # of an unknown function: sympy's `prime` is another
        return sympy.Function(x[1])(build(x[2]))
    if x[0] != "fn":
        return {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow}[x[0]](*map(build, x[1:]))
    if x[1] == "log":  # of an unstated base: it has the laws of logarithms, and no values
        return sympy.log(build(x[2])) / sympy.log(sympy.Symbol("base of log"))
    names = {"ln": "log", "abs": "Abs", "arcsin": "asin", "arccos": "acos", "arctan": "atan",
             "arccot": "acot"}  # fmt: skip
    return getattr(sympy, names.get(x[1], x[1]))(*map(build, x[2:]))


def refuted(a, b) -> bool:
    """Return whether a and b differ at one of two points, in 40 digits."""
    import sympy

    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for p, q in ((17, 13), (-23, 29)):
        point = {s: sympy.Rational(p * (k + 2) + k * k, q + k) for k, s in enumerate(symbols)}
        u, v = (z.subs(point).evalf(40) for z in (a, b))
        if all(z.is_number and z.is_finite for z in (u, v)):
            if abs(u - v) > max(abs(u), abs(v), sympy.Float("1e-30")) * sympy.Float("1e-20"):
                return True
    return False


if __name__ == "__main__":
    serve()
