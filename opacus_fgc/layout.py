"""How a model and its batches lie over processes: the one place that knows data parallel, FSDP2 and tensor parallel apart.

The processes are a mesh. Along some of its axes the ranks have different samples (*data* axes: data parallel, FSDP), along
others parts of the computation for the same samples (tensor parallel). A parameter is cut along an axis, or copied. From that
follow the answers to the two questions that differ: how squared norms add up over ranks, and how clipped sums and noise come
together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.layers.dp_rnn import DPRNNBase
from opacus.utils.module_utils import trainable_parameters
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from opacus_fgc.checks import describe

BUCKET = 2**23
"""Elements of parameters that are copied along an axis are summed in buckets of so many, 32 MiB in float32."""

AddNoise = Callable[[Tensor], Tensor]
"""Values plus noise; called on every value once, on one rank."""


# Torch has renamed it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Axis(NamedTuple):
    """One axis of the mesh of processes.

    Attributes:
        group: the processes along it.
        data: whether they have different samples.
    """

    group: Any
    data: bool

    @property
    def size(self) -> int:
        """How many processes it has."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank(self.group)

    def gathered(self, value: Tensor) -> Tensor:
        """A value of all ranks, stacked along a first axis."""
        values = value.new_empty(self.size, *value.shape)
        dist.all_gather(list(values.unbind()), value.contiguous(), group=self.group)
        return values


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Layout:
    """The layout of a model, and all communication of a private step beyond that of the model's own forward and backward.

    Args:
        model: a model in one process; under Opacus' ``DifferentiallyPrivateDistributedDataParallel``, `fully_shard`, and
            `parallelize_module`, the latter also in `fully_shard`.

    Attributes:
        axes: the axes of the mesh, data axes first; none in one process.

    Raises:
        NotImplementedError: if a model is laid out in a way that is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fsdp = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._fsdp:
            # A forward without a backward, as of an evaluation, leaves the outermost one's parameters whole.
            module.reshard()
        self._names = {param: name for name, param in trainable_parameters(model)}
        self._params = list(self._names)
        _refuse_other_wrappers(model)
        data = self._data_groups(model)
        # A mesh that FSDP and tensor parallel share has FSDP's axes first.
        others = [group for param in self._params for group in _groups(param)[len(data) :]]
        self.axes = (*(Axis(group, data=True) for group in data), *(Axis(group, data=False) for group in others[:1]))
        several = len({tuple(dist.get_process_group_ranks(group)) for group in others}) > 1
        if several or any(len(_groups(param)) > len(data) + 1 for param in self._params):
            raise NotImplementedError(
                "tensor parallel over several meshes, or over one with several axes; use one mesh with one axis for it"
            )

    def _data_groups(self, model: nn.Module) -> list[Any]:
        if any(isinstance(module, DifferentiallyPrivateDistributedDataParallel) for module in model.modules()):
            for name, param in model.named_parameters():
                if isinstance(param, DTensor):
                    raise NotImplementedError(
                        f"{name} is a DTensor in a DifferentiallyPrivateDistributedDataParallel, which can only copy whole "
                        "parameters; use fully_shard over a mesh with an axis for data (and one for tensor parallel)"
                    )
            return [dist.group.WORLD]
        if not self._fsdp:
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
        meshes = {group.mesh_info.mesh for module in self._fsdp for group in _param_groups(module)}
        if len(meshes) > 1:
            raise NotImplementedError("the model's layers are sharded over several meshes; use one for all")
        (self._mesh,) = meshes
        return self._mesh.get_all_groups()

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
        return bool(self._fsdp) or any(not axis.data for axis in self.axes)

    # Norms

    def whole_norms(self, norms: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The norms of whole parameters' gradients, from those of what this rank has of them.

        Squares add up along axes that have the same samples and cut the parameter. Where they copy it, the first rank's norm
        counts, so that all go by the same bits.

        Args:
            norms: by parameter, shape ``(N,)`` each.

        Raises:
            ValueError: if the norms of a copied parameter's gradients differ between the copies.
        """
        result = dict(norms)
        for place, axis in enumerate(self.axes):
            if axis.data:
                continue
            every = axis.gathered(torch.stack([result[param] for param in self._params]))
            for param, norms_of_param in zip(self._params, every.unbind(1), strict=True):
                if _is_cut(param, place):
                    result[param] = torch.linalg.vector_norm(norms_of_param, dim=0)
                    continue
                result[param] = norms_of_param[0]
                if not torch.allclose(norms_of_param, result[param].expand_as(norms_of_param), 1e-2, equal_nan=True):
                    raise ValueError(
                        f"{self._names[param]} has gradients of other norms on other ranks of its tensor-parallel group, though "
                        "it is copied: each rank seems to use it on a part of a sample (by sequence parallel). Put its layer "
                        "into the plan for parallelize_module, so that its inputs are distributed tensors"
                    )
        return result

    def check_samples(self, losses: Tensor) -> None:
        """Raises a ValueError unless ranks that work on the same samples have the same ones.

        Args:
            losses: one loss a sample, shape ``(N,)``.
        """
        for axis in self.axes:
            if axis.data:
                continue
            sizes = axis.gathered(torch.tensor([len(losses)], device=losses.device))
            same = bool((sizes == len(losses)).all())
            if same:
                every = axis.gathered(losses.detach())
                same = torch.allclose(every, every[:1].expand_as(every), rtol=1e-2, atol=1e-3, equal_nan=True)
            if not same:
                raise ValueError(
                    "ranks of one tensor-parallel group have different losses, so that their parts of a gradient would be of "
                    "different samples. Give them the same batches (make_private does so under Poisson sampling) and the same "
                    "random numbers in augmentation and dropout (torch.manual_seed)"
                )

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The most of each number over the ranks that have to run as many forwards as each other."""
        if not self.forward_communicates:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64, device=self._params[0].device)
        for axis in self.axes:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=axis.group)
        return values.tolist()

    def least(self, number: int) -> int:
        """The least of a number, likewise."""
        return -self.most([-number])[0]

    # Clipped sums

    def of_any(self, params: Sequence[Any]) -> list[Any]:
        """Those parameters that are among the ``params`` of this rank, or of one that has to run as many backward passes."""
        among = set(params)
        flags = self.most([param in among for param in self._params])
        return [param for param, flag in zip(self._params, flags, strict=True) if flag]

    def as_parameter(self, param: Any, total: Tensor | None) -> Tensor | None:
        """What belongs into ``summed_grad`` of a parameter: under FSDP summed over ranks, and cut as the parameter is.

        Args:
            param: the parameter.
            total: the clipped sum over this rank's samples, of the shape that a layer sees of the parameter; None for 0.
        """
        if not self._fsdp:
            return None if total is None else _like(param, total)
        cut: list[Any] = []
        shape = list(param.shape)
        for place, (group, placement) in enumerate(zip(_groups(param), param.placements, strict=True)):
            dim = getattr(placement, "dim", None)
            if place < self._mesh.ndim:
                # FSDP cuts what tensor parallel leaves, whatever the placement says of the order.
                cut.append(Replicate() if dim is None else Shard(dim))
            elif dim is not None:
                shape[dim] = len(cut_rows(shape[dim], Axis(group, data=False)))
        if total is None:
            # All ranks have to take part.
            total = torch.zeros(shape, dtype=param.dtype, device=param.device)
        whole = DTensor.from_local(total, self._mesh, [Partial()] * len(cut), run_check=False)
        # The last axis first, which cuts: so the axis before it, that of copies, sums one shard and not all of it.
        for place in reversed(range(len(cut))):
            whole = whole.redistribute(self._mesh, [Partial()] * place + cut[place:])
        return _like(param, whole.to_local())

    def second_pass(self, loss: Tensor, params: Sequence[Any], seen: Callable[[Any], Tensor]) -> list[Tensor | None]:
        """The gradients of a weighted loss by some parameters, as they belong into ``summed_grad``; None for 0.

        Args:
            loss: a scalar.
            params: the parameters.
            seen: gives the tensor that layers see in the place of a parameter.
        """
        if not self._fsdp:
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
            return [
                gradient.redistribute(param.device_mesh, param.placements)
                if isinstance(gradient, DTensor)
                else gradient
                for param, gradient in zip(params, gradients, strict=True)
            ]
        # FSDP's own reduction, layer by layer, ends in `grad`; it takes the mean over ranks.
        before = [param.grad for param in params]
        for param in params:
            param.grad = None
        try:
            torch.autograd.backward(loss, inputs=[seen(param) for param in params])
            scales = {id(group): self._divided_by(group) for module in self._fsdp for group in _param_groups(module)}
            if len(set(scales.values())) != 1:
                raise NotImplementedError("FSDP modules with different gradient divide factors are not supported")
            scale = next(iter(scales.values()))
            missing = [param for param in params if param.grad is None]
            if missing:
                raise RuntimeError(
                    f"FSDP brought no gradient for {len(missing)} parameters, of shapes "
                    f"{', '.join(str(tuple(param.shape)) for param in missing[:5])}; leave set_requires_gradient_sync on, "
                    "and use all parameters on every rank"
                )
            return [param.grad * scale for param in params]
        finally:
            for param, gradient in zip(params, before, strict=True):
                param.grad = gradient

    def _divided_by(self, group: Any) -> float:
        if getattr(group, "reduce_scatter_reduce_op", None) is not None:
            raise NotImplementedError(
                "set_reduce_scatter_divide_factor is not supported; leave FSDP's mean over ranks as it is"
            )
        return float(getattr(group, "gradient_divide_factor", None) or self.data_ranks)

    # Noise

    def released(self, params: Sequence[Any], add_noise: AddNoise) -> Iterator[tuple[Any, Tensor]]:
        """What a step may use: the clipped sums over all ranks plus noise, each parameter's once.

        What is copied along an axis is summed into shares, one a rank; each rank adds the noise to its share; and all get all of
        it. While a bucket is on its way, the noise of the one before is drawn.

        Args:
            params: parameters with a ``summed_grad``.
            add_noise: values plus noise.

        Yields:
            A parameter, and its gradient.
        """
        copied: dict[Any, list[Any]] = {}
        for param in params:
            axes = self._copies(param)
            if axes:
                copied.setdefault((axes, local(param).dtype, local(param).device), []).append(param)
            else:
                yield param, _like(param, add_noise(_summed(param)))
        for (axes, _, _), several in copied.items():
            arriving: tuple[list[Any], Share] | None = None
            for bucket in _buckets(several):
                before, arriving = (
                    arriving,
                    (bucket, Share(torch.cat([_summed(param).flatten() for param in bucket]), axes)),
                )
                if before is not None:
                    yield from _split(before[1].noisy(add_noise), before[0])
            if arriving is not None:
                yield from _split(arriving[1].noisy(add_noise), arriving[0])

    def noisy_total(self, value: Tensor, add_noise: AddNoise) -> Tensor:
        """The total of a number over all samples, plus noise, the same on all ranks.

        Args:
            value: its total over this rank's samples, a scalar.
            add_noise: values plus noise.
        """
        if not self.axes:
            return add_noise(value)
        return Share(value.reshape(1), self.axes).noisy(add_noise)[0]

    def _copies(self, param: Any) -> tuple[Axis, ...]:
        """The axes along which a parameter is copied; as data axes those whose sum is still to be taken."""
        return tuple(
            # FSDP sums along both of its axes in every backward pass.
            axis._replace(data=axis.data and not self._fsdp)
            for place, axis in enumerate(self.axes)
            if not _is_cut(param, place)
        )

    def own_generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """A generator of noise that no other rank has, also where all ranks set one seed: noise that is used twice hides nothing.

        Args:
            generator: what it is seeded by; torch's default if None.
        """
        if not self.axes:
            return generator
        device = self._params[0].device
        source = generator.device if generator is not None else "cpu"
        drawn = torch.randint(2**62, (1,), generator=generator, device=source).item()
        digest = hashlib.sha256(f"noise {drawn} of rank {dist.get_rank()}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    # Agreement

    def check_agreement(self, values: Mapping[str, float]) -> None:
        """Raises a ValueError unless all ranks go by the same numbers.

        Args:
            values: what to compare, by what to call it.
        """
        own = torch.tensor(list(values.values()), dtype=torch.float64, device=self._params[0].device)
        for axis in self.axes:
            for name, numbers in zip(values, axis.gathered(own).T.tolist(), strict=True):
                if len(set(numbers)) > 1:
                    raise ValueError(
                        f"ranks disagree about {name}: {', '.join(f'{number:g}' for number in numbers)}. Every rank has to take "
                        "the same steps, with the same arguments"
                    )

    def common(self, secret: bytes) -> bytes:
        """The first rank's bytes, on all ranks."""
        value = torch.tensor(list(secret), dtype=torch.uint8, device=self._params[0].device)
        for axis in self.axes:
            dist.broadcast(value, dist.get_global_rank(axis.group, 0), group=axis.group)
        return bytes(value.tolist())


class Share:
    """This rank's share of a flat sum over some axes, on its way.

    Args:
        flat: what this rank has of it, shape ``(n,)``.
        axes: those over which it is summed, where they are data axes; along the others all have the same.
    """

    def __init__(self, flat: Tensor, axes: Sequence[Axis]) -> None:
        self._axes = axes
        self._lengths: list[int] = []
        self._work: Any = None
        for axis in axes:
            self._wait()
            self._lengths.append(len(flat))
            padded = nn.functional.pad(flat, (0, -len(flat) % axis.size))
            if axis.data:
                flat = padded.new_empty(len(padded) // axis.size)
                self._work = _reduce_scatter(flat, padded, group=axis.group, async_op=True)
            else:
                flat = padded.chunk(axis.size)[axis.rank]
        self._flat = flat

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def noisy(self, add_noise: AddNoise) -> Tensor:
        """The whole sum plus noise, shape ``(n,)``, the same bits on all ranks."""
        self._wait()
        flat = add_noise(self._flat)
        for axis, length in zip(reversed(self._axes), reversed(self._lengths), strict=True):
            flat = axis.gathered(flat).flatten()[:length]
        return flat


def _summed(param: Any) -> Tensor:
    return local(param.summed_grad)


def _split(flat: Tensor, params: Sequence[Any]) -> Iterator[tuple[Any, Tensor]]:
    parts = flat.split([local(param).numel() for param in params])
    for param, part in zip(params, parts, strict=True):
        yield param, _like(param, part.view(local(param).shape))


def _buckets(params: Sequence[Any]) -> Iterator[list[Any]]:
    bucket: list[Any] = []
    size = 0
    for param in params:
        elements = local(param).numel()
        if bucket and size + elements > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += elements
    yield bucket


def _like(param: Any, values: Tensor) -> Tensor:
    """What this rank has of a tensor, as a tensor that is cut as the parameter is."""
    if not isinstance(param, DTensor):
        return values
    return DTensor.from_local(
        values, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def cut_as(param: Any, whole: Tensor) -> Tensor:
    """A tensor that is cut over ranks as a parameter is.

    Args:
        param: the parameter; nothing is cut unless it is a DTensor.
        whole: a tensor of the same shape, the same on all ranks.
    """
    if not isinstance(param, DTensor):
        return whole
    part = whole.to(param.device)
    # Tensor parallel has the last axis and cuts first; FSDP cuts what is left.
    for group, placement in reversed(list(zip(_groups(param), param.placements, strict=True))):
        if not placement.is_replicate():
            rows = cut_rows(part.shape[placement.dim], Axis(group, data=False))
            part = part.narrow(placement.dim, rows.start, len(rows))
    return _like(param, part.contiguous())


def _groups(param: Any) -> list[Any]:
    return param.device_mesh.get_all_groups() if isinstance(param, DTensor) else []


def _is_cut(param: Any, axis: int) -> bool:
    placements = param.placements if isinstance(param, DTensor) else ()
    return axis < len(placements) and not placements[axis].is_replicate()


def cut_rows(size: int, axis: Axis) -> range:
    """Which of the rows of a tensor that is cut along an axis this rank has; as `torch.chunk` cuts."""
    chunk = -(-size // axis.size)
    return range(size)[axis.rank * chunk : (axis.rank + 1) * chunk]


def _param_groups(module: FSDPModule) -> list[Any]:
    # What FSDP2 has no public way to: its mesh, and by what it divides gradients.
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []


def _refuse_other_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel)):
            raise NotImplementedError(
                f"{type(module).__name__} reduces gradients before they are clipped and summed. Take the model out of it "
                "(model.module) and wrap that in opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or call "
                "torch.distributed.fsdp.fully_shard on it"
            )
