"""How a model and its batches lie over processes: the one place that knows data parallel, FSDP2 and tensor parallel apart.

The processes are a mesh. Along some of its axes the ranks have different samples (*data* axes: data parallel, FSDP), along
others parts of the computation for the same samples (tensor parallel). A parameter is cut along an axis, or copied. From that
follow the answers to the two questions that differ: how squared norms add up over ranks, and how clipped sums and noise come
together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.layers.dp_rnn import DPRNNBase
from opacus.utils.module_utils import trainable_parameters
from torch import Tensor, nn
from torch.distributed._composable.contract import _get_registry
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opacus_fgc.argument_checks import describe
from opacus_fgc.distributed.mesh import Axis, cut_rows, groups, is_cut, like, local
from opacus_fgc.distributed.reductions import AddNoise, NoisySum, ScatteredSum, buckets, one_ahead
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError
from opacus_fgc.per_sample.precision import widened
from opacus_fgc.taps.tap import tensors_in


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
        self._reshard()
        self._names = {param: name for name, param in trainable_parameters(model)}
        self._params = list(self._names)
        _refuse_other_wrappers(model)
        data = self._data_groups(model)
        # A mesh that FSDP and tensor parallel share has FSDP's axes first. Maybe only frozen parameters are cut.
        every = [groups(param) for param in model.parameters()]
        others = [group for of_param in every for group in of_param[len(data) :]]
        self.axes = (*(Axis(group, data=True) for group in data), *(Axis(group, data=False) for group in others[:1]))
        several = len({tuple(dist.get_process_group_ranks(group)) for group in others}) > 1
        if several or any(len(of_param) > len(data) + 1 for of_param in every):
            raise NotImplementedError(
                "tensor parallel over several meshes, or over one with several axes; use one mesh with one axis for it"
            )
        if any(not hasattr(module, "set_force_sum_reduction_for_comms") for module in self._over_gloo()):
            raise NotImplementedError("the FSDP2 of this torch does not average over gloo; take torch 2.8 or newer")

    def prepare(self) -> Layout:
        """Has FSDP divide sums itself over gloo, whose averages of torch 2.8 are sums, so that gradients would be too large."""
        for module in self._over_gloo():
            module.set_force_sum_reduction_for_comms(True)
        return self

    def _over_gloo(self) -> list[Any]:
        return [
            module
            for module in self._fsdp
            if any(group.mesh_info.mesh.device_type == "cpu" for group in _param_groups(module))
        ]

    def _reshard(self) -> None:
        """Gives up what FSDP leaves whole of the outermost module after a forward without a backward, as of an evaluation."""
        for module in self._fsdp:
            module.reshard()

    @property
    def _device(self) -> torch.device:
        """Where ranks compute, and what they tell each other is."""
        # FSDP may keep parameters elsewhere.
        return torch.device(self._mesh.device_type) if self._fsdp else self._params[0].device

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
        return self.reshards or self.shares_samples

    @property
    def shares_samples(self) -> bool:
        """Whether some ranks work on the same samples."""
        return not all(axis.data for axis in self.axes)

    @property
    def reshards(self) -> bool:
        """Whether layers have their parameters only while they run, forward or backward."""
        return bool(self._fsdp)

    # Norms

    def mark(self, params: Collection[Any], activations: Any) -> Tensor | None:
        """A norm and another number of what a layer is called on, for comparison with its copies; None if it has none.

        Args:
            params: the layer's.
            activations: what this rank has of those, any nesting of tensors.
        """
        places = [place for place, axis in enumerate(self.axes) if not axis.data]
        if not places or any(is_cut(param, place) for param in params for place in places):
            return None
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        for tensor in tensors_in(activations):
            flat = tensor.detach().flatten().float().nan_to_num(posinf=0.0, neginf=0.0)
            ramp = torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype, device=flat.device)
            total += torch.stack([torch.linalg.vector_norm(flat), flat @ ramp])
        return total

    def whole_norms(self, norms: Mapping[Any, Tensor], marks: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The norms of whole parameters' gradients, from those of what this rank has of them.

        Squares add up along axes that have the same samples and cut the parameter. Where they copy it, the first rank's norm
        counts, so that all go by the same bits.

        Args:
            norms: by parameter, shape ``(N,)`` each.
            marks: by parameter, the `mark` of its layer; nothing where there is none.

        Raises:
            ValueError: if a copied parameter is used on other activations than its copies, or has gradients of other norms.
        """
        result = dict(norms)
        for place, axis in enumerate(self.axes):
            if axis.data:
                continue
            every = axis.gathered(torch.stack([result[param] for param in self._params]))
            nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
            every_mark = axis.gathered(torch.stack([marks.get(param, nothing) for param in self._params]))
            for param, norms_of_param, mark in zip(self._params, every.unbind(1), every_mark.unbind(1), strict=True):
                if is_cut(param, place):
                    result[param] = torch.linalg.vector_norm(norms_of_param, dim=0)
                    continue
                result[param] = norms_of_param[0]
                same = torch.allclose(norms_of_param, result[param].expand_as(norms_of_param), 1e-2, equal_nan=True)
                # The second number may have cancelled; the first is its scale.
                if not same or ((mark - mark[0]).abs() > 1e-3 * mark[0, 0]).any():
                    raise PrivacyValueError(
                        f"{self._names[param]} has gradients of other norms, or of other activations, on other ranks of its "
                        "tensor-parallel group, though it is copied: each rank seems to use it on a part of a sample (by "
                        "sequence parallel). Put its layer into the plan for parallelize_module, so that its inputs are "
                        "distributed tensors"
                    )
        return result

    def fingerprint(self, inputs: Any) -> Tensor | None:
        """Two numbers that tell what a model is called on from anything else; None where no ranks work on the same samples.

        Args:
            inputs: any nesting of tensors.
        """
        if not self.shares_samples:
            return None
        return _fingerprint([tensor for tensor in tensors_in(inputs) if not isinstance(tensor, DTensor)], self._device)

    def check_copies(self) -> None:
        """Raises a ValueError unless ranks of a tensor-parallel group have the same parameters where they have copies."""
        for place, axis in enumerate(self.axes):
            copied = [] if axis.data else [param for param in self._params if not is_cut(param, place)]
            if copied:
                prints = axis.gathered(torch.stack([_fingerprint([local(param)], self._device) for param in copied]))
                for param, of_param in zip(copied, prints.unbind(1), strict=True):
                    if not _all_alike(of_param):
                        raise ValueError(
                            f"{self._names[param]} is copied, and has other values on other ranks of its tensor-parallel "
                            "group. "
                            "Make the model with the same random numbers on all of them (torch.manual_seed)"
                        )

    def check_samples(self, losses: Tensor, inputs: Tensor | None) -> None:
        """Raises a ValueError unless ranks that work on the same samples have the same ones.

        Args:
            losses: one loss a sample, shape ``(N,)``.
            inputs: the `fingerprint` of what the model was called on.
        """
        for axis in self.axes:
            if axis.data:
                continue
            own = torch.tensor([len(losses)], dtype=torch.float64, device=losses.device)
            same = _all_alike(axis.gathered(own if inputs is None else torch.cat([own, inputs.to(own)])))
            if same:
                every = axis.gathered(losses.detach())
                # They come of the same sums. In half precision nothing smaller than its step shows.
                eps = torch.finfo(every.dtype).eps
                tolerance = eps if eps > 1e-4 else 100 * eps
                same = torch.allclose(every, every[:1].expand_as(every), rtol=tolerance, atol=tolerance, equal_nan=True)
            if not same:
                raise PrivacyValueError(
                    "ranks of one tensor-parallel group have different losses, so that their parts of a gradient would be of "
                    "different samples. Give them the same batches (make_private does so under Poisson sampling) and the same "
                    "random numbers in augmentation and dropout (torch.manual_seed)"
                )

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The most of each number over the ranks that have to run as many forwards as each other."""
        if not self.forward_communicates:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        for axis in self.axes:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=axis.group)
        return values.tolist()

    def on_all_ranks(self, flag: bool) -> bool:
        """Whether something holds on all ranks, likewise."""
        return not self.most([not flag])[0]

    # Clipped sums

    def of_any(self, params: Sequence[Any]) -> list[Any]:
        """Those parameters that are among the ``params`` of this rank, or of one that has to run as many backward passes."""
        among = set(params)
        flags = self.most([param in among for param in self._params])
        return [param for param, flag in zip(self._params, flags, strict=True) if flag]

    def as_parameters(self, totals: Iterable[tuple[Any, Tensor | None]]) -> Iterator[tuple[Any, Tensor | None]]:
        """What belongs into ``summed_grad`` of parameters: under FSDP summed over ranks, and cut as the parameter is.

        While some are on their way, the next ones are computed.

        Args:
            totals: parameters, and the clipped sums over this rank's samples, of the shapes that layers see of the
                parameters; None for 0.

        Yields:
            A parameter, and what belongs there.
        """
        if not self._fsdp:
            for param, total in totals:
                yield param, None if total is None else like(param, total)
            return
        *copies, shard = (axis for axis in self.axes if axis.data)
        # All ranks have to take part, with 0 too.
        present = ((param, self._zeros(param) if total is None else total) for param, total in totals)
        sums = (
            (params, ScatteredSum(several, [param.placements[len(copies)].dim for param in params], shard, copies))
            for params, several in buckets(present)
        )
        for params, scattered in one_ahead(sums):
            for param, part in zip(params, scattered.parts(), strict=True):
                yield param, like(param, part.to(param.device))

    def _zeros(self, param: Any) -> Tensor:
        """Zeros of the shape that layers see of a parameter under FSDP."""
        shape = list(param.shape)
        for axis, placement in zip(self.axes, param.placements, strict=False):
            if not axis.data and not placement.is_replicate():
                shape[placement.dim] = len(cut_rows(shape[placement.dim], axis))
        return torch.zeros(shape, dtype=widened(param.dtype), device=self._device)

    def second_pass(
        self, loss: Tensor, params: Sequence[Any], seen: Callable[[Any], Tensor], retain_graph: bool = False
    ) -> list[Tensor | None]:
        """The gradients of a weighted loss by some parameters, as they belong into ``summed_grad``; None for 0.

        Args:
            loss: a scalar.
            params: the parameters.
            seen: gives the tensor that layers see in the place of a parameter.
            retain_graph: as for `torch.autograd.grad`.
        """
        if not self._fsdp:
            gradients = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
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
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=[seen(param) for param in params])
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
        self._reshard()  # or the next forward would run on what is whole of before this step
        copied: dict[tuple[Axis, ...], list[tuple[Any, Tensor]]] = {}
        for param in params:
            summed = local(param.summed_grad)
            axes = self._copies(param)
            if axes:
                copied.setdefault(axes, []).append((param, summed))
            else:
                yield param, like(param, add_noise(summed))
        for axes, several in copied.items():
            sums = ((bucket, NoisySum(tensors, axes)) for bucket, tensors in buckets(several))
            for bucket, noisy in one_ahead(sums):
                yield from zip(bucket, map(like, bucket, noisy.whole(add_noise)), strict=True)

    def noisy_total(self, value: Tensor, add_noise: AddNoise) -> Tensor:
        """The total of a number over all samples, plus noise, the same on all ranks.

        Args:
            value: its total over this rank's samples, a scalar.
            add_noise: values plus noise.
        """
        if not self.axes:
            return add_noise(value)
        (noisy,) = NoisySum([value], self.axes).whole(add_noise)
        return noisy

    def _copies(self, param: Any) -> tuple[Axis, ...]:
        """The axes along which a parameter is copied; as data axes those whose sum is still to be taken."""
        return tuple(
            # FSDP sums along both of its axes in every backward pass.
            axis._replace(data=axis.data and not self._fsdp)
            for place, axis in enumerate(self.axes)
            if not is_cut(param, place)
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
        own = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        for axis in self.axes:
            for name, numbers in zip(values, axis.gathered(own).T.tolist(), strict=True):
                if len(set(numbers)) > 1:
                    raise ValueError(
                        f"ranks disagree about {name}: {', '.join(f'{number:g}' for number in numbers)}. Every rank "
                        "has to take the same steps, with the same arguments"
                    )

    def common(self, secret: bytes) -> bytes:
        """The first rank's bytes, on all ranks."""
        value = torch.tensor(list(secret), dtype=torch.uint8, device=self._device)
        for axis in self.axes:
            dist.broadcast(value, dist.get_global_rank(axis.group, 0), group=axis.group)
        return bytes(value.tolist())


def _fingerprint(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for place, tensor in enumerate(tensors, start=1):
        flat = tensor.detach().flatten().to(device, torch.float64).nan_to_num()
        ramp = torch.linspace(0.5, 1.5, len(flat), dtype=torch.float64, device=device)
        total += place * torch.stack([flat.sum(), flat @ ramp])
    return total


def _all_alike(values: Tensor) -> bool:
    """Whether all ranks have the same, but for rounding."""
    return torch.allclose(values, values[:1].expand_as(values), rtol=1e-9, atol=1e-9)


def _param_groups(module: FSDPModule) -> list[Any]:
    # What FSDP2 has no public way to: its mesh, and by what it divides gradients.
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []


def _refuse_other_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        replicated = "replicate" in (_get_registry(module) or {})
        if replicated or isinstance(module, (DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel)):
            name = "replicate" if replicated else type(module).__name__
            raise PrivacyNotImplementedError(
                f"{name} reduces gradients before they are clipped and summed. Take the model out of it (model.module) "
                "and wrap that in opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or call "
                "torch.distributed.fsdp.fully_shard on it"
            )
