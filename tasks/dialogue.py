"""What do a program and its tests say to each other? The judge asks, the candidate answers.

They are two processes, which sandbox.py starts. The candidate runs the program; the judge runs the
tests on stand-ins for what the program defines (`Remote`).

* A name and arguments go out, one value comes back as strictly parsed data, and `==` is Python's
  own, on exact built-in types. All that a forged reply can do is to be that value.
* Arguments are copies: what a program does to them counts only for a call that is a statement of
  its own, as `f(xs)` where `f` is to sort in place.
* Objects that are no data stay where they are and have stand-ins, equal to themselves only: tests
  may call a program's classes, but neither compare nor catch its objects.

Tests and programs have the standard library only. Values may be nested some 300 deep.
"""

import ast
import builtins
import json
import operator
import os
import symtable
import sys
import types
from contextlib import suppress
from functools import partialmethod

TRAFFIC = 64 * 2**20  # bytes that one program may say, all its values together
ITEMS = 4 * 10**6  # items in one of its values
CALL_IN_PLACE = "call in place"  # a name that no test can have


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


def run_tests(job: dict, read: int, write: int) -> tuple[str, str]:
    """Run the tests on the program at the other end; return the status and the reason."""
    peer = Peer(read, write, {"call": OPERATIONS["call"]}, {})
    names = {"__name__": "tests", CALL_IN_PLACE: call_in_place}
    try:
        exec(compile(job["prompt"], "<prompt>", "exec"), names)
        tests, wanted, called, at_once = prepare(job["tests"], names, job["entry_point"])
    except Exception as error:
        return "error", f"the tests cannot be run: {brief(error)}"
    try:
        code = peer.ask(0, "compile", job["source"].encode())  # bytes, as of a file
    except (Exception, Lost) as error:
        return "unparsed", brief(error)
    try:
        peer.ask(0, "run", code)
        for name in wanted:
            names.pop(name, None)  # the stub of the prompt
            with suppress(AttributeError):
                names[name] = getattr(Remote(peer, 0), name)
        undefined = {name for name in called if not callable(names.get(name))} - set(dir(builtins))
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
    symbols = [symbol for table in tables for symbol in table.get_symbols()]
    used = {s.get_name() for s in symbols if s.is_referenced() and s.is_global()}
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
    at_once = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    return compile(tree, "<tests>", "exec"), wanted, wanted & called, at_once


def call_in_place(function, *args, **kwargs):
    """Call a function whose value nobody uses: its effect on the arguments is what is asked."""
    if type(function) is not Remote:
        return function(*args, **kwargs)
    changed = function._ask("call_in_place", *args, **kwargs)
    for mine, theirs in zip(args, changed, strict=True):
        if type(mine) is type(theirs) and type(mine) in (list, dict, set):
            mine.clear()
            (mine.extend if type(mine) is list else mine.update)(theirs)


def where(error: BaseException) -> str:
    """Say on which line of the tests an error was met, if on one."""
    import traceback  # here, as right programs need it not

    steps = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in steps if frame.f_code.co_filename == "<tests>"]
    return f"line {lines[-1]} of the tests: " if lines else ""


def answer_questions(read: int, write: int):
    """Say that this process is confined, then answer until the judge hangs up."""
    module = sys.modules["program"] = types.ModuleType("program")
    os.write(write, b"+")
    peer = Peer(read, write, OPERATIONS, {0: module})
    while True:
        peer.answer(*peer.receive())


METHODS = operator.call, operator.getitem, setattr, iter, next, len, bool, str  # of a Remote
OPERATIONS = {  # that the judge may ask for, on the program's module or on an object of it
    **{operation.__name__: operation for operation in (*METHODS, getattr)},
    "compile": lambda module, source: compile(source, "program.py", "exec", dont_inherit=True),
    "run": lambda module, code: exec(code, vars(module)),
    "call_in_place": lambda function, *args, **kwargs: (function(*args, **kwargs), args)[1],
}

SCALARS = (type(None), bool, float, str)  # JSON's own; it also knows nan and the infinities
PARTS = {  # the other types: how to take a value apart, and to make one of the parts
    int: (lambda value: [hex(value)], lambda parts: int(*parts, 16)),  # the large ones
    complex: (lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    bytes: (lambda value: [value.hex()], lambda parts: bytes.fromhex(*parts)),
    bytearray: (lambda value: [value.hex()], lambda parts: bytearray.fromhex(*parts)),
    range: (lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    dict: (dict.items, dict),
    **{kind: (kind.__iter__, kind) for kind in (list, tuple, set, frozenset)},
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
        return self._ask("getattr", name)

    def _ask(self, operation, *args, **kwargs):
        return self._peer.ask(self._number, operation, *args, **kwargs)


for name in [operation.__name__ for operation in METHODS]:
    setattr(Remote, f"__{name}__", partialmethod(Remote._ask, name))


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
    error.msg = text  # of a SyntaxError
    error.of_program = True
    return error
