"""SCoRe in TRL by its command: stages, rates, reference, resume, report; and in two processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import score
from scale import pretrained
from tests.ports.test_ports import load
from tests.scale import tiny
from tests.scale.test_problems import GSM8K
from tests.study.test_methods import same
from tests.truth import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(stage1_steps=2, stage2_steps=3, batch=8, group=2, micro_batch=2, sample_batch=4)
SMALL |= dict(max_new=8, eval_n=2, lr=1e-2, warmup=1, save_every=1, model="model", out="out")
SMALL |= dict(train="train.jsonl", test="test.jsonl")
WORDS = [f"--{key.replace('_', '-')}={x}" for key, x in SMALL.items()]


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Return the module, in a folder with a checkpoint and files of problems, where an attempt is
    paid if the sum of its tokens is odd."""
    load("trl_port")
    from ports import trl_score

    def reward_of(k, task, problems):
        def reward(completion_ids, turn, **_):
            pairs = [zip(*row, strict=True) for row in zip(completion_ids, turn, strict=True)]
            return [float(sum(x for x, mine in row if mine == k) % 2) for row in pairs]

        reward.__name__ = f"attempt{k}"
        return reward

    monkeypatch.setattr(trl_score.trl_port, "reward_of", reward_of)
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path / "model")
    for name, rows in (("train", GSM8K[:40]), ("test", GSM8K[40:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return trl_score


@pytest.fixture
def trained(port, monkeypatch):
    """Return of each training the trainer, the weights that it began with, and what it resumed."""
    found, train = [], port.trl_port.ScoreTrainer.train

    def kept(self, resume_from_checkpoint):
        self.model.save_pretrained(f"began{len(found)}")
        found.append((self, pretrained.load(f"began{len(found)}"), resume_from_checkpoint))
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(port.trl_port.ScoreTrainer, "train", kept)
    return found


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(folder):
    return pretrained.load(folder).state_dict()


def test_both_stages_and_a_report(port, trained, tmp_path, capsys):
    assert port.main(WORDS) == 0
    assert "| SCoRe |" in capsys.readouterr().out
    _, c = port.settings(WORDS)
    task = port.problems.task(c)
    found = json.loads((tmp_path / "out/report.json").read_text())
    folders = {name: tmp_path / "out" / name / "final" for name in ("stage1", "score")}
    folders = {"base": tmp_path / "model"} | folders
    drawn = task.draw(2, "test", np.random.default_rng(0))
    for name, folder in folders.items():
        greedy = evaluation.evaluate(pretrained.load(folder), task, drawn, 0.0, 4)
        del greedy["rows"]
        assert found[name] == json.loads(json.dumps(greedy))
    base, one, two = (weights(folder) for folder in folders.values())
    for name, x in base.items():
        assert not torch.equal(x, one[name]) and not torch.equal(one[name], two[name])
    for (trainer, began, _), stage, start in zip(
        trained, (score.stage1, score.stage2), (base, one), strict=True
    ):
        trainer.ref_model.save_pretrained(tmp_path / "reference")
        assert same(base, weights(tmp_path / "reference")) and trainer.stage is stage
        assert same(start, began.state_dict())
        assert trainer.eos_token_ids == [task.end_id]
    rates = [x for trainer, *_ in trained for x in logged(trainer, "learning_rate")]
    assert rates == pytest.approx([0.5e-2, 0.8e-2, 0.3e-2, 0.4e-2, 0.2e-2])
    prompts = [[row["prompt"] for row in trainer.train_dataset] for trainer, *_ in trained]
    assert [len(x) for x in prompts] == [2 * 4, 3 * 4] and prompts[0] != prompts[1][:8]


@pytest.mark.parametrize(("lost", "steps"), [(1, 1), (0, 0)])
def test_a_killed_stage_goes_on_from_its_last_whole_checkpoint(
    port, trained, tmp_path, lost, steps
):
    """Within its third epoch, were the problems few; or when all steps are taken already."""
    words = [*WORDS, "--stage1-steps=0", "--stage2-steps=9", "--batch=16"]
    assert port.main(words) == 0
    (folder,) = (tmp_path / "out").glob("no_stage1")
    before = weights(folder / "final")
    (folder / "final/training_args.bin").unlink()
    for n in range(lost):
        (folder / f"checkpoint-{9 - n}/trainer_state.json").unlink()
    assert port.main(words) == 0
    assert same(before, weights(folder / "final"))
    assert len(trained) == 1 + steps
    for trainer, _, resumed in trained[1:]:
        assert resumed.endswith("checkpoint-8") and trainer.state.global_step == 9


def test_micro_batches_have_the_gradient_of_the_batch(port, trained):
    for size, out in ((8, "whole"), (2, "parts")):
        words = [*WORDS, "--stage1-steps=0", "--stage2-steps=1", f"--micro-batch={size}"]
        assert port.main([*words, f"--out={out}"]) == 0
    norms = [logged(trainer, "grad_norm") for trainer, *_ in trained]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0][0] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--model=nowhere"], "nowhere"), (["--batch=8", "--micro-batch=3"], "--micro-batch 3"),
     (["--lr=0"], "--lr"), (["--train=none.jsonl"], "none.jsonl"), (["--batch=7"], "--batch")],
)  # fmt: skip
def test_bad_options_are_one_line(port, capsys, words, said):
    assert port.main([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_is_of_one_run(port, tmp_path, capsys):
    port.settings(WORDS)
    kept = (tmp_path / "out/config.json").read_text()
    assert port.main([*WORDS, "--alpha=3"]) == 2 and "other settings" in capsys.readouterr().err
    assert (tmp_path / "out/config.json").read_text() == kept


def test_of_several_processes_each_has_its_own_rows_advantages(port, tmp_path, monkeypatch):
    """Rewards are gathered from all; TRL is asked for the second of two processes' rows."""
    trainer_of = port.trl_port.ScoreTrainer
    made = type("Made", (trainer_of,), {})
    parent = trainer_of.__mro__[1]
    reward_B2 = torch.tensor([[0.0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [1, 1], [0, 0], [1, 0]])
    rows = [dict(turn=[1, 0, 2])] * 4
    monkeypatch.setattr(parent, "_generate_and_score_completions", lambda self, inputs: {})
    self = made.__new__(made)
    self.reward_B2, self.stage = reward_B2, score.stage2
    self.settings = score.Config(batch=8, group=2)
    for rank, expected in ((0, reward_B2[:4]), (1, reward_B2[4:])):
        self.accelerator = type("One", (), dict(device="cpu", process_index=rank))
        out = self._generate_and_score_completions(rows)
        (one_B, two_B), _ = score.stage2(expected.T, self.settings)  # two whole groups
        assert torch.equal(out["advantages"], torch.stack([one_B, 0 * one_B, two_B], dim=1))


def test_with_vllm_both_turns_are_asked_of_it_in_ids(port, monkeypatch):
    """A stand-in, as vLLM cannot be installed here: it is told weights before each step's turns,
    and answers with two tokens and an end."""
    import trl.trainer.grpo_trainer as library

    calls = []

    class StandIn:
        def __init__(self, **_):
            pass

        def sync_weights(self):
            calls.append("weights")

        def generate(self, prompts, num_generations, **_):
            calls.append(prompts)
            assert num_generations == 1
            ids = [[len(prompt) % 7, 5, 362] for prompt in prompts]
            return prompts, ids, [[[0.0]] * 3 for _ in ids], None

    monkeypatch.setattr(library, "VLLMGeneration", StandIn)
    assert port.main([*WORDS, "--vllm"]) == 0
    assert [x for x in calls if x == "weights"] == ["weights"] * 5 == calls[::3]
    for first, second in zip(calls[1::3], calls[2::3], strict=True):
        for x1, context in zip(first, second, strict=True):
            assert context[: len(x1) + 3] == [*x1, len(x1) % 7, 5, 362]
            assert len(context) > len(x1) + 3


def test_two_processes_end_with_one_report(port, tmp_path):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*words, str(ROOT / "ports/trl_score.py"), *WORDS], capture_output=True, text=True,
        timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| SCoRe |") == 1
    assert (tmp_path / "out/report.json").is_file()
