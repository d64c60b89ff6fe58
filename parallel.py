"""How do several processes take one step? Each has a part of the rows and a part of the weights.

`torchrun` starts the processes; without it there is one, and all here is the identity. A process
takes its share of every batch, whole groups; sums over rows are sums over processes; weights,
gradients and the optimiser's moments are split by torch's FSDP2, and a checkpoint is a folder that
each process writes its part of. Sampling is done on the whole weights, gathered once a step, as
processes end their attempts at different times. All processes draw the same random numbers, so a
run does, but for the rounding of sums, the same on any number of processes, and can be continued
on any. What stops torchrun gives a step --shutdown-timeout seconds, 30 by default, to end and save.

    torchrun --nproc-per-node 2 -- score.py --run runs/two
    python -c "import parallel; print(parallel.processes())"
"""

import contextlib
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from model import GPT

# --- processes ------------------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """Return (i, n): this is process i of n, counted from 0; (0, 1) outside `together`."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def together() -> Iterator[int]:
    """Join the processes that torchrun has started, if it has; give this one's number.

    Only process 0 writes to the standard output; what is `cuda` is the process's own device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    cuda = torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % cuda)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def complain(text: str) -> None:
    """Write a line to the standard error, once, however many processes have it to say."""
    i, n = processes()
    if n > 1:
        try:
            store = dist.distributed_c10d._get_default_store()
            said = store.add(text, 1) > 1
            for _ in range(20 if i == 0 else 0):  # it may keep the store: the others come first
                if store.add(text, 0) < n:
                    time.sleep(0.1)
        except dist.DistError:  # the process that kept the store has left, and said why
            said = True
        if said:
            return
    print(text, file=sys.stderr)


def first(do: Callable, *words) -> None:
    """Let process 0 do something, with files; all wait for it, and fail if it does.

    Raises:
      ValueError, OSError: whatever process 0 raised.
    """
    i, n = processes()
    if n == 1:
        do(*words)
        return
    failed = [None]
    if i == 0:
        try:
            do(*words)
        except (ValueError, OSError) as error:
            failed = [error]
    dist.broadcast_object_list(failed, device=torch.device("cpu"))
    if failed[0] is not None:
        raise failed[0]


# --- rows, and sums over them ---------------------------------------------------------------------


def share(rows: Sequence, size: int = 0) -> list:
    """Return this process's equal part of each `size` rows of all processes together; 0: of all."""
    i, n = processes()
    size = size or len(rows)
    each = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [row for part in each for row in part[len(part) * i // n : len(part) * (i + 1) // n]]


def total(x):
    """Return the sum of a number, or a tensor of one shape, over processes."""
    return reduced(x, "SUM")


def count(mask: torch.Tensor) -> int:
    """Return how many elements of a boolean tensor are true, in all processes."""
    return total(int(mask.sum()))


def largest(x):
    """Return the largest of a number over processes."""
    return reduced(x, "MAX")


def reduced(x, operation: str):
    """Return a number or a tensor, reduced over processes in float64, int64 or a tensor's dtype."""
    if processes()[1] == 1:
        return x
    if isinstance(x, torch.Tensor):
        held = x.clone()
    else:
        held = torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else torch.int64)
    dist.all_reduce(held, getattr(dist.ReduceOp, operation))
    return held if isinstance(x, torch.Tensor) else held.item()


def mean(x: torch.Tensor) -> float:
    """Return the mean of the values that all processes have; some may have none."""
    if processes()[1] == 1:
        return x.mean().item()
    return (total(x.sum()) / total(x.numel())).item()


def empty_passes(n: int, policy: GPT, base: GPT | None = None) -> None:
    """Take n passes over nothing, as many as other processes have rows for and this one has not:
    they gather weights, and sum gradients, in all processes at once."""
    for _ in range(n):
        ids_BT = torch.zeros(1, 1, dtype=torch.long, device=policy.cos.device)
        if base is not None:
            with torch.no_grad():
                base.hidden(ids_BT)
        (0 * policy.head(policy.hidden(ids_BT)).sum()).backward()


# --- weights --------------------------------------------------------------------------------------


def shard(model: GPT, device: torch.device) -> GPT:
    """Return the model on a device, each process with its part of every weight.

    Gradients are summed over processes. Embedding, last norm and head stay whole from `hidden` to
    the end of the backward pass, since the head is used, in chunks, after `hidden` has returned.
    """
    n = processes()[1]
    if n == 1:
        return model.to(device)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.type, (n,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    return model


@torch.no_grad()
def whole(model: GPT) -> GPT:
    """Return a model with the whole weights of a sharded one, gathered; or a whole one itself."""
    if not hasattr(model, "reshard"):
        return model
    model.reshard()
    weights = {name: weight.full_tensor() for name, weight in model.named_parameters()}
    with torch.device("meta"):  # no weights of its own
        gathered = GPT(model.config)
    if model.config.tied_head:
        weights["head.weight"] = weights["embed.weight"]
    gathered.load_state_dict(weights, assign=True)
    if model.config.tied_head:
        gathered.head.weight = gathered.embed.weight
    for name in ("cos", "sin", "recompute"):
        setattr(gathered, name, getattr(model, name))
    return gathered


def whole_tensor(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which each process has a part, gathered; or a whole one itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def parts_of(weights: dict, model: GPT) -> dict:
    """Return this process's parts of whole weights by name, if it has parts of the model's."""
    own = model.state_dict()
    return {name: like(x, own[name]) for name, x in weights.items()}


def like(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return this process's part of x, a whole tensor, if it has a part of a weight of that shape;
    else x."""
    if not hasattr(weight, "full_tensor") or x.shape != weight.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements
    return distribute_tensor(x.to(weight.device), mesh, placements, src_data_rank=None)


# --- checkpoints ----------------------------------------------------------------------------------

NEW, NOW, OLD = "checkpoint.part", "checkpoint", "checkpoint.old"  # whole: NOW; if it is not, OLD


def save(content: dict, path: Path) -> None:
    """Write a file of tensors under a temporary name, then rename it: never half a checkpoint."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # how torch says that the disk is full
        raise OSError(f"{part} cannot be written: {str(error).splitlines()[0]}") from None
    os.replace(part, path)


def save_parts(content: dict, folder: Path) -> None:
    """Write a run's checkpoint as a folder of parts, one of each process; then remove the last one.

    It is written under another name and renamed when it is whole, so that there always is a whole
    one. content: policy and best (weights by name, or None), optimizer, and all else to be kept.
    """
    import torch.distributed.checkpoint as dcp

    rest = dict(content)
    tensors = dict(policy=rest.pop("policy"), optimizer=rest.pop("optimizer")["state"])
    if rest["best"] is not None:
        tensors["best"] = rest["best"]
    rest |= dict(best=rest["best"] is not None, moments=len(tensors["optimizer"]) > 0)
    first(shutil.rmtree, folder / NEW, True)
    try:
        dcp.save(tensors, checkpoint_id=folder / NEW)
    except (
        dcp.CheckpointException
    ) as error:  # raised in all processes, and by no means an Exception
        raise OSError(f"{folder / NEW} cannot be written: {error.failures}") from None
    first(replace, folder, rest)


def replace(folder: Path, rest: dict) -> None:
    """Complete the new folder of parts, and let it take the place of the last checkpoint."""
    save(rest, folder / NEW / "rest.pt")
    if (folder / NOW).exists():
        shutil.rmtree(folder / OLD, ignore_errors=True)
        os.rename(folder / NOW, folder / OLD)
    os.rename(folder / NEW, folder / NOW)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    shutil.rmtree(folder / OLD, ignore_errors=True)


def discard_parts(folder: Path) -> None:
    """Remove folders of parts, which a checkpoint in one file has replaced."""
    for name in (NEW, OLD, NOW):
        shutil.rmtree(folder / name, ignore_errors=True)


def has_parts(folder: Path) -> bool:
    """Return whether a run's last checkpoint is a folder of parts."""
    in_one = (folder / "checkpoint.pt").exists()
    return not in_one and any((folder / name).exists() for name in (NOW, OLD))


def load_parts(folder: Path, policy: GPT, optimizer: torch.optim.Optimizer) -> dict:
    """Return what `save_parts` was given, however many processes wrote it and read it.

    Raises:
      ValueError: it is damaged or of another model.
    """
    import torch.distributed.checkpoint as dcp

    place, zeros = folder / (NOW if (folder / NOW).exists() else OLD), torch.zeros_like
    try:
        dcp.FileSystemReader(place).read_metadata()  # if it is damaged, `load` says so at length
        content = torch.load(place / "rest.pt", weights_only=True)
        weights = {name: zeros(x) for name, x in policy.state_dict().items()}
        tensors = dict(policy=weights, optimizer={})
        if content.pop("moments"):
            for i, w in enumerate(policy.parameters()):
                moments = dict(step=torch.zeros(()), exp_avg=zeros(w), exp_avg_sq=zeros(w))
                tensors["optimizer"][i] = moments
        if content.pop("best"):
            tensors["best"] = {name: zeros(x).cpu() for name, x in weights.items()}
        with warnings.catch_warnings():  # that one process reads: it is meant
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=place)
    except (
        Exception,
        dcp.CheckpointException,
    ) as error:  # a dozen kinds, depending on which bytes are damaged
        raise ValueError(f"{place} is not a readable checkpoint ({type(error).__name__})") from None
    tensors["optimizer"] = optimizer.state_dict() | {"state": tensors["optimizer"]}
    return {"best": None} | content | tensors


def spread(content: dict, policy: GPT) -> dict:
    """Return the checkpoint of one process with each process's part of its tensors."""
    ordered = list(policy.parameters())
    for kind in ("policy", "best"):
        if content[kind] is not None:
            content[kind] = parts_of(content[kind], policy)
    for i, moments in content["optimizer"]["state"].items():
        for name, x in moments.items():
            moments[name] = like(x, ordered[i])
    return content
