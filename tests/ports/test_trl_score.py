"""SCoRe in TRL by its command: stages, rates, reference, resume, report; and in two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import score
from scale import pretrained
from tests.ports.test_ports import load
from tests.scale import tiny
from tests.scale.test_problems import GSM8K
from tests.truth import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(stage1_steps=2, stage2_steps=3, batch=8, group=2, micro_batch=2, sample_batch=4)
SMALL |= dict(max_new=8, eval_n=2, lr=1e-2, warmup=1, save_every=1, model="model", out="out")
SMALL |= dict(train="train.jsonl", test="test.jsonl")
WORDS = [f"--{key.replace('_', '-')}={x}" for key, x in SMALL.items()]


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Return the module, in a folder with a checkpoint and files of problems, where an attempt is
    paid if its number of tokens, or their sum, is odd."""
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


def test_both_stages_a_resume_and_a_report(port, tmp_path, monkeypatch, capsys):
    made, make = [], port.trl_port.make_trainer
    monkeypatch.setattr(
        port.trl_port, "make_trainer", lambda *x, **y: made.append(make(*x, **y)) or made[-1]
    )
    assert port.main(WORDS) == 0
    assert "| SCoRe |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert list(found) == ["base", "stage1", "score"] and found["score"]["n"] == 2
    base, one, two = (
        pretrained.load(tmp_path / x).state_dict()
        for x in ("model", "out/stage1/final", "out/score/final")
    )
    for name, x in base.items():
        assert not torch.equal(x, one[name]) and not torch.equal(one[name], two[name])
    for trainer, stage in zip(made, (score.stage1, score.stage2), strict=True):
        reference = trainer.ref_model.state_dict()
        trainer.ref_model.save_pretrained(tmp_path / "reference")
        assert trainer.stage is stage and len(reference) > 5
        again = pretrained.load(tmp_path / "reference").state_dict()
        assert all(torch.equal(x, again[name]) for name, x in base.items())
    rates = [row["learning_rate"] for x in made for row in x.state.log_history if "loss" in row]
    assert rates == pytest.approx([0.5e-2, 0.8e-2, 0.3e-2, 0.4e-2, 0.2e-2])

    (tmp_path / "out/score/final/training_args.bin").unlink()  # killed after its second step
    for path in (tmp_path / "out/score/checkpoint-3").iterdir():
        path.unlink()
    (tmp_path / "out/score/checkpoint-3").rmdir()
    assert port.main(WORDS) == 0 and len(made) == 3
    again = pretrained.load(tmp_path / "out/score/final").state_dict()
    torch.testing.assert_close(again, two, rtol=0, atol=0)


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
