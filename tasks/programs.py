"""Is a program right? It runs where it can harm and fool nobody, and trusted tests ask it.

How it is held stands in sandbox.py, what is asked of it in dialogue.py. Here are the door to both,
and the way from a completion to a program.

    python -c "import verify; print(verify.program('def f(): return 2', 'assert f() == 2'))"
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import verify
from tasks.dialogue import brief
from tasks.sandbox import GRACE

SOURCE = 10**6  # characters of a program
START = (  # of the guard: its path is ours only while it imports, so that no program sees us
    "import sys; sys.path.append(sys.argv[1]); from tasks import sandbox; sys.path.pop(); "
    "sandbox.guard(float(sys.argv[2]), sys.argv[3])"
)
BLOCK = re.compile(  # mark, language, program; and the line that ends it, or nothing
    r"^[ \t]*(```+|~~~+)[ \t]*(?:(\w+)[ \t]*)?\n(.*?)(^[ \t]*\1[ \t]*$|\Z)", re.M | re.S
)


def judge(source: str, tests: str, timeout: float, entry_point: str | None, prompt: str):
    """Return the reward, status and detail of a program's verdict (see `verify.program`).

    Tests are asserts, as of MBPP, or HumanEval's `check`, which is called with the entry point; its
    prompt is trusted code, whose helpers the tests use rather than the program's. The timeout, in
    seconds, is for everything together. The detail ends with the isolation that the system granted.
    Safe in threads and in a large process: it is not forked, and no signal handler is set.

    Raises:
      OSError: the system is neither Linux nor macOS.
      ValueError: the timeout is out of range.
    """
    if os.name != "posix":
        raise OSError(f"programs are run on Linux and macOS only, this is {sys.platform}")
    if not 0 < timeout <= 3600:
        raise ValueError(f"timeout must be above 0 and at most 3600 seconds, got {timeout}")
    if len(source) > SOURCE:
        return 0, "unparsed", f"the program is longer than {SOURCE} characters"
    job = dict(source=source, tests=tests, entry_point=entry_point, prompt=prompt)
    deadline = time.monotonic() + timeout  # this clock is the system's: the guard reads the same
    root, temporary = Path(__file__).parents[1], os.path.abspath(os.environ.get("TMPDIR", "/tmp"))
    try:
        told = subprocess.run(
            [*(sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", START)]
            + [root, repr(deadline), temporary],
            input=json.dumps(job).encode() + b"\n", stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=timeout + GRACE, cwd="/", start_new_session=True,
            env={k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ},
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired:  # what a program can bring about must never be our error
        return 0, "timeout", "the program could not be cleared away in time"
    except OSError as error:
        return None, "error", f"the guard failed: {brief(error)}"
    status, detail = json.loads(told) if told else ("error", "the guard was lost")
    return {"right": 1, "error": None}.get(status, 0), status, detail


def attempt(answer: str, gold: str, entry_point=None, prompt: str = "") -> verify.Verdict:
    """Return the verdict on a completion that holds a program; gold: the tests.

    A problem's verifier is this, or of HumanEval a functools.partial with the rest. There the
    completion is a program of its own, which has the prompt's imports, or it goes on where the
    prompt, a function's head and docstring, ends.
    """
    source = code_of(answer)
    if prompt:
        source = prompt + ("" if source == answer else "\n") + source
    return verify.program(source, gold, entry_point=entry_point, prompt=prompt)


def code_of(answer: str) -> str:
    """Return the last program that stands in a fenced block, or else the whole answer.

    Blocks that say that they are Python come before blocks that say nothing; others, and blocks
    without an end, are none.

    >>> code_of("Like this:\\n```python\\nx = 1\\n```\\nor not"), code_of("x = 1")
    ('x = 1\\n', 'x = 1')
    """
    found = {}
    for _, language, lines, end in BLOCK.findall(answer.replace("\r\n", "\n")):
        if end:
            name = "python" if language.lower() in ("py", "python3") else language.lower()
            found[name] = textwrap.dedent(lines)
    return found.get("python", found.get("", answer))
