"""SCoRe in TRL 1.16.0 on an open checkpoint and a file of problems: both stages, and a report.

trl_port.py has the trainer: two turns, and an advantage a token. Here are the stages one after the
other, with score.py's problems and learning rates, TRL's checkpoints, and the table of eval.py.
Options are those of `scale.train --preset math` that are listed in OPTIONS, with the paper's
settings for MATH. Weights and products are float32. What is killed goes on with the same command.

    python ports/trl_score.py --model FOLDER --train train.jsonl --test test.jsonl --out runs/trl
    accelerate launch --num_processes 2 ports/trl_score.py --model FOLDER --train train.jsonl \\
        --test test.jsonl --out runs/trl
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as evaluation
import score
from ports import options, trl_port
from scale import pretrained, problems

OPTIONS = (
    "stage1-steps stage2-steps batch group lr warmup temperature alpha beta1 beta2 seed eval-n "
    "max-new micro-batch sample-batch recompute save-every"
).split()


def rates(optimizer, phase: score.Phase):
    """Return a schedule with the learning rates that score.py gives a phase."""

    def share(step):
        rate = phase.lr + (phase.final - phase.lr) * step / phase.steps
        return rate * min(1.0, (step + 1) / (phase.warmup + 1)) / phase.lr

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def trainer_of(phase: score.Phase, args, c, task):
    """Return the trainer of a stage: its problems in their order, drawn as score.py draws them."""
    rng = np.random.default_rng((c.seed, *phase.name.encode()))
    drawn = [x for _ in range(phase.steps) for x in task.draw(c.batch // c.group, "train", rng)]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows = c.batch // processes  # of this process, in parts
    each = min(c.micro_batch or rows, rows)
    if c.batch % (c.group * processes) or rows % each:
        raise ValueError(f"--batch {c.batch} must be a multiple of --group times {processes} "
                         f"processes, and what each has of --micro-batch {each}")  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(args.model) / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(task.end_id)
    folder, stage = args.out / phase.name, phase.step.keywords["stage"]
    return trl_port.make_trainer(
        args.model, task, drawn, c, stage, phase.steps, folder, tokenizer=tokenizer,
        per_device_train_batch_size=each, gradient_accumulation_steps=rows // each,
        learning_rate=phase.lr, seed=int(rng.integers(2**31)), shuffle_dataset=False,
        disable_dropout=True, gradient_checkpointing=bool(c.recompute), logging_steps=1,
        save_strategy="steps", save_steps=c.save_every, save_total_limit=2,
        use_vllm=args.vllm, vllm_mode="colocate",
        vllm_importance_sampling_correction=False,  # SCoRe's loss has no ratio
        generation_kwargs={"stop_token_ids": [task.end_id]} if args.vllm else None,
    )  # fmt: skip


def finish(phase: score.Phase, start: Path, args, c, task) -> Path:
    """Train a stage from the weights in a folder, or what is left of it; return where its own lie.
    The frozen base is `args.model` in both stages."""
    final = args.out / phase.name / "final"
    if (final / "training_args.bin").exists():  # which TRL writes last
        return final
    trainer, at = trainer_of(phase, args, c, task), 0
    for path in final.parent.glob("checkpoint-*/trainer_state.json"):  # written last, too
        at = max(at, json.loads(path.read_text())["global_step"])
    last = final.parent / f"checkpoint-{at}" if at else None
    begun = AutoModelForCausalLM.from_pretrained(start if at < phase.steps else last)
    trainer.model.load_state_dict(begun.state_dict())
    if at < phase.steps:
        trainer.lr_scheduler = rates(trainer.create_optimizer(), phase)
        trainer.train(resume_from_checkpoint=last and str(last))
    trainer.save_model(str(final))
    trainer.accelerator.wait_for_everyone()
    return final


def report(folders: dict[str, Path], c, task) -> dict:
    """Return both attempts' metrics, greedy, of the weights in each folder."""
    drawn, found = task.draw(c.eval_n, "test", np.random.default_rng(0)), {}
    for name, folder in folders.items():
        model = pretrained.load(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        found[name] = evaluation.evaluate(model, task, drawn, 0.0, c.sample_batch or len(drawn))
        del found[name]["rows"]
    return found


def settings(argv: list[str]):
    """Return the command's own options, and the run's settings, which are kept in its folder: what
    is begun goes on with the same alone."""
    parser = options.parser("SCoRe in TRL, on an open checkpoint.", OPTIONS)
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM, in each process")
    args = parser.parse_args(argv)
    c = options.settings(args, OPTIONS)
    if not c.stage1_steps + c.stage2_steps or not c.lr:
        raise ValueError("--lr and --stage1-steps plus --stage2-steps must be more than 0")
    path, text = args.out / "config.json", json.dumps(asdict(c), indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{args.out} holds a run of other settings: name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return args, c


def main(argv: list[str]) -> int:
    """Train both stages, evaluate them and the base, and print the table; return the status."""
    try:
        args, c = settings(argv)
        task, folders = problems.task(c), {"base": Path(args.model)}
        for phase in score.schedule(c)[1:]:
            folders[phase.name] = finish(phase, [*folders.values()][-1], args, c, task)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"trl_score: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", 0)) == 0:
        found = report(folders, c, task)
        (args.out / "report.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"\n{c.eval_n:,} problems of {args.test}, greedy\n\n{evaluation.table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
