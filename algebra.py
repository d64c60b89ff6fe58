"""Is the difference of two expressions zero? sympy, in a process that can be killed.

sympy can hang in C code or fill the memory, and no thread or signal stops it cleanly. So it runs in
a worker process that answers one question at a time and is killed when its time is up. Questions
are nodes of `latex`, built into sympy expressions through constructors alone: no string is ever
handed to `sympify` or `parse_expr`. A numeric difference refutes; only a proof makes two equal.

    python -c "import algebra, latex; print(algebra.ask('zero', *map(latex.parse, ('x+x', '2x'))))"
"""

import atexit
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

REPLIES = (False, True, "positive", "negative")  # of the worker, by number


class TimedOut(Exception):
    """sympy was still busy when the time was up."""


class WorkerDied(Exception):
    """The process ended, or could not be started, for no fault of the question's length."""


class Worker:
    """A process that answers one question at a time, and is killed when it takes too long.

    Any number of threads may ask. A fork gets its own (`worker`), as two could not share its pipes.
    """

    def __init__(self):
        self.lock, self.process, self.questions = threading.Lock(), None, 0
        self.owner = os.getpid()
        atexit.register(self.close)

    def start(self) -> None:
        command = [sys.executable, "-I", os.path.abspath(__file__)]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise WorkerDied(f"sympy's process could not be started: {error}") from None
        timer = threading.Timer(60, self.process.kill)
        timer.start()
        self.process.stdout.read(1)  # sympy is imported: from here on the time counts
        timer.cancel()

    def close(self) -> None:
        if self.process is not None and os.getpid() == self.owner:  # not at the end of a fork
            self.process.kill()
            self.process.communicate()  # reaps it and closes its pipes
            self.process = None

    def ask(self, question, seconds: float):
        """Return the worker's answer. Raises TimedOut; WorkerDied if it dies of the question."""
        with self.lock:
            self.questions += 1
            for _ in range(2):  # it may have died since the last question: then a new one
                if self.process is None:
                    self.start()
                started = time.monotonic()
                timer = threading.Timer(seconds, self.process.kill)
                timer.start()
                try:
                    pickle.dump((question, seconds), self.process.stdin)
                    self.process.stdin.flush()
                    reply = self.process.stdout.readline()
                except BrokenPipeError:
                    reply = b""
                except BaseException:  # as Ctrl-C: an answer that nobody reads is not for the next
                    self.close()
                    raise
                finally:
                    timer.cancel()
                if reply:
                    return REPLIES[int(reply)]
                self.close()
                if time.monotonic() - started >= 0.9 * seconds:
                    raise TimedOut(f"sympy took more than {seconds:.1f} s")
        raise WorkerDied("sympy's process died twice")


@functools.cache
def worker(_pid: int) -> Worker:
    return Worker()


def ask(what: str, x, y, half: Fraction | None = None, deadline: float | None = None):
    """Ask the worker about two nodes.

    Args:
      what: "zero": is x - y provably 0? "near": is |x - y| at most `half`? Both answered by a bool.
        "factor": is x / y a number? Answered by "positive", "negative" or False.
      deadline: of time.monotonic(); without it 2 seconds from now.

    Raises:
      TimedOut: it did not know in time. WorkerDied: there is no process, or it died of this.
    """
    left = 2.0 if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise TimedOut("no time left")
    return worker(os.getpid()).ask((what, x, y, half), left)


def serve() -> None:
    """Be the worker: read questions from standard input until it ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    except (ImportError, ValueError):
        pass  # Windows has no such limit; elsewhere the time limit remains
    y = ("sym", "y")
    for what in ("zero", "factor"):  # sympy imports much of itself late: before the time counts
        decide(what, ("add", ("fn", "sin", y), y), ("mul", Fraction(2), y), None)
    out = sys.stdout.buffer
    out.write(b"!")
    out.flush()
    while True:
        try:
            question, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        set_alarm(seconds + 1)  # the caller kills us before; this is for the day when it has died
        try:
            reply = decide(*question)
        except Exception:  # whatever sympy could not do, it did not prove
            reply = False
        set_alarm(0)
        out.write(b"%d\n" % REPLIES.index(reply))
        out.flush()


def set_alarm(seconds: float) -> None:
    """Let the system end this process after so many seconds (0: never), where it can."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def decide(what: str, x, y, half):
    """Answer one question with sympy. A numeric difference refutes; only a proof accepts."""
    import sympy

    a, b = build(x), build(y)
    if any(z.has(sympy.nan, sympy.zoo, sympy.AccumBounds) for z in (a, b)):
        return False  # 1/0 is no number, and not equal to another
    if what == "near":
        gap = sympy.N(a - b, 60)
        return bool(gap.is_comparable and abs(gap) <= half)
    if what == "factor":
        quotient = sympy.simplify(a / b)
        if not quotient.is_number or not quotient.is_real or quotient.is_zero is not False:
            return False
        return "positive" if quotient.is_positive else "negative"
    return a == b or (not refuted(a, b) and proven_zero(a - b))


def build(x):
    """Return the sympy expression of a node, through constructors alone."""
    import sympy

    if isinstance(x, Fraction):
        return sympy.Rational(x.numerator, x.denominator)
    if x[0] == "sym":
        return sympy.Symbol(x[1])
    if x[0] == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[x[1]]
    if x[0] == "call":
        return sympy.Function(x[1])(build(x[2]))
    if x[0] != "fn":
        return {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow}[x[0]](*map(build, x[1:]))
    if x[1] == "log":  # of an unstated base: it has the laws of logarithms, and no values
        return sympy.log(build(x[2])) / sympy.log(sympy.Symbol("base of log"))
    names = {"ln": "log", "abs": "Abs", "floor": "floor", "ceil": "ceiling", "arcsin": "asin",
             "arccos": "acos", "arctan": "atan", "arccot": "acot"}  # fmt: skip
    unknown = x[1].startswith("prime")
    made = sympy.Function(x[1]) if unknown else getattr(sympy, names.get(x[1], x[1]))
    return made(*map(build, x[2:]))


def refuted(a, b) -> bool:
    """Return whether a and b differ at one of two points, in 40 digits."""
    import sympy

    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for start in (Fraction(17, 13), Fraction(-23, 29)):
        point = {
            s: sympy.Rational(start.numerator * (k + 2) + k * k, start.denominator + k)
            for k, s in enumerate(symbols)
        }
        u, v = (z.subs(point).evalf(40) for z in (a, b))
        if all(z.is_number and z.is_finite for z in (u, v)):
            scale = max(abs(u), abs(v), sympy.Float("1e-30"))
            if abs(u - v) > scale * sympy.Float("1e-20"):
                return True
    return False


def proven_zero(d) -> bool:
    """Return whether sympy proves an expression zero."""
    import sympy

    for rewrite in (sympy.expand, sympy.cancel, sympy.simplify):
        d = rewrite(d)
        if d == 0:
            return True
    if not d.free_symbols and d.is_algebraic:
        return sympy.minimal_polynomial(d, sympy.Symbol("x")) == sympy.Symbol("x")
    return d.equals(0) is True


if __name__ == "__main__":
    serve()
