"""How a model and its batches lie over processes: the one place that knows data parallel, FSDP2 and tensor parallel apart.

The processes are a mesh. Along some of its axes the ranks have different samples (*data* axes: data parallel, FSDP), along
others parts of the computation for the same samples (tensor parallel). A parameter is sharded along an axis, or replicated.
From that follow the answers to the two questions that differ: how squared norms add up over ranks (`norms`), and how clipped
sums and noise come together (`clipped_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.layers.dp_rnn import DPRNNBase
from opacus.utils.module_utils import trainable_parameters
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opacus_fgc._compat.distributed import is_replicated
from opacus_fgc.argument_checks import describe
from opacus_fgc.distributed.fsdp import FSDP
from opacus_fgc.distributed.mesh import Axis, groups
from opacus_fgc.errors import PrivacyNotImplementedError


class Layout:
    """The layout of a model over processes.

    Args:
        model: a model in one process; under Opacus' ``DifferentiallyPrivateDistributedDataParallel``, `fully_shard`, and
            `parallelize_module`, the latter also in `fully_shard`.

    Attributes:
        axes: the axes of the mesh, data axes first; none in one process.
        fsdp: the model's FSDP2 modules.
        names: the names of trainable parameters.
        params: the trainable parameters.

    Raises:
        NotImplementedError: if a model is laid out in a way that is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fsdp = FSDP(model)
        self.fsdp.reshard()
        self.names = {param: name for name, param in trainable_parameters(model)}
        self.params = list(self.names)
        _refuse_other_wrappers(model)
        data = self._data_groups(model)
        # A mesh that FSDP and tensor parallel share has FSDP's axes first. Maybe only frozen parameters are sharded.
        every = [groups(param) for param in model.parameters()]
        others = [group for of_param in every for group in of_param[len(data) :]]
        self.axes = (*(Axis(group, data=True) for group in data), *(Axis(group, data=False) for group in others[:1]))
        several = len({tuple(dist.get_process_group_ranks(group)) for group in others}) > 1
        if several or any(len(of_param) > len(data) + 1 for of_param in every):
            raise NotImplementedError(
                "tensor parallel over several meshes, or over one with several axes; use one mesh with one axis for it"
            )
        if any(not hasattr(module, "set_force_sum_reduction_for_comms") for module in self.fsdp.over_gloo()):
            raise NotImplementedError("the FSDP2 of this torch does not average over gloo; take torch 2.8 or newer")

    def prepare(self) -> Layout:
        """Has FSDP divide sums itself over gloo, whose averages of torch 2.8 are sums, so that gradients would be too large."""
        for module in self.fsdp.over_gloo():
            module.set_force_sum_reduction_for_comms(True)
        return self

    @property
    def device(self) -> torch.device:
        """Where ranks compute, and what they tell each other is."""
        # FSDP may keep parameters elsewhere.
        return torch.device(self.fsdp.mesh.device_type) if self.fsdp else self.params[0].device

    def _data_groups(self, model: nn.Module) -> list[Any]:
        if any(isinstance(module, DifferentiallyPrivateDistributedDataParallel) for module in model.modules()):
            for name, param in model.named_parameters():
                if isinstance(param, DTensor):
                    raise NotImplementedError(
                        f"{name} is a DTensor in a DifferentiallyPrivateDistributedDataParallel, which can only copy whole "
                        "parameters; use fully_shard over a mesh with an axis for data (and one for tensor parallel)"
                    )
            return [dist.group.WORLD]
        if not self.fsdp:
            return []
        for name, module in model.named_modules():
            if isinstance(module, DPRNNBase):
                raise NotImplementedError(
                    f"{describe(name, module)} has each parameter under two names, and FSDP follows but one; use "
                    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel for it"
                )
        for name, param in trainable_parameters(model):
            if not isinstance(param, DTensor):
                raise NotImplementedError(
                    f"{name} is trainable and not sharded, though other parameters are, so nothing would bring its gradients "
                    "together; call fully_shard on the model itself after its layers, without ignored_params"
                )
        return self.fsdp.mesh.get_all_groups()

    @property
    def data_ranks(self) -> int:
        """How many shares a batch has."""
        return math.prod(axis.size for axis in self.axes if axis.data)

    @property
    def data_rank(self) -> int:
        """Which of them is this process' own."""
        rank = 0
        for axis in self.axes:
            rank = rank * axis.size + axis.rank if axis.data else rank
        return rank

    @property
    def forward_communicates(self) -> bool:
        """Whether ranks have to run as many forwards as each other."""
        return self.reshards or self.shares_samples

    @property
    def shares_samples(self) -> bool:
        """Whether some ranks work on the same samples."""
        return not all(axis.data for axis in self.axes)

    @property
    def reshards(self) -> bool:
        """Whether layers have their parameters only while they run, forward or backward."""
        return bool(self.fsdp)

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """The most of each number over the ranks that have to run as many forwards as each other."""
        if not self.forward_communicates:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        for axis in self.axes:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=axis.group)
        return values.tolist()

    def on_all_ranks(self, flag: bool) -> bool:
        """Whether something holds on all ranks, likewise."""
        return not self.all_reduce_max([not flag])[0]

    def of_any(self, params: Sequence[Any]) -> list[Any]:
        """Those parameters that are among the ``params`` of this rank, or of one that has to run as many backward passes."""
        if not params and not self.forward_communicates:
            return []
        among = set(params)
        flags = self.all_reduce_max([param in among for param in self.params])
        return [param for param, flag in zip(self.params, flags, strict=True) if flag]

    def common(self, secret: bytes) -> bytes:
        """The first rank's bytes, on all ranks."""
        value = torch.tensor(list(secret), dtype=torch.uint8, device=self.device)
        for axis in self.axes:
            dist.broadcast(value, dist.get_global_rank(axis.group, 0), group=axis.group)
        return bytes(value.tolist())


def _refuse_other_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        replicated = is_replicated(module)
        if replicated or isinstance(module, (DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel)):
            name = "replicate" if replicated else type(module).__name__
            raise PrivacyNotImplementedError(
                f"{name} reduces gradients before they are clipped and summed. Take the model out of it (model.module) "
                "and wrap that in opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or call "
                "torch.distributed.fsdp.fully_shard on it"
            )
