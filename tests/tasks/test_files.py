"""Rows of the data sets become problems, and what is wrong in a file is named."""

import gzip
import json
import pickle
from functools import partial
from pathlib import Path

import pytest

import verify
from tasks import files, programs

DATA = Path(__file__).parents[3] / "shared" / "data"
CHECK = "def check(candidate): pass"
ROWS = [  # row, prompt, gold, verifier, worked answer
    (
        {"problem": "1+1?", "level": "1", "solution": r"So $\boxed{2}$."},
        "1+1?", r"So $\boxed{2}$.", verify.math, r"So $\boxed{2}$.",
    ),
    ({"problem": "1+1?", "solution": "Two.", "answer": "2"}, "1+1?", "2", verify.math, ""),
    (
        {"problem": "1+1?", "solution": r"\boxed{2}", "answer": "2"},
        "1+1?", "2", verify.math, r"\boxed{2}",
    ),
    (
        {"question": "How many?", "answer": "#### Bags\n2*600=<<2*600=1200>>1200\n#### 1,200 "},
        "How many?", "1200", verify.math, "#### Bags\n2*600=1200\n\\boxed{1200}",
    ),
    (
        {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f", "test": CHECK,
         "canonical_solution": "\n    return 1\n"},
        "def f():", CHECK, dict(entry_point="f", prompt="def f():"),
        "```python\ndef f():\n    return 1\n```",
    ),
    (
        {"text": "Add.", "code": "def a(x):\r\n    return x", "task_id": 1,
         "test_setup_code": "import math", "test_list": ["assert a(1) == 1", "assert a(2) == 2"]},
        "Add.", "import math\nassert a(1) == 1\nassert a(2) == 2", programs.attempt,
        "```python\ndef a(x):\n    return x\n```",
    ),
    (
        {"prompt": "Add.", "code": "", "test_imports": ["import math"], "test_list": ["assert a"]},
        "Add.", "import math\nassert a", programs.attempt, "",
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
def test_rows_become_problems_and_worked_answers(tmp_path, name):
    rows = [row for row, *_ in ROWS]
    text = json.dumps(rows) if name == "x.json" else "\n".join(map(json.dumps, rows)) + "\n\n"
    data = ("\ufeff" + text.replace("\n", "\r\n")).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for problem, (_, prompt, gold, verifier, _) in zip(
        verify.load(tmp_path / name), ROWS, strict=True
    ):
        about = problem.verifier
        if isinstance(verifier, dict):
            assert isinstance(about, partial) and about.func is programs.attempt
            about = about.keywords
        assert (problem.prompt, problem.gold, about) == (prompt, gold, verifier)
        assert pickle.loads(pickle.dumps(problem)).prompt == prompt  # to be judged elsewhere
    assert [x for _, x in files.read(tmp_path / name)] == [worked for *_, worked in ROWS]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"question": "q"}', ["line 1", "missing field 'answer'"]),
        ("a.jsonl", '{"question": "q", "answer": "5"}', ["line 1", "'answer'", "####"]),
        ("a.jsonl", '{"question": "q", "answer": "#### five"}', ["line 1", "'answer'", "####"]),
        ("a.jsonl", '{"question": "q", "answer": "#### 1,23"}', ["line 1", "'answer'", "####"]),
        ("a.jsonl", '{"question": "q", "answer": 5}', ["line 1", "'answer'", "text", "5"]),
        ("a.jsonl", '\n{"problem": "q", "solution": "5"}', ["line 2", "boxed"]),
        ("a.jsonl", '{"problem": "q", "solution": null}', ["line 1", "'solution'", "None"]),
        ("a.jsonl", '{"problem": 5, "answer": "5"}', ["line 1", "'problem'", "text"]),
        ("a.jsonl", '{"problem": "q", "answer": " "}', ["line 1", "'answer'", "text"]),
        ("a.jsonl", '{"prompt": "q", "entry_point": "f"}', ["'test'"]),
        ("a.jsonl", '{"prompt": "q"}', ["line 1", "'problem', 'question'", "'test_list'"]),
        ("a.jsonl", '{"text": "q", "test_list": []}', ["line 1", "'test_list'"]),
        ("a.jsonl", '{"text": "q", "test_list": [1]}', ["line 1", "'test_list'"]),
        ("a.jsonl", '{"text": "q", "test_list": ["a"], "test_imports": 1}', ["line 1"]),
        ("a.jsonl", "", ["no problem"]),
        ("a.jsonl", "[1]", ["line 1", "object"]),
        ("a.jsonl", '{"problem": ', ["line 1", "JSON"]),
        ("a.json", '[{"question": "q"}]', ["row 1", "'answer'"]),
        ("a.json", "5", ["list", "5"]),
        ("a.json", "[" * 200_000, ["JSON"]),
        ("a.jsonl.gz", "not gzip", []),
        ("a.jsonl", b"\xff", []),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], []),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        verify.load(tmp_path / name)
    assert all(word in str(error.value) for word in [name, *words]), str(error.value)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify.load(tmp_path / "none.jsonl")


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
def test_gsm8ks_worked_answers_are_right_in_the_form_that_is_imitated():
    """Those of programs are judged in test_programs.py."""
    path = DATA / "gsm8k" / "train.jsonl"
    for problem, worked in files.read(path)[:300]:
        assert "<<" not in worked and "####" not in worked
        assert verify.judge(problem, worked, truncated=False).reward == 1
