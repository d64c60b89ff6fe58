"""How does a small model run fast on a CPU? Threads have rows of their own; operations are few.

torch's own threads share every operation, and wait for each other at its end, hundreds of times a
step. A toy gains little by that, and where another program takes one of the cores now and then, it
loses much. Here rows are parted, and threads take the parts as they come. They meet after each
pass, forward or back; in sampling two meet after each token. The parts and the order in which their
gradients are added do not depend on the number of threads: nor does any figure, to the last bit.

Each part goes through model.py's network in fewer operations. The first layer's queries, keys and
values depend on the token alone: they are made for the vocabulary. After the last attention only
tokens go on whose logits are asked for. A new token in rows of one length needs no mask.

    python score.py --threads 2 --run runs/two-threads

Dimension key: as in model.py; N tokens of all rows, W wanted.
"""

import ctypes
import functools
import gc
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from model import GPT, rotate

ROWS, SMALL = 128, 2**24  # of a part; weights, measured up to here (tests/bench/README.md)


@functools.cache
def pool(n: int) -> ThreadPoolExecutor:
    """Return n threads, in each of which torch computes alone."""
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=pool.cache_clear)  # a child has none of them


class Shared(torch.autograd.Function):
    """Logits [W, V] of parts of the rows. What they were computed from is kept as long as they."""

    @staticmethod
    def forward(ctx, model, parts, *weights):
        ctx.model, ctx.weights = model, weights
        ctx.logits = model.each(torch.enable_grad()(model.logits), *parts)
        return torch.cat([x.detach() for x in ctx.logits])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_WV):
        def back(logits, grad):
            return torch.autograd.grad(logits, ctx.weights, grad, retain_graph=True)

        grads = grad_WV.split([len(x) for x in ctx.logits])
        parts = ctx.model.each(back, ctx.logits, grads)
        return None, None, *map(sum, zip(*parts, strict=True))


class SmallGPT(GPT):
    """A GPT whose rows are parted among threads."""

    threads: int

    def each(self, work, *columns) -> list:
        """Return what `work` makes of each part."""
        alone = self.threads == 1 or len(columns[0]) == 1
        return [*(map if alone else pool(self.threads).map)(work, *columns)]

    def forward(self, ids_BT, cache=None, n_new_B=None, wanted_BT=...):
        whole = cache is not None or wanted_BT is ...
        if whole or ids_BT.shape[1] > self.config.max_positions:
            return super().forward(ids_BT, cache, n_new_B, wanted_BT)
        n, weights = max(1, len(ids_BT) // ROWS), [x for x in self.parameters() if x.requires_grad]
        parts = ids_BT.tensor_split(n), wanted_BT.tensor_split(n)
        if torch.is_grad_enabled():
            return Shared.apply(self, parts, *weights)
        return torch.cat(self.each(torch.no_grad()(self.logits), *parts))

    def logits(self, ids_BT, wanted_BT):
        return self.head(self.through(ids_BT, wanted_BT))

    def hidden(self, ids_BT, cache=None, n_new_B=None, wanted_BT=...):
        if cache is None or torch.is_grad_enabled():
            return super().hidden(ids_BT, cache, n_new_B, wanted_BT)
        B = len(ids_BT)

        def part(rows):  # slices, so that what it writes into its part of the cache is in the cache
            given = [x[rows] if torch.is_tensor(x) else x for x in (n_new_B, wanted_BT)]
            return self.read(ids_BT[rows], cache.take(rows), *given)

        halves = [slice(B // 2), slice(B // 2, B)] if B >= 2 * ROWS else [slice(B)]
        states = self.each(torch.no_grad()(part), halves)
        cache.reach += ids_BT.shape[1]
        return torch.cat(states)

    def read(self, ids_BT, cache, n_new_B, wanted_BT):
        """Do what `hidden` does, in fewer operations at the rows' begin and of one in even rows."""
        T, at = ids_BT.shape[1], cache.length_B[0].item()
        ragged = cache.reach and (T > 1 or (cache.length_B != at).any())
        if ragged or cache.reach + T > cache.k[0].shape[2]:
            return super().hidden(ids_BT, cache, n_new_B, wanted_BT)
        cache.length_B += T if n_new_B is None else n_new_B
        return self.through(ids_BT, wanted_BT, cache, at)

    def through(self, ids_BT, wanted_BT, cache=None, at=0):
        """Return the final states of the wanted tokens; the first ones stand at position `at`."""
        (B, T), c, embed, ids_N = ids_BT.shape, self.config, self.embed.weight, ids_BT.flatten()
        H, J, now = c.n_head, c.n_kv_head, slice(at, at + T)
        cos, sin, x_ND = self.cos[now, None], self.sin[now, None], F.embedding(ids_N, embed)
        for i, block in enumerate(self.blocks):
            table = i == 0 and len(ids_N) >= c.vocab_size
            qkv = block.attention.qkv(block.norm1(embed if table else x_ND))
            qkv = F.embedding(ids_N, qkv) if table else qkv
            qk, v = qkv.view(B, T, H + 2 * J, -1).split([H + J, J], dim=2)
            q, k = rotate(qk, cos, sin).transpose(1, 2).split([H, J], dim=1)
            v = v.transpose(1, 2)
            if cache is not None:
                cache.k[i][:, :, now], cache.v[i][:, :, now] = k, v
                k, v = cache.k[i][:, :, : at + T], cache.v[i][:, :, : at + T]
            if cache is None and T < 32 and H == J:  # small heads: sooner done, with their gradient
                later_TT = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
                y = (q * c.head_size**-0.5 @ k.transpose(2, 3) + later_TT).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=H != J)
            y_ND = y.transpose(1, 2).reshape(B * T, -1)
            if i == c.n_layer - 1 and wanted_BT is not ...:
                wanted_W = wanted_BT.flatten().nonzero()[:, 0]
                x_ND, y_ND = x_ND[wanted_W], y_ND[wanted_W]
            x_ND = torch.addmm(x_ND, y_ND, block.attention.out.weight.t())
            gate, up = block.mlp.gate_up(block.norm2(x_ND)).chunk(2, dim=-1)
            x_ND = torch.addmm(x_ND, F.silu(gate) * up, block.mlp.down.weight.t())
        return self.norm(x_ND if wanted_BT is not ... else x_ND.view(B, T, -1))


def keep_memory() -> None:
    """Let Linux's C library keep what is freed, and Python look for garbage in new things alone."""
    gc.freeze()
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, most in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**25)):
            libc.mallopt(name, most)  # to trim, to pad, to map


def share(run) -> None:
    """Let as many threads as torch has share the rows of a run's models, and let torch have one,
    here and in each, from now on. Large models, norms of queries, other devices, and steps that are
    taken in parts have torch's threads as before."""
    threads, size = torch.get_num_threads(), sum(x.numel() for x in run.policy.parameters())
    others = run.policy.config.qk_norm or hasattr(run.config, "micro_batch")
    if run.config.device == "cpu" and size < SMALL and not others:
        for model in (run.policy, run.base):
            model.threads, model.__class__ = threads, SmallGPT
        torch.set_num_threads(1)
        keep_memory()
