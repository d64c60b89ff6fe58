"""SCoRe in TRL 1.16.0: a GRPOTrainer with two turns in its rollout, and an advantage a token.

TRL samples, scores the frozen base, runs the optimiser and logs. What it lacks is here: two turns
(`two_turns`), an advantage and a KL weight for each turn, and a loss of sums (`ScoreTrainer`).

    python tests/port_trl.py --steps 5             # trains a random model on the toy, on the CPU
    python tests/port_trl.py --model FOLDER        # trains another, from `GPT.save_pretrained`
    python tests/port_trl.py --check               # its gradient against score.py's, same rows

`--kl folded` has the gradient of score.py's `--kl k1`. `--kl native` leaves the loss to TRL: its
k3, times the ratio, has the gradient of each token's KL, but not that of later tokens' KL, and it
has one weight for all tokens. Stage I needs a weight for each turn, so it cannot be had natively.

Dimension key: B rows (rollouts), G rows of each problem, side by side; T tokens, C of them after
the prompt. One process: of several, each has a part of the rewards' rows only.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from port_tensors import fold, score_tensors

import chat
import model
import rollout
import run
import score
import verify

# --- the port -------------------------------------------------------------------------------------


def two_turns(prompts, trainer):
    """Return what TRL asks of a rollout function: ids `x1`, ids `y1 p1 y2`, and what is whose."""
    p1 = trainer.processing_class.encode(chat.REVISE)
    x1s = trainer.processing_class(prompts)["input_ids"]
    y1s, _ = trainer._generate_single_turn(x1s, None, {}, 1)
    context = [x1 + y1 + p1 for x1, y1 in zip(x1s, y1s, strict=True)]  # ids, never text again
    y2s, _ = trainer._generate_single_turn(context, None, {}, 1)
    turns = [[1] * len(y1) + [0] * len(p1) + [2] * len(y2) for y1, y2 in zip(y1s, y2s, strict=True)]
    return dict(
        prompt_ids=x1s, completion_ids=[y1 + p1 + y2 for y1, y2 in zip(y1s, y2s, strict=True)],
        logprobs=None, turn=turns, env_mask=[[int(k > 0) for k in turn] for turn in turns],
    )  # fmt: skip


class ScoreTrainer(GRPOTrainer):
    """GRPO without clipping, deviations, lengths or one advantage a row: what is left is SCoRe."""

    def _calculate_rewards(self, *given):
        self.reward_B2 = super()._calculate_rewards(*given)  # TRL goes on with their sum
        return self.reward_B2

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        turn_BC = pad_sequence([torch.tensor(row["turn"]) for row in inputs], batch_first=True)
        out["turn"] = turn_BC.to(self.accelerator.device)
        rewards = self.reward_B2.unbind(dim=1)
        out["advantages"], out["kl_weight"] = score_tensors(
            out["turn"], *rewards, self.num_generations, **self.settings
        )
        return out

    def _compute_loss(self, model, inputs):
        if self.kl == "native":
            return super()._compute_loss(model, inputs)
        logp_BC = self.log_probabilities(model, inputs)
        terms = logp_BC, inputs["ref_per_token_logps"], inputs["turn"]
        advantage_BC = fold(inputs["advantages"], inputs["kl_weight"], *terms)
        loss_B = -(logp_BC * advantage_BC).sum(dim=1)
        return loss_B.mean() / self.current_gradient_accumulation_steps

    def log_probabilities(self, model, inputs):
        ids_BC = inputs["completion_ids"]
        ids_BT = torch.cat([inputs["prompt_ids"], ids_BC], dim=1)
        mask_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        n = ids_BC.shape[1]
        return self._get_per_token_logps_and_entropies(model, ids_BT, mask_BT, n)[0]


# --- the toy --------------------------------------------------------------------------------------


def toy_tokenizer():
    """Return the toy's tokenizer as TRL wants one, with the ids of `chat.toy_encoding`."""
    vocabulary = {c: i for i, c in enumerate([*"0123456789+=", chat.END, chat.REVISE])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chat.REVISE))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens([chat.END, chat.REVISE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=chat.END, pad_token=chat.END
    )


def reward_of(attempt):
    """Return the reward function of one attempt, in TRL's form."""

    def reward(completion_ids, turn, gold, **_):
        format, rewards = chat.format_of("addition"), []
        for ids, turns, answer in zip(completion_ids, turn, gold, strict=True):
            mine = [i for i, k in zip(ids, turns, strict=True) if k == attempt]
            cut = mine[-1] != format.end_id
            text = chat.decode(format, mine if cut else mine[:-1])
            rewards.append(verify.arithmetic(text, answer, cut).reward)
        return rewards

    reward.__name__ = f"attempt{attempt}"
    return reward


class Clock(TrainerCallback):
    """Keeps the seconds of each step: sampling, grading, loss, backward, optimiser."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def make_trainer(
    folder, problems, batch=256, group=4, max_new=9, steps=1, stage=2, kl="folded",
    alpha=10.0, beta1=0.01, beta2=4.0, lr=7e-4, warmup=20, temperature=1.0,
    rewards=None, out=None,
):  # fmt: skip
    """Return a trainer whose `train()` takes `steps` steps; their times: `trainer.clock.seconds`.

    A step samples two attempts in `batch` rows, `group` of each problem, grades them, scores the
    frozen base, and updates once.

    Args:
      folder: the base, in Hugging Face's layout; the policy starts as a copy of it. (Stage II goes
        on from Stage I's weights: load them into `trainer.model`. The base stays the base.)
      problems: of `verify.problems`, at least batch / group. max_new: limit of an attempt.
      rewards: two reward functions in TRL's form, of attempts 1 and 2; None grades the toy.
      out: TRL's folder; None makes one.
    """
    if kl == "native" and stage == 1:
        raise ValueError("TRL's own KL has one weight for both turns; Stage I needs two")
    args = GRPOConfig(
        output_dir=str(out or tempfile.mkdtemp()), max_steps=steps, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_steps=10**6, use_cpu=True, bf16=False,
        model_init_kwargs={"dtype": "float32"}, gradient_checkpointing=False,
        per_device_train_batch_size=batch, num_generations=group, max_completion_length=max_new,
        learning_rate=lr, lr_scheduler_type="constant_with_warmup", warmup_steps=warmup,
        adam_beta2=0.95, max_grad_norm=1.0, temperature=temperature,  # of both log-probabilities
        beta=beta1,  # of TRL's own KL; any number but 0 makes it load and score the frozen base
        loss_type="luspo", scale_rewards="none",  # sums over tokens, mean over rows; no deviations
    )  # fmt: skip
    trainer = ScoreTrainer(
        model=str(folder), args=args, processing_class=toy_tokenizer(), rollout_func=two_turns,
        reward_funcs=rewards or [reward_of(1), reward_of(2)], callbacks=[clock := Clock()],
        train_dataset=Dataset.from_list([dict(prompt=p.prompt, gold=p.gold) for p in problems]),
    )  # fmt: skip
    trainer.kl, trainer.clock = kl, clock
    trainer.settings = dict(stage=stage, alpha=alpha, beta1=beta1, beta2=beta2)
    return trainer


# --- the check ------------------------------------------------------------------------------------


def parity_of(attempt):
    """Return a reward function that pays random models: is the sum of an attempt's ids even?"""

    def reward(completion_ids, turn, **_):
        rows = zip(completion_ids, turn, strict=True)
        sums = [sum(i for i, k in zip(*row, strict=True) if k == attempt) for row in rows]
        return [float(x % 2 == 0) for x in sums]

    reward.__name__ = f"parity{attempt}"
    return reward


def random_folders(where):
    """Write two random models of the toy's size, base and policy; return their folders."""
    for seed, name in enumerate(("base", "policy")):
        model.GPT(run.Config().model(), seed).save_pretrained(Path(where) / name)
    return Path(where) / "base", Path(where) / "policy"


def gradients(base, policy, stage, kl="folded", rows=32, group=4, **more):
    """Return TRL's gradient on a batch that it samples, score.py's on the same rows, and the batch.

    Both are one vector, in the order of TRL's parameters.
    """
    problems = verify.problems(rows // group, "train", np.random.default_rng(0), 7)
    pay = [parity_of(1), parity_of(2)]
    trainer = make_trainer(base, problems, rows, group, stage=stage, kl=kl, rewards=pay, **more)
    trainer.model.load_state_dict(type(trainer.model).from_pretrained(policy).state_dict())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    trainer._compute_loss(trainer.model, batch).backward()
    named = dict(trainer.model.named_parameters())

    ours, frozen = model.GPT.from_pretrained(policy), model.GPT.from_pretrained(base)
    loss_B = score_loss(ours, frozen, batch, trainer, stage)
    loss_B.mean().backward()
    with torch.no_grad():
        for weight in ours.parameters():  # so that they are told by the names they have in TRL
            weight.copy_(weight.grad)
    expected = model.parts(ours)
    return (
        torch.cat([weight.grad.flatten() for weight in named.values()]),
        torch.cat([expected[name].flatten() for name in named]),
        batch,
    )


def score_loss(policy, base, batch, trainer, stage):
    """Return score.py's loss [B] of the rows in TRL's batch, with the KL from samples."""
    turn_BC, ids_BC = batch["turn"], batch["completion_ids"]

    def picked(ids, mask):
        return [i[m].tolist() for i, m in zip(ids, mask, strict=True)]

    x1s = picked(batch["prompt_ids"], batch["prompt_mask"].bool())
    y1s, y2s = picked(ids_BC, turn_BC == 1), picked(ids_BC, turn_BC == 2)
    r = rollout.lay_out(x1s, [y1s, y2s], chat.format_of("addition").instruction, "cpu")
    logp_BS, kl1_B, kl2_B = score.score_terms(policy, base, r, trainer.temperature, "k1")
    reward1_B, reward2_B = trainer.reward_B2.unbind(dim=1)
    s, G = trainer.settings, trainer.num_generations
    if stage == 1:
        terms = logp_BS, r.mask2_BS, kl1_B, kl2_B, reward2_B
        return score.loss_stage1(*terms, G, s["beta1"], s["beta2"])
    terms = logp_BS, r.mask1_BS, r.mask2_BS, kl1_B, kl2_B, reward1_B, reward2_B
    return score.loss_stage2(*terms, G, s["alpha"], s["beta1"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare gradients and stop")
    parser.add_argument("--model", help="folder of the base; a random one if none is given")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--kl", choices=("folded", "native"), default="folded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        base, policy = random_folders(where)
        if given.check:
            for stage in (1, 2):
                found, expected, _ = gradients(base, policy, stage, out=where)
                error = (found - expected).norm() / expected.norm()
                print(f"Stage {stage}: |difference| / |gradient| = {error:.1e}")
            return
        problems = verify.problems(given.batch * given.steps, "train", np.random.default_rng(0), 7)
        trainer = make_trainer(
            given.model or base, problems, given.batch, steps=given.steps, stage=given.stage,
            kl=given.kl, out=where,
        )  # fmt: skip
        trainer.train()
        print(f"seconds a step, median: {statistics.median(trainer.clock.seconds):.3f}")


if __name__ == "__main__":
    main()
