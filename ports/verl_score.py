"""SCoRe in verl 0.9.1 on an open checkpoint and a file of problems: both stages, by verl's trainer.

verl_port.py has the advantages. Here are the second turn (`TwoTurns`, verl's agent loop), both
rewards (`compute_score`, and `TwoRewards`, which puts each at its attempt's last token), the files
that verl reads, and the command of each stage. A row is asked for in ids, as scale.train does, and
an attempt ends at the end of its turn alone, or is cut.

    python ports/verl_score.py --model FOLDER --train train.jsonl --test test.jsonl \\
        --out runs/verl --gpus 8 trainer.test_freq=100     # what has a `=` goes to verl
    python ports/verl_score.py .. --show    # writes the files, and only prints the two commands

verl's base is the model that it is given. So Stage II is given the same folder, and begins from
Stage I's checkpoint by verl's way to resume, weights alone: its step is the first after Stage I's.

Differs from score.py: the learning rate stays as it is after the warm-up; bfloat16 sampling by
vLLM is not compared with the trainer's probabilities, but for what verl logs. What was run: see
ports/README.md.
"""

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parent.parent))

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register

import verify
from ports import options, verl_port
from scale import chat, problems

ROOT = Path(__file__).parent.parent
OPTIONS = (
    "stage1-steps stage2-steps batch group lr warmup temperature alpha beta1 beta2 seed max-new "
    "micro-batch save-every"
).split()

# --- two turns, two rewards: in verl's workers ----------------------------------------------------


@cache
def words_of(folder: str):
    """Return a checkpoint's tokenizer, the ids of system message and instruction, of the end of a
    turn, and the form of a user's turn."""
    tokenizer = chat.read_tokenizer(folder)
    form = chat.format_of(tokenizer)
    system = chat.fill(tokenizer, form.system, chat.SYSTEM["math"])
    instruction = chat.fill(tokenizer, form.after + form.user, chat.REVISION["math"])
    return tokenizer, system, instruction, tokenizer.token_to_id(form.end), form.user


class TwoRewards(AgentLoopOutput):
    """A row whose attempts are both paid: verl's own knows one reward, at its last token."""

    def as_dict(self) -> dict:
        output = super().as_dict()
        if "rm_scores" in output:
            first = self.response_mask.index(0) - 1  # the last token of attempt 1
            output["rm_scores"][first] = self.extra_fields["reward_extra_info"]["acc_t1"]
        return output


@register("score")
class TwoTurns(AgentLoopBase):
    async def run(self, sampling_params, raw_prompt, **_) -> TwoRewards:
        """Return a row `x1`, `y1 p1 y2`; the mask is 1 in the attempts, their end included."""
        given = words_of(str(self.config.actor_rollout_ref.model.path))
        tokenizer, system, instruction, end_id, user = given
        x1 = system + chat.fill(tokenizer, user, raw_prompt[-1]["content"])
        max_new = self.config.algorithm.score.max_new
        asked = dict(max_tokens=max_new, stop_token_ids=[end_id], ignore_eos=True)
        name, ids, mask, logps, attempts = uuid4().hex, [], [], [], []
        for k in (1, 2):
            out = await self.server_manager.generate(
                request_id=name, prompt_ids=x1 + ids, sampling_params=sampling_params | asked
            )
            new = list(out.token_ids)
            text = tokenizer.decode([x for x in new if x != end_id], skip_special_tokens=False)
            attempts.append((text, new[-1] != end_id))
            after = instruction if k == 1 else []
            ids += new + after
            mask += [1] * len(new) + [0] * len(after)
            logps += [*(out.log_probs or [0.0] * len(new)), *[0.0] * len(after)]
        return TwoRewards(
            prompt_ids=x1, response_ids=ids, response_mask=mask, response_logprobs=logps,
            num_turns=4, metrics={}, extra_fields=out.extra_fields | dict(attempts=attempts),
        )  # fmt: skip


def compute_score(data_source, solution_str, ground_truth, extra_info) -> dict:
    """Return verl's score, that of attempt 2, and the rewards of both attempts."""
    problem = verify.Problem("", ground_truth, verify.math)
    rewards = (verify.judge(problem, *x).reward for x in extra_info["attempts"])
    first, second = (float("nan" if x is None else x) for x in rewards)  # nan: no verdict
    return dict(score=second, acc_t1=first, acc_t2=second)


# --- files, and a command for each stage ----------------------------------------------------------


def write_rows(c, out: Path) -> tuple[int, int]:
    """Write the splits as verl reads them; return the most tokens of a prompt and of a response."""
    task = problems.task(c)
    _, _, instruction, _, _ = words_of(c.checkpoint)
    most = 0
    for split, rows in problems.read_splits(c).items():
        with open(out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for i, (problem, _) in enumerate(rows):
                most = max(most, len(task.encode(problem.prompt)))
                row = dict(
                    data_source=split, prompt=[dict(role="user", content=problem.prompt)],
                    reward_model=dict(ground_truth=problem.gold), extra_info=dict(index=i),
                )  # fmt: skip
                print(json.dumps(row), file=file)
    return most, 2 * c.max_new + len(instruction)


def command(stage: int, c, out: Path, gpus: int, prompt: int, response: int) -> list[str]:
    """Return the words of a stage's command; prompt, response: most tokens of each.

    Raises:
      ValueError: the rows cannot be shared out.
    """
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    rows = c.batch // gpus  # of each GPU, in parts
    each = min(c.micro_batch or rows, rows)
    if c.batch % (c.group * gpus) or rows % each:
        raise ValueError(f"--batch {c.batch} must be a multiple of --group times {gpus} GPUs, and "
                         f"what each has of --micro-batch {each}")  # fmt: skip
    words = [sys.executable, "-m", "verl.trainer.main_ppo", *verl_port.SETTINGS]
    words += [f"algorithm.score.{name}={getattr(c, name)}" for name in ("alpha", "beta1", "beta2")]
    words += [
        f"algorithm.score.stage={stage}", f"+algorithm.score.max_new={c.max_new}",
        f"actor_rollout_ref.model.path={c.checkpoint}",  # the base, in both stages
        f"data.train_files={out}/train.jsonl", f"data.val_files={out}/test.jsonl",
        f"data.train_batch_size={c.batch // c.group}", f"data.seed={c.seed}",
        f"data.max_prompt_length={prompt}", f"data.max_response_length={response}",
        "data.filter_overlong_prompts=False",  # they are measured in our format, not in verl's
        f"{rollout}.name=vllm", f"{rollout}.n={c.group}", f"{rollout}.temperature={c.temperature}",
        f"{rollout}.top_p=1", f"{rollout}.top_k=-1", f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.agent.default_agent_loop=score",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={each}",
        f"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={each}",
        f"{actor}.ppo_micro_batch_size_per_gpu={each}", f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size={c.batch // c.group}",  # of problems: one update a step
        f"{actor}.optim.lr={c.lr}", f"{actor}.optim.lr_warmup_steps={c.warmup}",
        f"{actor}.optim.weight_decay=0", f"{actor}.optim.betas=[0.9,0.95]",
        f"{actor}.optim.clip_grad=1.0",
        f"{actor}.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "reward.custom_reward_function.path=pkg://ports.verl_score",
        f"trainer.total_training_steps={c.stage1_steps + (stage == 2) * c.stage2_steps}",
        f"hydra.run.dir={out}/hydra", "trainer.total_epochs=1000000",
        f"trainer.save_freq={c.save_every}",
        f"trainer.default_local_dir={out}/stage{stage}", "trainer.logger=[console]",
        f"trainer.n_gpus_per_node={gpus}", "trainer.project_name=score",
        f"trainer.experiment_name=stage{stage}",
    ]  # fmt: skip
    if stage == 2 and not any((out / "stage2").glob("global_step_*")):
        words += [
            "trainer.resume_mode=resume_path", f"{actor}.checkpoint.load_contents=[model]",
            f"trainer.resume_from_path={out}/stage1/global_step_{c.stage1_steps}",
        ]  # fmt: skip
    return words


def settings(argv: list[str]):
    """Return the command's own options, the run's settings, and what is verl's."""
    parser = options.parser("SCoRe in verl, on an open checkpoint.", OPTIONS)
    parser.add_argument("--show", action="store_true", help="print the commands, run none")
    parser.add_argument("--gpus", type=int, default=1, help="of the machine")
    parser.add_argument("verl", nargs="*", help="settings of verl, such as trainer.test_freq=100")
    args = parser.parse_args(argv)
    c = options.settings(args, OPTIONS)
    if not c.stage1_steps * c.stage2_steps * c.lr:
        raise ValueError("--lr and the steps of both stages must be more than 0")
    return args, c


def main(argv: list[str]) -> int:
    """Write the files, and run a stage after the other; return the status."""
    try:
        args, c = settings(argv)
        out = args.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        given = c, out, args.gpus, *write_rows(c, out)
        commands = [command(stage, *given) for stage in (1, 2)]
    except (ValueError, OSError) as error:
        print(f"verl_score: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    others = filter(None, [os.environ.get("VERL_USE_EXTERNAL_MODULES")])
    modules = ",".join([*others, "ports.verl_score"])
    env = dict(PYTHONPATH=paths, VERL_USE_EXTERNAL_MODULES=modules)
    for words in commands:
        words += args.verl
        print(shlex.join([*(f"{name}={x}" for name, x in env.items()), *words]), flush=True)
        done = 0 if args.show else subprocess.run(words, env=os.environ | env).returncode
        if done:
            return done
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
