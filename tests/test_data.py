"""From an open checkpoint and files of problems to a report: the whole way, at a tiny size."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from truth import ROOT

import chat
import eval as evaluation
import rollout
import run as runs
import score
from model import GPT

DATA = ROOT.parent / "shared" / "data"
GSM8K = [
    {"question": f"Ann has {a} pens and buys {b} more. How many has she?",
     "answer": f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}"}
    for a in range(2, 9) for b in range(2, 9)
]  # fmt: skip
MBPP = [
    {"text": f"Write a function to add {k} to a number.",
     "code": f"def add_{k}(x):\r\n    return x + {k}",
     "test_list": [f"assert add_{k}(1) == {k + 1}", f"assert add_{k}(5) == {k + 5}"]}
    for k in range(40)
]  # fmt: skip
HUMANEVAL = [
    {"prompt": f"def times_{k}(x):\n    \"\"\"Return {k} times x.\"\"\"\n",
     "entry_point": f"times_{k}",
     "canonical_solution": f"    return {k} * x\n",
     "test": f"def check(candidate):\n    assert candidate(2) == {2 * k}\n"}
    for k in range(12)
]  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """Write a Qwen2 model with random weights and a small tokenizer of its kind."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as cut
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = cut.Split(Regex(chat.QWEN2), "isolated", invert=False)
    bytes_only = cut.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = cut.Sequence([split, bytes_only])
    texts = [row["question"] + row["answer"] for row in GSM8K] + [row["code"] for row in MBPP]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=cut.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=416, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, rope_theta=1e6,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    make_checkpoint(folder := tmp_path_factory.mktemp("qwen2"))
    return folder


def rows_of(folder: Path, kind: str) -> dict[str, str]:
    """Return files of a data set: the published rows where they are, else a few of our own."""
    theirs = {"math": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
              "mbpp": ("mbpp/mbpp.jsonl", "humaneval/HumanEval.jsonl.gz")}[kind]  # fmt: skip
    if DATA.exists():
        return dict(zip(("train", "test"), (str(DATA / name) for name in theirs), strict=True))
    write_rows(folder)
    files = {"math": ("train.jsonl", "test.jsonl"), "mbpp": ("mbpp.jsonl", "HumanEval.jsonl.gz")}
    return dict(zip(("train", "test"), (str(folder / x) for x in files[kind]), strict=True))


def write_rows(folder: Path) -> None:
    """Write our own rows in the formats of the data sets."""
    files = {"train.jsonl": GSM8K[:40], "test.jsonl": GSM8K[40:], "mbpp.jsonl": MBPP,
             "HumanEval.jsonl.gz": HUMANEVAL}  # fmt: skip
    for name, rows in files.items():
        text = "\n".join(map(json.dumps, rows)).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)


SMALL = dict(
    dtype="float32", sft_steps=6, sft_batch=8, sft_lr=1e-2, stage1_steps=2, stage2_steps=2,
    batch=8, group=2, micro_batch=4, sample_batch=4, max_new=24, eval_n=6, chunk=64, save_every=2,
)  # fmt: skip


def words(settings: dict) -> list[str]:
    return [
        x for key, value in settings.items() for x in (f"--{key.replace('_', '-')}", str(value))
    ]


@pytest.mark.parametrize("preset", ["math", "mbpp"])
def test_a_preset_goes_from_checkpoint_to_report(tmp_path, checkpoint, preset):
    """SFT on worked answers, Stage I, Stage II, table; then again from the weights, in one line."""
    files = rows_of(tmp_path, preset)
    command = [sys.executable, ROOT / "score.py", "--preset", preset, "--checkpoint", checkpoint]
    command += [*words(files), *words(SMALL), "--run", tmp_path / "run"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"base +6/6 .*worked answers", done.stdout)
    assert re.search(r"\| SCoRe \|", done.stdout) and "6 held-out problems (test)" in done.stdout

    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in log] == ["base"] * 6 + ["stage1"] * 2 + ["score"] * 2
    assert log[5]["loss"] < log[0]["loss"] - 0.1  # it learns to answer
    for row in log[6:]:
        assert row["gap"] < 1e-3 and 0 <= row["truncated1"] <= 1 and row["dropped"] == 0
        assert 1 < row["entropy1"] < 7 and 1 < row["entropy2"] < 7
    assert abs(log[6]["kl1"]) < 1e-5  # the policy is still the base
    speed = [json.loads(line) for line in (tmp_path / "run/speed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in speed] == [row["step"] for row in log]
    keys = ("seconds", "sampled_tokens_per_s", "episodes_per_s", "timeouts", "peak_mib")
    assert all(row[key] >= 0 for row in speed[6:] for key in keys)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["n"] == 6 and list(report["phases"]) == ["base", "stage1", "score"]
    paper = {"math": (5e-6, 0.1), "mbpp": (1e-5, 0.25)}[preset]
    assert (report["config"]["lr"], report["config"]["beta2"]) == paper
    assert report["phases"]["score"]["truncated_t1"] >= 0

    assert evaluation.main([str(tmp_path / "run"), "--export", str(tmp_path / "open")]) == 0
    again = GPT.from_pretrained(tmp_path / "open").state_dict()
    kept = runs.load(tmp_path / "run/score.pt")["model"]
    assert kept.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in kept.items())
    assert (tmp_path / "open/tokenizer.json").is_file()


def settings(folder, checkpoint, **changes) -> runs.Config:
    files = rows_of(folder, "math")
    preset = runs.PRESETS["math"] | SMALL | files | dict(checkpoint=str(checkpoint))
    return runs.Config(**preset | changes)


def test_a_rollout_is_the_conversation_and_its_masks_are_the_attempts(tmp_path, checkpoint):
    from transformers import PreTrainedTokenizerFast

    c = settings(tmp_path, checkpoint)
    policy, problems = (
        GPT.from_pretrained(checkpoint),
        runs.draw(c, 3, "train", np.random.default_rng(0)),
    )
    with torch.no_grad():  # some attempts end
        policy.embed.weight[c.format().end_id] *= 3
    r = score.sample(policy, c, problems, torch.Generator().manual_seed(1), 1.0, group=2)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    start = "<|im_start|>assistant\n"
    for b, row in enumerate(r.ids_BT):
        text = theirs.decode(row[: int(r.length_B[b])])
        head, first, second = text.split(start)
        assert problems[b // 2].prompt in head and head.startswith("<|im_start|>system\n")
        assert "<|im_start|>user\n" in first and "may or may not" in first
        for turn, part in ((1, first.split("<|im_start|>user")[0].removesuffix("\n")), (2, second)):
            said = theirs.decode(row[1:][r.turn_BS[b] == turn])
            assert said == part or part == said + "\n" or part.startswith(said)
        cut = r.truncated_BK[b].tolist()
        for turn in (1, 2):
            ids = row[1:][r.turn_BS[b] == turn].tolist()
            assert (ids[-1] == c.format().end_id) is not cut[turn - 1]
            assert len(ids) == 24 or not cut[turn - 1]


def test_files_have_presets_whether_named_or_not(tmp_path, checkpoint):
    given = words(rows_of(tmp_path, "math") | dict(checkpoint=checkpoint))
    for task, preset in (("math", "math"), ("code", "mbpp")):
        by_task, by_preset = (
            runs.parse([option, name, *given])[0]
            for option, name in (("--task", task), ("--preset", preset))
        )
        assert by_task == by_preset and by_task.task == task
        assert by_task.lr == {"math": 5e-6, "code": 1e-5}[task] and by_task.dtype == "bfloat16"
    with pytest.raises(ValueError, match="is for --task math and code, and needed there"):
        runs.Config(checkpoint=str(checkpoint))


def test_a_checkpoint_whose_tokenizer_is_missing_leaves_no_folder(tmp_path, checkpoint, capsys):
    shutil.copytree(checkpoint, tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    given = SMALL | rows_of(tmp_path, "math") | dict(checkpoint=tmp_path / "mute")
    assert score.main(["--task", "math", "--run", str(tmp_path / "run"), *words(given)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_unreadable_gold_answers_stop_a_run_in_one_line(tmp_path, checkpoint, capsys):
    rows = [{"problem": f"{row['question']} ", "answer": r"\\frac{}{"} for row in GSM8K]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = rows_of(tmp_path, "math") | dict(train=tmp_path / "bad.jsonl", checkpoint=checkpoint)
    given |= SMALL | dict(sft_steps=0)
    assert score.main(["--task", "math", "--run", str(tmp_path / "run"), *words(given)]) == 2
    error = capsys.readouterr().err
    assert "no verdict" in error and error.count("\n") == 1


def test_what_cannot_be_imitated_is_refused(tmp_path, checkpoint):
    rows = [{"problem": row["question"], "answer": "5"} for row in GSM8K]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    c = settings(tmp_path, checkpoint, train=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="without a worked answer to imitate: --sft-steps must be"):
        runs.create(c, tmp_path / "run")


def test_splits_of_files(tmp_path):
    """A tenth of the training rows is dev; what is tested is not trained on."""
    train, test = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text("\n".join(map(json.dumps, GSM8K[:40])))
    test.write_text("\n".join(map(json.dumps, GSM8K[35:])))
    found = runs.given("math", str(train), str(test))
    names = {split: {p.prompt for p in rows} for split, rows in found.items()}
    assert (len(found["train"]), len(found["dev"]), len(found["test"])) == (31, 4, 14)
    twice = [row | {"question": row["question"].replace(" ", "  ")} for row in GSM8K[:40]]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, GSM8K[:40] + twice)))
    again = runs.given("math", str(tmp_path / "d.jsonl"), str(test))
    assert (again["train"], again["dev"]) == (found["train"], found["dev"])
    assert not names["train"] & names["dev"] and not (names["train"] | names["dev"]) & names["test"]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, MBPP)))
    with pytest.raises(ValueError, match="c.jsonl holds problems of kind program, not math"):
        runs.given("math", str(train), str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task="addition"), "--preset math is for --task math, got addition"),
        (dict(task="code"), "--preset math is for --task math, got code"),
        (dict(train=""), "--test FILE: no --train was given"),
        (dict(n_layer=8), "--n-layer is for the toys"),
        (dict(copy=0.5), "--copy is for the toys"),
        (dict(max_new=4000), "takes up to"),
        (dict(max_new=0), "--max-new must be given"),
        (
            dict(checkpoint="/nowhere"),
            "a local folder (nothing is downloaded), got /nowhere",
        ),
        (dict(sample_batch=3), "--sample-batch must be a multiple of --group"),
        (dict(train="/nowhere.jsonl"), "nowhere.jsonl"),
        (dict(batch=2**19), "a step needs 262144 problems"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, checkpoint, capsys, changes, message):
    given = SMALL | rows_of(tmp_path, "math") | dict(checkpoint=checkpoint, task="math") | changes
    argv = ["--preset", "math", "--run", str(tmp_path / "run"), *words(given)]
    assert score.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_bfloat16_is_computed_in_everywhere_and_nowhere_kept_but_in_the_base(
    tmp_path, checkpoint, monkeypatch
):
    """One step of each stage. The base computes what the policy does, so that their KL is 0."""
    logits = []
    for module in (rollout, score):
        law = module.token_law
        monkeypatch.setattr(
            module, "token_law", lambda x, *more, law=law: logits.append(x.dtype) or law(x, *more)
        )
    monkeypatch.setattr(score, "check_sampler", lambda *_: None)
    c = settings(tmp_path, checkpoint, dtype="bfloat16", sft_steps=1, stage1_steps=1,
                 stage2_steps=1, batch=4, max_new=8, recompute=True)  # fmt: skip
    run = runs.create(c, tmp_path / "run")
    assert run.policy.recompute and run.policy.lean
    assert score.train(run, threading.Event())
    assert len(logits) > 30 and set(logits) == {torch.bfloat16}
    assert {w.dtype for w in run.policy.parameters()} == {torch.float32}
    wide = {name for name, w in run.base.named_parameters() if w.dtype == torch.float32}
    narrow = {name for name, w in run.base.named_parameters() if w.dtype == torch.bfloat16}
    assert len(narrow) == 2 * 4 and {"embed.weight", "norm.weight"} < wide
    log = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()][1:]
    assert all(row["gap"] < 0.2 for row in log)
    assert abs(log[0]["kl1"]) < 1e-6 and abs(log[0]["kl2"]) < 1e-6


def test_a_checkpoints_sampler_is_held_against_its_trainer(tmp_path, checkpoint, monkeypatch):
    c = settings(tmp_path, checkpoint)
    policy = GPT.from_pretrained(checkpoint)
    score.check_sampler(policy, c)
    monkeypatch.setattr(score, "sampler_gap", lambda *_: 2e-3)
    with pytest.raises(runs.Failure, match="disagree"):
        score.check_sampler(policy, c)


def test_a_run_is_bound_to_its_files(tmp_path, checkpoint):
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows")
    files = {name: str(tmp_path / f"rows/{name}.jsonl") for name in ("train", "test")}
    runs.create(settings(tmp_path, checkpoint, **files), tmp_path / "run")
    runs.restore(tmp_path / "run")
    with open(files["train"], "a") as file:
        file.write("\n" + json.dumps(GSM8K[0]))
    with pytest.raises(ValueError, match="train.jsonl .* is not what .*run began with"):
        runs.restore(tmp_path / "run")


def test_what_does_not_fit_is_refused_before_there_is_a_run(tmp_path, checkpoint):
    for row, more in (
        ({"question": "How many? " * 3000, "answer": "#### 5"}, {}),
        ({"question": "How many?", "answer": "One. " * 3000 + "\n#### 5"}, {}),
    ):
        (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, [*GSM8K, row])))
        c = settings(tmp_path, checkpoint, train=str(tmp_path / "long.jsonl"), **more)
        with pytest.raises(ValueError, match="tokens, --checkpoint .* reads 4096"):
            runs.create(c, tmp_path / "run")
        runs.given.cache_clear()  # the file of this name is written anew


def test_a_run_from_a_checkpoint_resumes_bit_for_bit(tmp_path, checkpoint):
    c = settings(tmp_path, checkpoint, sft_steps=2)
    whole = runs.create(c, tmp_path / "whole")
    assert score.train(whole, threading.Event())
    now = threading.Event()
    now.set()
    run = runs.create(c, tmp_path / "parts")
    for _ in range(20):
        if score.train(run, now):
            break
        run = runs.restore(tmp_path / "parts")
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 6
