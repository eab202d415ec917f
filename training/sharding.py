"""FSDP2: weights, gradients and moments of the towers in shards, one of each process.

The head and the towers' projections are small and stay whole in every process: a head's parameters are moved by more
than the optimizer (warm start, restarts, steps on SO(D)). Their gradients are averaged here, as DDP does.

Every forward pass of a sharded tower is a collective, so that all processes must make equally many.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from retriever import DualEncoder, Encoder, InputError, Precision

__all__ = [
    "ShardedDualEncoder",
    "average_replicated",
    "clip_norm",
    "sharding_wanted",
    "shards_like",
    "whole",
    "whole_moments",
]


def sharding_wanted(precision: Precision) -> bool:
    """Return whether accelerate's configuration, in the environment, asks for FSDP.

    Raises:
        InputError: If it asks for something that Endex does not do.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "DeepSpeed is not supported: its engine owns the optimizer's step, and keeps copies of the weights that a "
            "head's warm start and restarts would miss. Take --accelerate_config fsdp2, which shards the same."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    plugin = FullyShardedDataParallelPlugin()
    wrong = {
        f"fsdp_version is {plugin.fsdp_version}. Set 2.": plugin.fsdp_version != 2,
        "fsdp_activation_checkpointing is true. Set model.checkpoint_activations.": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading is true: only one process has weights. Set false.": (
            plugin.cpu_ram_efficient_loading
        ),
        "fsdp_offload_params is true, which is not supported. Set false.": isinstance(
            plugin.cpu_offload, CPUOffloadPolicy
        ),
    }
    for message in (message for message, holds in wrong.items() if holds):
        raise InputError(f"accelerate's {message}")
    if precision == "fp16":
        raise InputError("optimization.precision fp16 does not scale sharded gradients. Set bf16.")
    return True


class ShardedDualEncoder(nn.Module):
    """A model whose towers' layers are sharded, in place.

    Args:
        model: On its device, the same in every process.
        precision: fp32, or bf16, in which weights are then gathered; gradients are reduced in float32.
    """

    def __init__(self, model: DualEncoder, precision: Precision) -> None:
        super().__init__()
        self.model = model
        model.groups_lengths = False  # how many groups there are depends on a process's texts
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        reshard = FullyShardedDataParallelPlugin().reshard_after_forward
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshard}
        self._roots: list[FSDPModule] = []
        for tower in (model.query_encoder, model.document_encoder):
            if not isinstance(tower.backbone, FSDPModule):
                self._roots.append(_shard(tower, options))

    def forward(self, *inputs: Any) -> Any:
        """Return what the model does."""
        return self.model(*inputs)

    def set_requires_gradient_sync(self, value: bool) -> None:
        """Average gradients over the processes on the way back, or not yet."""
        for root in self._roots:
            root.set_requires_gradient_sync(value)


def _shard(tower: Encoder, options: dict[str, Any]) -> FSDPModule:
    for layer in tower.layers():
        fully_shard(layer, **options)
    return fully_shard(tower.backbone, **options)


def average_replicated(modules: Iterable[nn.Module]) -> None:
    """Average the gradients of parameters that are whole in every process; every process must have the same ones."""
    for parameter in (p for module in modules for p in module.parameters()):
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip the gradients of parameters, of which some are sharded, to a norm together; return the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    others = [g for g in gradients if not isinstance(g, DTensor)]
    squares = torch.stack([part.square().sum() for part in shards]).sum()
    dist.all_reduce(squares)
    norm = torch.stack([squares, *(part.square().sum() for part in others)]).sum().sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for part in (*shards, *others):
        part.mul_(factor)
    return norm


def whole(state: Mapping[str, Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
    """Return a state with its shards joined, on the CPU; tensors that towers share are one tensor still.

    All processes must call it together; others than the first get empty tensors, unless they are wanted `everywhere`.
    """
    joined: dict[int, Tensor] = {}
    found = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            storage = (
                value.to_local().untyped_storage()._cdata
            )  # an empty shard has no address, but a storage
            if storage not in joined:
                full = value.full_tensor()
                joined[storage] = full.cpu() if everywhere or dist.get_rank() == 0 else full.new_empty(0)
            value = joined[storage]
        found[name] = value
    return found


def whole_moments(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with its shards joined; see `whole`."""
    moments = {number: whole(values) for number, values in state["state"].items()}
    return {**state, "state": moments}


def shards_like(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole state with this process's shards in the place of tensors that are sharded in `targets`."""
    return {name: _shard_like(value, targets.get(name)) for name, value in state.items()}


def _shard_like(value: Tensor, target: Tensor | None) -> Tensor:
    if not isinstance(target, DTensor) or value.shape != target.shape:
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
