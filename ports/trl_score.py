"""SCoRe in TRL 1.16.0 on an open checkpoint and a file of problems: both stages, and a report.

trl_port.py has the trainer: two turns, and an advantage a token. Here are the stages one after the
other, with score.py's learning rates, TRL's checkpoints, and the table of eval.py. What is killed
goes on with the same command. Further options: those of `scale.train --preset math`; what is about
memory and files (--chunk, --dtype, --run ..) is TRL's own affair, and without effect.

    python ports/trl_score.py --model FOLDER --train train.jsonl --test test.jsonl --out runs/trl
    accelerate launch --num_processes 2 ports/trl_score.py --model FOLDER --train train.jsonl \\
        --test test.jsonl --out runs/trl
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as evaluation
import score
from ports import trl_port
from scale import pretrained, problems, train


def rates(optimizer, phase: score.Phase):
    """Return a schedule with the learning rates that score.py gives a phase."""

    def share(step):
        rate = phase.lr + (phase.final - phase.lr) * step / phase.steps
        return rate * min(1.0, (step + 1) / (phase.warmup + 1)) / phase.lr

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def finish(phase: score.Phase, start: Path, args, c, task) -> Path:
    """Train a stage from the weights in a folder, or what is left of it; return where its own lie.
    The frozen base is `args.model` in both stages."""
    folder = args.out / phase.name
    if (folder / "final/training_args.bin").exists():  # which TRL writes last
        return folder / "final"
    drawn = task.draw(len(problems.read_splits(c)["train"]), "train", np.random.default_rng(c.seed))
    rows = c.batch // int(os.environ.get("WORLD_SIZE", 1))  # of this process, in parts
    each = min(c.micro_batch or rows, rows)
    trainer = trl_port.make_trainer(
        args.model, task, drawn, c, phase.step, phase.steps, folder,
        per_device_train_batch_size=each, gradient_accumulation_steps=rows // each,
        learning_rate=phase.lr, seed=c.seed, logging_steps=1, save_strategy="steps",
        save_steps=c.save_every, use_vllm=args.vllm, vllm_mode="colocate",
        vllm_importance_sampling_correction=False,  # SCoRe's loss has no ratio
    )  # fmt: skip
    source, end = str(Path(args.model) / "tokenizer.json"), trainer.processing_class.eos_token_id
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=source)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    trainer.processing_class = tokenizer  # is saved beside the weights
    trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(start).state_dict())
    trainer.lr_scheduler = rates(trainer.create_optimizer(), phase)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    trainer.save_model(str(folder / "final"))
    return folder / "final"


def report(folders: dict[str, Path], c, task) -> dict:
    """Return both attempts' metrics, greedy, of the weights in each folder."""
    drawn, found = task.draw(c.eval_n, "test", np.random.default_rng(0)), {}
    for name, folder in folders.items():
        model = pretrained.load(folder).to(c.device)
        found[name] = evaluation.evaluate(model, task, drawn, 0.0, c.sample_batch)
        del found[name]["rows"]
    return found


def main(argv: list[str]) -> int:
    """Train both stages, evaluate them and the base, and print the table; return the status."""
    parser = argparse.ArgumentParser(description="SCoRe in TRL, on an open checkpoint.")
    for name, about in (("model", "folder of the base"), ("train", "file"), ("test", "file")):
        parser.add_argument(f"--{name}", required=True, help=about)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"), help="folder, new or begun")
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM, in each process")
    args, words = parser.parse_known_args(argv)
    files = ["--checkpoint", args.model, "--train", args.train, "--test", args.test]
    c = replace(train.parse(["--preset", "math", *words, *files])[1], task="math")
    task, folders = problems.task(c), {"base": Path(args.model)}
    parts = ("stage1", c.stage1_steps, score.stage1), ("score", c.stage2_steps, score.stage2)
    for phase in score.method(c, *parts):
        folders[phase.name] = finish(phase, [*folders.values()][-1], args, c, task)
    if int(os.environ.get("RANK", 0)) == 0:
        found = report(folders, c, task)
        (args.out / "report.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"\n{c.eval_n:,} problems of {args.test}, greedy\n\n{evaluation.table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
