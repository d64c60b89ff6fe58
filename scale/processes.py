"""How do several processes take one step? Each has a part of the rows and a part of the weights.

`torchrun` starts the processes; without it there is one, and all here is the identity. All draw the
same problems and the noise of all rows; each writes and judges its own rows, and hands them round:
what is chosen, paid or logged is computed from all rows, and is the same everywhere. Of the
gradient each computes its rows' part. The policy's weights, gradients and moments are split by
torch's FSDP2; the frozen base is whole everywhere. A checkpoint is one file of whole tensors.

    torchrun --nproc-per-node 2 -m -- scale.train --run runs/two
    python -c "from scale import processes; print(processes.rank(), processes.my_rows(8))"
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import model
import score


def rank() -> int:
    """Return which process this is, counted from 0, the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has; "cuda" is then each one's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def my_rows(n: int) -> range:
    """Return which of n rows are this process's: an equal share, side by side."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_gather(x: list) -> list:
    """Return the lists of all processes as one, in order; tensors in them must be on the CPU."""
    lists = [x]
    if world_size() > 1:
        dist.all_gather_object(lists := [None] * world_size(), x)
    return [one for each in lists for one in each]


def on_main(do: Callable, *words):
    """Let the main process do something; return in all what it returns. If it fails, all end."""
    return all_gather([do(*words)] if rank() == 0 else [])[0]


def needs(policy, base, n: int, rows: int, tokens: int) -> dict[str, float]:
    """Return the GiB that each of n processes needs at least: its part of weights, gradient and two
    moments; the base; a copy of the policy, like it; their cache, or the float32 that it is of."""
    c, width = policy.config, base.head.weight.itemsize
    whole, kept = (sum(x.nbytes for x in gpt.parameters()) for gpt in (policy, base))
    cache = 2 * c.n_layer * c.n_kv_head * c.head_size * width * rows * tokens
    found = dict(part=4 * whole / n, base=kept, copy=kept, cache=max(cache, whole * (width < 4)))
    return {name: round(x / 2**30, 3) for name, x in found.items()}


def check_memory(run: score.Run) -> None:
    """Say what a process needs; ValueError if its GPU, or its share of the host, has less."""
    c, n, path = run.config, world_size(), Path("/proc/meminfo")
    rows, tokens = c.batch // n, 2 * run.task.max_new + len(run.task.instruction)
    found = needs(run.policy, run.base, n, min(getattr(c, "sample_batch", 0) or rows, rows), tokens)
    kib = path.read_text().split("MemAvailable:")[1].split()[0] if path.exists() else "inf"
    here = found["base"] + found["part"] * n / 4  # base and whole weights, which are counted in it
    free = here + float(kib) / 2**20 / int(os.environ.get("LOCAL_WORLD_SIZE", n))
    free = torch.cuda.mem_get_info()[0] / 2**30 if c.device == "cuda" else free
    free, total = min(all_gather([free])), sum(found.values())
    line = f"GiB that each of {n} processes needs: {found}, in all {total:.3f}; free: {free:.3f}"
    if total > free:
        raise ValueError(line)
    on_main(print, line)


def shard(run: score.Run) -> score.Run:
    """Return the run, of whose policy each process keeps a part, on its device.

    Gradients are summed over processes. Embedding, last norm and head stay whole from `hidden` to
    the end of the backward pass, since the head is used, in chunks, after `hidden` has returned.
    """
    if world_size() == 1:
        return run
    check_memory(run)
    mesh = dist.init_device_mesh(run.config.device, (world_size(),))
    for block in run.policy.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(run.policy, mesh=mesh, reshard_after_forward=False)
    for module in (*run.policy.blocks, run.policy):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(run.policy, "hidden")
    run.base.to(run.config.device).register_load_state_dict_pre_hook(
        lambda base, weights, *_: weights.update(gathered(dict(weights)))
    )
    parts, state = list(run.policy.parameters()), run.optimizer.state_dict()
    for i, moments in state["state"].items():
        moments |= {name: part(x, parts[i]) for name, x in moments.items()}
    run.optimizer = score.adamw(run.policy)
    run.optimizer.load_state_dict(state)
    return run


def part(x: torch.Tensor, weight: DTensor) -> torch.Tensor:
    """Return this process's part of x, a whole tensor, if it has the shape of a weight; else x."""
    if x.shape != weight.shape:
        return x
    mesh, placements = weight.device_mesh, weight.placements
    return distribute_tensor(x.to(weight.device), mesh, placements, src_data_rank=None)


def gathered(x, device: str | None = None):
    """Return a tensor of parts as a whole one, on a device (None: where the part is); of dicts and
    tuples all that are in them; anything else as it is."""
    if isinstance(x, DTensor):
        return x.full_tensor().to(device)
    if isinstance(x, dict):
        return {key: gathered(value, device) for key, value in x.items()}
    return tuple(gathered(value, device) for value in x) if isinstance(x, tuple) else x


def save(content: dict, path: Path) -> None:
    """Write what `model.save` does, gathered: from the main process, where alone it is whole."""
    on_main(model.save, gathered(content, "meta" if rank() else "cpu"), path)
