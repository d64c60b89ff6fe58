"""SCoRe in verl asks for two turns in ids, pays each attempt at its end, and both stages train.

verl's sampling needs a GPU. The agent loop is tested on a server that says what it is told to, the
settings by verl's own composition and check, and the whole trainer with Ray on the CPU, where
verl_cpu.py stands in for the device and for vLLM: all that is there of Stage I and II is verl's.
"""

import asyncio
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.scale import tiny
from tests.truth import ROOT

verl = pytest.importorskip("verl")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own
GSM8K = [dict(question=f"What is {i} + 5?", answer=f"#### {i + 5}") for i in range(40)]
SMALL = "--stage1-steps 1 --stage2-steps 1 --batch 4 --group 2 --max-new 8".split()
CPU = (
    "+ray_kwargs.ray_init.num_gpus=1 ray_kwargs.ray_init.num_cpus=16 trainer.device=cpu "
    "actor_rollout_ref.rollout.name=stand_in actor_rollout_ref.rollout.agent.num_workers=1 "
    "reward.num_workers=1 transfer_queue.backend.SimpleStorage.num_data_storage_units=1 "
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa "
    "actor_rollout_ref.model.use_remove_padding=False data.dataloader_num_workers=0 "
    "actor_rollout_ref.actor.use_torch_compile=False"
).split()
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def options(tmp_path):
    """Return the options of a run on a random model, whose tokenizer transformers reads, too."""
    from transformers import PreTrainedTokenizerFast

    model = tiny.checkpoint(tmp_path / "model")
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    file = str(model / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, chat_template=TURNS, **ends)
    tokenizer.save_pretrained(model)
    for name, rows in (("train", GSM8K), ("test", GSM8K[:4])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folders = ("model", "model"), ("train", "train.jsonl"), ("test", "test.jsonl"), ("out", "out")
    return [f"--{name}={tmp_path / path}" for name, path in folders] + SMALL


@pytest.fixture
def port():
    return importlib.import_module("ports.verl_score")


def test_an_agent_loop_asks_twice_in_ids_and_both_attempts_are_paid_at_their_ends(options, port):
    folder = options[0].removeprefix("--model=")
    tokenizer, system, instruction, end, user = port.words_of(folder)
    first, second = [*tokenizer.encode("\\boxed{5}").ids, end], tokenizer.encode("\\boxed{6").ids
    asked, answers = [], iter([first, second])

    async def generate(request_id, prompt_ids, sampling_params):
        asked.append((request_id, prompt_ids, sampling_params))
        return SimpleNamespace(token_ids=next(answers), log_probs=None, extra_fields={})

    loop = port.TwoTurns.__new__(port.TwoTurns)
    actor = SimpleNamespace(model=SimpleNamespace(path=folder))
    score = SimpleNamespace(score=SimpleNamespace(max_new=8))
    loop.config = SimpleNamespace(actor_rollout_ref=actor, algorithm=score)
    loop.server_manager = SimpleNamespace(generate=generate)
    row = asyncio.run(loop.run(dict(temperature=0.7), [dict(role="user", content="What?")]))
    x1 = system + port.chat.fill(tokenizer, user, "What?")
    assert [ids for _, ids, _ in asked] == [x1, x1 + first + instruction]
    how = dict(temperature=0.7, max_tokens=8, stop_token_ids=[end], ignore_eos=True)
    assert [params for *_, params in asked] == [how, how] and asked[0][0] == asked[1][0]
    assert row.prompt_ids == x1 and row.response_ids == first + instruction + second
    assert row.response_mask == [1] * len(first) + [0] * len(instruction) + [1] * len(second)

    rewards = {x: port.compute_score("", "", x, row.extra_fields) for x in ("5", "6")}
    assert rewards["5"] == dict(score=0, acc_t1=1, acc_t2=0)
    assert rewards["6"] == dict(score=0, acc_t1=0, acc_t2=0)  # attempt 2 was cut
    row.extra_fields["reward_extra_info"] = dict(score=0.5, acc_t1=0.25)
    row.reward_score = 0.5
    paid = row.as_dict()["rm_scores"].tolist()
    assert {i: x for i, x in enumerate(paid) if x} == {len(first) - 1: 0.25, len(paid) - 1: 0.5}


def test_the_settings_of_both_stages_pass_verls_own_check(options, port, capfd, monkeypatch):
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    assert port.main([*options, "--show", "trainer.test_freq=7"]) == 0
    lines = [x for x in capfd.readouterr().out.splitlines() if "verl.trainer.main_ppo" in x]
    found = []
    for line in lines:
        words = port.shlex.split(line.split("verl.trainer.main_ppo ")[1])
        with initialize_config_dir(f"{Path(verl.__file__).parent}/trainer/config", "1.3"):
            found.append(compose("ppo_trainer", words))
        needed = need_reference_policy(found[-1]), need_critic(found[-1])
        validate_config(found[-1], *needed)
        assert needed == (True, False)
    first, second = found
    assert [x.algorithm.score.stage for x in found] == [1, 2]
    assert first.actor_rollout_ref.model.path == second.actor_rollout_ref.model.path
    assert (first.trainer.resume_mode, second.trainer.resume_mode) == ("auto", "resume_path")
    assert second.trainer.resume_from_path == f"{first.trainer.default_local_dir}/global_step_1"
    assert second.actor_rollout_ref.actor.checkpoint.load_contents == ["model"]
    assert [x.trainer.total_training_steps for x in found] == [1, 2]
    assert port.main([*options, "--show", "--gpus", "3"]) == 2
    assert "multiple of --group times 3 GPUs" in capfd.readouterr().err


def test_both_stages_train_in_verls_trainer_on_a_stand_in(options, tmp_path):
    """With Ray, verl's FSDP2 engine, queue, rewards and checkpoints, in four minutes on a CPU."""
    modules = dict(PYTHONPATH=str(ROOT / "tests/ports"), VERL_USE_EXTERNAL_MODULES="verl_cpu")
    env = os.environ | modules | dict(OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    command = [sys.executable, "ports/verl_score.py", *options, *CPU]
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=500)
    text = (tmp_path / "log").read_text()
    assert done.returncode == 0, text[-3000:]
    for stage, step in ((1, 1), (2, 2)):
        actor = tmp_path / f"out/stage{stage}/global_step_{step}/actor"
        assert (actor / "huggingface/model.safetensors").exists()
    assert "/acc_t1/mean@1" in text and "/acc_t2/mean@1" in text
