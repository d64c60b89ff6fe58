"""SCoRe in TRL 1.16.0: a GRPOTrainer with two turns in its rollout, and an advantage a token.

TRL samples, scores the frozen base, runs the optimizer and logs. What it lacks is here: two turns
(`two_turns`), advantages and KL weights for each turn, and a loss of sums (`ScoreTrainer`). The KL
is folded into the advantages, which has the gradient of `tensors.k1_terms`.

    python ports/trl_port.py results.json      # its gradient in the golden case `triples`
    python ports/check_port.py results.json --dtype float32
    python ports/trl_port.py                   # five steps on the toy, on the CPU: seconds a step

Dimension key: B rows (rollouts), G rows of each problem, side by side; T tokens, C of them after
the prompt.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))

import score
import verify
from ports import make_golden
from ports.check_port import contract
from ports.tensors import fold, spread
from rollout import signs
from scale import pretrained

# --- the port -------------------------------------------------------------------------------------


def two_turns(prompts, trainer):
    """Return what TRL asks of a rollout function: ids `x1`, ids `y1 p1 y2`, and what is whose."""
    x1s, p1 = [trainer.task.encode(text) for text in prompts], trainer.task.instruction
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
        paid_KB, held = self.stage(self.reward_B2.T, self.settings)  # of all processes' rows
        start = len(inputs) * self.accelerator.process_index
        paid_KB = [paid_B[start : start + len(inputs)] for paid_B in paid_KB]
        out["advantages"], out["kl_weight"] = spread(out["turn"], paid_KB, held)
        return out

    def _compute_loss(self, model, inputs):
        ids_BT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        C = inputs["completion_ids"].shape[1]
        logp_BC = self._get_per_token_logps_and_entropies(model, ids_BT, mask_BT, C)[0]
        terms = logp_BC, inputs["ref_per_token_logps"], inputs["turn"]
        advantage_BC = fold(inputs["advantages"], inputs["kl_weight"], *terms)
        loss_B = -(logp_BC * advantage_BC).sum(dim=1)
        return loss_B.mean() / self.current_gradient_accumulation_steps


# --- a trainer ------------------------------------------------------------------------------------


def tokenizer_of(task):
    """Return a tokenizer for what TRL logs; all ids that are trained on come from the task."""
    vocabulary = {f"<{i}>": i for i in range(task.vocab_size)}
    tokenizer, end = Tokenizer(models.WordLevel(vocabulary, "<0>")), f"<{task.end_id}>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def reward_of(k, task, problems):
    """Return the reward function of attempt k, in TRL's form."""

    def reward(completion_ids, turn, problem, **_):
        found = []
        for ids, turns, i in zip(completion_ids, turn, problem, strict=True):
            mine = [x for x, mine in zip(ids, turns, strict=True) if mine == k]
            text = task.decode([x for x in mine if x != task.end_id])
            found.append(verify.judge(problems[i], text, mine[-1] != task.end_id).reward)
        return found

    reward.__name__ = f"attempt{k}"
    return reward


class Clock(TrainerCallback):
    """Keeps the seconds of each step: sampling, grading, loss, backward, optimizer."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def make_trainer(
    folder, task, problems, c, stage, steps, out, rewards=None, tokenizer=None, **more
):
    """Return a trainer whose `train()` takes so many steps; their times: `trainer.clock.seconds`.

    A step samples two attempts in c.batch rows, c.group of each problem, grades them, scores the
    frozen base, and updates once.

    Args:
      folder: the base, in Hugging Face's layout; the policy starts as a copy of it. (Stage II goes
        on from Stage I's weights: load them into `trainer.model`. The base stays the base.)
      task: a `rollout.Task`. problems: at least c.batch / c.group. c: a `score.Config`, of which
        the part on reinforcement learning is read. stage: score.stage1 or score.stage2.
      out: TRL's folder. rewards: functions in TRL's form, of attempts 1 and 2; None: the verifier.
      tokenizer: what TRL logs and saves with; its end-of-text token is task.end_id. None: numbers.
      more: settings of TRL.
    """
    usual = dict(
        output_dir=str(out), max_steps=steps, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_steps=10**6, bf16=False,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=c.batch, num_generations=c.group,
        max_completion_length=task.max_new, temperature=c.temperature,  # of both log-probabilities
        learning_rate=c.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=c.warmup,
        adam_beta2=0.95, max_grad_norm=1.0,
        beta=1.0,  # of TRL's own KL, which is not used: else it does not score the frozen base
    )  # fmt: skip
    args = GRPOConfig(**usual | more)
    rows = [dict(prompt=problem.prompt, problem=i) for i, problem in enumerate(problems)]
    trainer = ScoreTrainer(
        model=str(folder), args=args, processing_class=tokenizer or tokenizer_of(task),
        rollout_func=two_turns,
        reward_funcs=rewards or [reward_of(k, task, problems) for k in (1, 2)],
        train_dataset=Dataset.from_list(rows), callbacks=[clock := Clock()],
    )  # fmt: skip
    trainer.task, trainer.settings, trainer.stage, trainer.clock = task, c, stage, clock
    trainer.eos_token_ids = [task.end_id]  # nothing else that the folder names ends an attempt
    if not args.use_vllm:
        trainer.generation_config.eos_token_id = [task.end_id]
    return trainer


# --- the golden case ------------------------------------------------------------------------------


def results():
    """Return the gradients by the weights, of both stages, from the case's attempts and rewards."""
    case, found = contract()["triples"]["inputs"], {}
    names = ("temperature", "alpha", "beta1", "beta2")
    c = score.Config(batch=len(case["reward1"]), group=case["G"], **{x: case[x] for x in names})
    more = {x: case[x] for x in ("instruction", "end_id", "max_new")}
    task = SimpleNamespace(encode=json.loads, vocab_size=7, **more)
    problems = [verify.Problem(json.dumps(prompt), "") for prompt in case["prompts"]]
    rewards = [lambda x=case[f"reward{k}"], **_: x for k in (1, 2)]
    for k, reward in enumerate(rewards, start=1):
        reward.__name__ = f"attempt{k}"
    with tempfile.TemporaryDirectory() as place:
        for name, model in zip(("policy", "base"), make_golden.models(torch.float32), strict=True):
            pretrained.save(model, f"{place}/{name}")
        for name, stage in make_golden.STAGES.items():
            trainer = make_trainer(f"{place}/base", task, problems, c, stage, 1, place, rewards)
            policy = type(trainer.model).from_pretrained(f"{place}/policy")
            trainer.model.load_state_dict(policy.state_dict())
            attempts = iter([case["attempts1"], case["attempts2"]])
            trainer._generate_single_turn = lambda *_, attempts=attempts: (next(attempts), None)
            rows = [dict(prompt=problem.prompt) for problem in problems for _ in range(c.group)]
            trainer.current_gradient_accumulation_steps = 1
            batch = trainer._generate_and_score_completions(rows)
            trainer._compute_loss(trainer.model.train(), batch).backward()
            for weight in trainer.model.parameters():  # so that they are told by our names
                weight.data = weight.grad
            trainer.model.save_pretrained(f"{place}/{name}")
            gradient = dict(pretrained.load(f"{place}/{name}").named_parameters())
            found |= make_golden.of_weights(f"{name}_k1", gradient)
    return {"triples": make_golden.plain(found)}


def main(argv):
    if argv:
        Path(argv[0]).write_text(json.dumps(results()))
        return
    c, steps = score.Config(), 5
    task = signs(c)
    problems = task.draw(c.batch // c.group * steps, "train", np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as place:
        pretrained.save(score.new_run(c, Path(place)).policy, f"{place}/base")  # a random model
        trainer = make_trainer(f"{place}/base", task, problems, c, score.stage2, steps, place)
        trainer.train()
    print(f"seconds a step, median: {statistics.median(trainer.clock.seconds):.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
