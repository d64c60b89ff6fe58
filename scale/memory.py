"""How does a large model fit, and run fast? It computes what it did, but for rounding.

`prepare` works on a model from outside: it gives the model's parts subclasses of their classes, so
that copies have them, too. model.py knows nothing of it.

- bfloat16: matrices are multiplied in bfloat16, by autocast, and what is kept of tokens read is
  bfloat16; weights, norms and sums stay float32. A frozen model keeps its matrices rounded, as
  autocast would at each use: it computes to the bit what the policy does, in half the memory.
- recompute: the backward pass computes a block again instead of keeping what it has computed.
- compile: torch.compile fuses what stands between the matrix products. Copies are to be prepared
  again.
- On a CPU, large float32 products without a gradient, those of decoding, are oneDNN's.

    python -c "import model; from scale import memory as m; help(m.prepare)"
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import GPT, Block

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LARGE = 2**17  # elements of a matrix from which on its reading, not the call, takes the time


class OneDNNLinear(nn.Linear):
    """Of few rows, oneDNN takes half as long as MKL, which torch would choose."""

    def forward(self, x):
        if torch.is_grad_enabled() or not x.is_cpu or torch.compiler.is_compiling():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class BFloat16Linear(nn.Linear):
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x)


class Float32Norm(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class BFloat16GPT(GPT):
    def hidden(self, ids_BT, cache=None, *others, **more):
        if cache is not None and cache.reach == 0:
            cache.k, cache.v = ([x.bfloat16() for x in layers] for layers in (cache.k, cache.v))
        with torch.autocast(ids_BT.device.type, torch.bfloat16):
            return super().hidden(ids_BT, cache, *others, **more)


class RecomputedBlock(Block):
    def forward(self, *args):
        if not torch.is_grad_enabled():
            return super().forward(*args)
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False)


def prepare(model: GPT, dtype=torch.float32, recompute=False, compile=False) -> GPT:
    """Return the model, of float32 weights on its device, made to compute in float32 or bfloat16.
    For `compile` on a CPU, torch looks for the C++ compiler that CXX names, or the usual one."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and dtype == torch.bfloat16:
            module.__class__ = Float32Norm
        if isinstance(module, nn.Linear):
            weight = module.weight
            if dtype == torch.bfloat16 and not weight.requires_grad:
                module.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
            elif dtype == torch.float32 and weight.is_cpu and ONEDNN and weight.numel() >= LARGE:
                module.__class__ = OneDNNLinear
    if dtype == torch.bfloat16:
        model.__class__, model.head.__class__ = BFloat16GPT, BFloat16Linear
    for block in model.blocks:
        if recompute:
            block.__class__ = RecomputedBlock
        if compile:
            block.compile(dynamic=True, recompile_limit=64)
    return model
