"""What layers see in the place of a model's parameters: all of them under FSDP, shards under tensor parallel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from opacus_fgc._compat.modules import every_module, parameters_by_name, with_parameters
from opacus_fgc._compat.pytree import tree_map_only
from opacus_fgc.distributed.mesh import Axis, local, shard_rows
from opacus_fgc.taps.hooks import Hook
from opacus_fgc.taps.tap import Use, tensors_in


class StandIns(Protocol):
    """What is told of tensors that stand for parameters, and knows what is computed from these alone."""

    def add(self, param: Any, seen: Tensor) -> None:
        """Told of a parameter, and of what stands for it."""

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from parameters and constants alone."""


class Unsharded:
    """The tensors that stand for parameters while an FSDP module runs.

    A parameter is a shard; while its module runs there is another tensor in its place, with all of it, which autograd knows.

    Args:
        model: the model, between two forwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inputs: list[Tensor] = []
        self._seen: dict[Any, Tensor] = {}
        self._parameters: dict[Tensor, Any] = {}
        self._fsdp = [module for module in model.modules() if isinstance(module, FSDPModule)]
        managed = {inner for module in self._fsdp for inner in module.modules()}
        self._places = {module: dict(parameters_by_name(module)) for module in managed}

    def watch(self, stand_ins: StandIns) -> list[Any]:
        """Puts hooks on the FSDP modules; returns what takes them off.

        Args:
            stand_ins: told of what stands for parameters. FSDP joins the graphs of all inputs of a module; what it says is
                shared among them is left as it is.
        """
        handles = []
        for module in self._fsdp:
            after = Hook(partial(self._after, stand_ins))
            handles.append(module.register_forward_pre_hook(Hook(self._before), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_pre_hook(after, with_kwargs=True))
        return handles

    # Hooks that are taken off in the middle of the model's call are still called, without keyword arguments.

    def _before(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        self._inputs = tensors_in((args, kwargs))

    def _after(self, stand_ins: StandIns, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        inputs, self._inputs = self._inputs, []
        for inner in module.modules():
            for name, param in self._places[inner].items():
                seen = parameters_by_name(inner)[name]
                if seen is not None and seen is not param and seen is not self.of(param):
                    self._seen[param], self._parameters[seen] = seen, param
                    stand_ins.add(param, seen)
        if kwargs is None or not any(map(stand_ins.is_shared, inputs)):
            return None
        before = iter(inputs)

        def restored(tensor: Tensor) -> Tensor:
            own = next(before)
            # FSDP may also have cast it.
            return own.to(tensor) if stand_ins.is_shared(own) else tensor

        return tree_map_only(Tensor, restored, (args, kwargs))

    def named_parameters(self, module: nn.Module, recurse: bool = True) -> dict[str, Any]:
        """The parameters of a module as the optimizer has them, whatever is in their place at the moment."""
        named: dict[str, Any] = dict(module.named_parameters(recurse=recurse))
        if self._places:
            for name in named:
                path, _, last = name.rpartition(".")
                named[name] = self._places.get(module.get_submodule(path), {}).get(last, named[name])
        return named

    def parameters(self, module: nn.Module) -> list[Any]:
        """The same without names, in a fraction of the time."""
        if self._places:
            return list(self.named_parameters(module).values())
        found = {id(param): param for inner in every_module(module) for param in parameters_by_name(inner).values()}
        return [param for param in found.values() if param is not None]

    def of(self, param: Any) -> Tensor:
        """What layers see in the place of a parameter; itself outside of FSDP."""
        # To look a tensor up takes a call of Python's, here for every use of every parameter.
        return self._seen.get(param, param) if self._seen else param

    def of_each(self, params: Iterable[Any]) -> Iterable[Tensor]:
        """The same of several parameters; these themselves outside of FSDP."""
        return map(self.of, params) if self._seen else params

    def of_named(self, params: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The same of parameters by name; the mapping itself outside of FSDP."""
        return {name: self.of(param) for name, param in params.items()} if self._seen else params

    def parameter(self, tensor: Any) -> Any:
        """The parameter in whose place a tensor is."""
        return self._parameters.get(tensor, tensor) if self._parameters else tensor


class View(NamedTuple):
    """A layer and its uses as a sampler is to see them: with what this rank has of parameters, activations and backprops.

    Attributes:
        layer: the layer, or one like it with other parameters.
        uses: its uses.
        params: its parameters by name.
    """

    layer: Any
    uses: Sequence[Use]
    params: Mapping[str, Tensor]


def view(layer: Any, uses: Sequence[Use], params: Mapping[str, Tensor]) -> View:
    """What this rank computes of a layer's per-sample gradients.

    Args:
        layer: the layer, or what stands for a tapped operation.
        uses: its uses.
        params: its parameters by name, as it sees them.

    Raises:
        NotImplementedError: if it is a layer whose shards of per-sample gradients are not known.
    """
    data = [tensor for call, backprops in uses for tensor in (*call.activations, *backprops)]
    meshes = {tensor.device_mesh for tensor in (*params.values(), *data) if isinstance(tensor, DTensor)}
    if not meshes:
        return View(layer, uses, params)
    (mesh,) = meshes
    sharded = {name: dim for name, param in params.items() if (dim := _shard_dim(param)) is not None}
    if not isinstance(layer, nn.Module):
        raise NotImplementedError(
            "an operation on distributed tensors, whose shards of per-sample gradients are not known. Let its module work on "
            "whole tensors: leave it out of the plan for parallelize_module, and parts of sequences too; or take a layer of "
            "torch that does the same (nn.LayerNorm, nn.RMSNorm)"
        )
    inputs, outputs = _shard_dims_of_data(layer, sharded, params)
    change: dict[str, Any] = {}
    local_uses = []
    for call, backprops in uses:
        activations = [_placed(tensor, inputs, mesh) for tensor in call.activations]
        local_backprops = [_placed(tensor, outputs, mesh) for tensor in backprops]
        if isinstance(layer, nn.Embedding):
            change.update(padding_idx=None, embedding_dim=local(params["weight"]).shape[1])
            activations[0], local_backprops[0] = _rows(layer, activations[0], local_backprops[0], mesh, sharded)
        local_uses.append(Use(call.with_activations(activations), tuple(local_backprops)))
    own = {name: _detached(param) for name, param in params.items()}
    return View(with_parameters(layer, plain_type(layer), own, change), local_uses, own)


def plain_type(layer: nn.Module) -> type:
    """A layer's type without what FSDP puts in front of it."""
    return next(kind for kind in type(layer).__mro__ if not issubclass(kind, FSDPModule))


def _shard_dim(param: Tensor) -> int | None:
    """The dimension along which a parameter is sharded; None if it is replicated."""
    return getattr(param.placements[0], "dim", None) if isinstance(param, DTensor) else None


def _shard_dims_of_data(
    layer: nn.Module, sharded: dict[str, int], params: Mapping[str, Tensor]
) -> tuple[int | None, int | None]:
    """Along which dimension activations and backprops have to be sharded, so that the local layer's gradients are the shards."""
    if not sharded:
        return None, None
    linear, embedding = isinstance(layer, nn.Linear), isinstance(layer, nn.Embedding)
    if (linear and sharded == dict.fromkeys(params, 0)) or (embedding and sharded == {"weight": 1}):
        return None, -1
    if linear and sharded == {"weight": 1}:
        return -1, None
    if embedding and sharded == {"weight": 0}:
        return None, None
    raise NotImplementedError(
        "it is sharded in a way whose per-sample gradients are not known: tensor parallel is supported for Linear "
        "(ColwiseParallel, RowwiseParallel), Embedding (likewise), and layers whose parameters are copied. Leave it "
        "out of the plan for parallelize_module"
    )


def _placed(tensor: Tensor, dim: int | None, mesh: Any) -> Tensor:
    """What this rank has of a tensor that is sharded along a dimension, or replicated."""
    if isinstance(tensor, DTensor):
        return local(tensor.redistribute(mesh, [Replicate() if dim is None else Shard(tensor.dim() + dim)]))
    if dim is None:
        return tensor
    return (
        DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
        .redistribute(mesh, [Shard(tensor.dim() + dim)])
        .to_local()
    )


def _detached(param: Tensor) -> Tensor:
    return local(param.detach()).requires_grad_(param.requires_grad)


def _rows(
    layer: nn.Embedding, index: Tensor, backprops: Tensor, mesh: Any, sharded: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Tokens as rows of this rank's part of the table, and backprops that are 0 where the row is another rank's."""
    rows = range(layer.num_embeddings)
    if sharded.get("weight") == 0:
        rows = shard_rows(layer.num_embeddings, Axis(mesh.get_group(), data=False))
    elsewhere = (index < rows.start) | (index >= rows.stop)
    if layer.padding_idx is not None:
        elsewhere = elsewhere | (index == layer.padding_idx)
    return (index - rows.start).masked_fill(elsewhere, 0), backprops.masked_fill(elsewhere.unsqueeze(-1), 0)
