"""How do two cores share a small model? Each has half of the rows, through all layers and back.

torch's own threads share every operation, and wait for each other at its end, hundreds of times a
step. A toy gains little by that, and where another program takes one of the cores now and then, it
loses much. Here threads meet after each pass, forward or back. Gradients of the parts are added in
their order: rounded otherwise than one thread's, but the same to the bit whenever there are as many
threads. Sampling, which reads a token at a time, has one thread.

    python score.py --threads 2 --run runs/two-threads

Dimension key: as in model.py.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from model import GPT

ROWS = 128  # fewer are not worth a thread
SMALL = 2**24  # weights: sharing rows was measured up to here (tests/bench/README.md)


@functools.cache
def pool(n: int) -> ThreadPoolExecutor:
    """Return n threads, in each of which torch computes alone."""
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=pool.cache_clear)  # a child has none of them


class Shared(torch.autograd.Function):
    """Logits [B, T, V] of parts of the rows, each from a thread, and so are their gradients. What
    was computed on the way is kept for as long as the logits are."""

    @staticmethod
    def forward(ctx, logits_of, parts, *weights):
        ctx.weights = weights
        ctx.logits = [*pool(len(parts)).map(torch.enable_grad()(logits_of), parts)]
        return torch.cat([x.detach() for x in ctx.logits])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTV):
        def back(logits, grad):
            return torch.autograd.grad(logits, ctx.weights, grad, retain_graph=True)

        grads = grad_BTV.tensor_split(len(ctx.logits))
        parts = pool(len(grads)).map(back, ctx.logits, grads)
        return None, None, *map(sum, zip(*parts, strict=True))


class SharedGPT(GPT):
    """A GPT whose threads have a part of the rows each, unless it goes on in a cache."""

    threads: int

    def forward(self, ids_BT, cache=None, n_new_B=None):
        n = min(self.threads, len(ids_BT) // ROWS)
        alone = torch.is_autocast_enabled("cpu")  # which is a thread's own
        if n < 2 or cache is not None or alone:
            return super().forward(ids_BT, cache, n_new_B)
        parts, weights = ids_BT.tensor_split(n), [x for x in self.parameters() if x.requires_grad]
        if torch.is_grad_enabled() and weights:
            return Shared.apply(super().forward, parts, *weights)
        return torch.cat([*pool(n).map(torch.no_grad()(super().forward), parts)])


def share(run) -> None:
    """Let as many threads as torch has share the rows of a run's models, and let torch have one,
    here and in each, from now on. Large models, other devices, and steps that are taken in parts
    have torch's threads as before."""
    threads, size = torch.get_num_threads(), sum(x.numel() for x in run.policy.parameters())
    if run.config.device == "cpu" and size < SMALL and not hasattr(run.config, "micro_batch"):
        for model in (run.policy, run.base):
            model.threads, model.__class__ = threads, SharedGPT
        torch.set_num_threads(1)
