"""A stand-in for what verl's trainer needs a GPU for: the device, and vLLM's server.

verl loads it by VERL_USE_EXTERNAL_MODULES=verl_cpu, from this folder on PYTHONPATH. The device is
the CPU, under verl's own interface for devices. The server is a transformers model in an actor of
Ray, which takes over the weights that the trainer hands to a server and samples what an agent loop
asks for. All else is verl's.
"""

import os
from functools import partial
from types import SimpleNamespace

import ray
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class Nothing(SimpleNamespace):
    """Does nothing, whatever of torch.cuda is called, and counts 0."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: 0


class Cpu(PlatformBase):
    device_name, vendor_name = "cpu", "none"
    device_module = Nothing(
        mem_get_info=lambda *_: (0, 1), get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state, get_device_name=lambda *_: "cpu",
    )  # fmt: skip

    def __getattribute__(self, name):
        given = dict(
            is_available=True, is_ipc_supported=False, device_count=1, ray_resource_name="GPU",
            communication_backend_name="gloo", visible_devices_envvar="CUDA_VISIBLE_DEVICES",
            ray_noset_envvars=[], get_device_capability=(None, None), current_device="cpu",
        )  # fmt: skip
        return (lambda *_: given[name]) if name in given else super().__getattribute__(name)


for method in PlatformBase.__abstractmethods__ - {"device_name", "vendor_name", "device_module"}:
    setattr(Cpu, method, lambda self, *_, **__: None)
Cpu.__abstractmethods__ = frozenset()
PlatformRegistry.register("cpu")(Cpu)
torch.Tensor.pin_memory = lambda self, *_: self  # there is nothing to pin it for
os.environ |= dict(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda")  # the engine for GPUs


from verl.utils import distributed  # noqa: E402  they ask for the device
from verl.workers.rollout import base, replica  # noqa: E402

join = distributed.initialize_global_process_group_ray
distributed.initialize_global_process_group_ray = partial(join, backend="gloo")  # "cpu" but once


@ray.remote
class Server:
    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        self.model, self.version = AutoModelForCausalLM.from_pretrained(folder).float(), 0

    def load(self, weights, version):
        self.version = version or 0
        self.model.load_state_dict({k: x.float() for k, x in weights.items()}, strict=False)

    @torch.no_grad()
    def generate(self, prompt_ids, sampling_params, **_):
        ids, logps, p = [], [], sampling_params
        while len(ids) < p["max_tokens"] and not {*ids} & {*p["stop_token_ids"]}:
            logits_V = self.model(torch.tensor([prompt_ids + ids])).logits[0, -1]
            logp_V = (logits_V / (p["temperature"] or 1e-6)).log_softmax(-1)
            ids.append(int(torch.multinomial(logp_V.exp(), 1)))
            logps.append(float(logp_V[ids[-1]]))
        version = dict(global_steps=self.version)
        return replica.TokenOutput(token_ids=ids, log_probs=logps, extra_fields=version)

    def nothing(self, *_, **__):
        pass

    wake_up = sleep = abort_all_requests = resume_generation = nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = nothing


class Replica(replica.RolloutReplica):
    async def launch_servers(self):
        made = Server.options(name="server", namespace="stand-in").remote(self.model_config.path)
        self.servers, self._server_handle, self._server_address = [made], made, "stand-in"


class Adapter(base.BaseRollout):
    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=0, **_):
        whole = {name: x.detach().float().cpu().clone() for name, x in weights}
        server = ray.get_actor("server", namespace="stand-in")
        ray.get(server.load.remote(whole, global_steps))


base._ROLLOUT_REGISTRY["stand_in", "async"] = "verl_cpu.Adapter"
replica.RolloutReplicaRegistry.register("stand_in", lambda: Replica)
