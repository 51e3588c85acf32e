"""Operations on parameters that belong to no layer; see `opacus_fgc.taps.operations`.

What meets the data in an operation need not be a parameter itself: ``1 + weight``, ``table[index]``, ``weight.float()``. Its
per-sample gradients are then carried on to the parameters by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc._compat.pytree import tree_flatten, tree_unflatten
from opacus_fgc.norm_samplers.conv import convolution
from opacus_fgc.norm_samplers.embedding import embedding
from opacus_fgc.norm_samplers.linear import linear, matrix
from opacus_fgc.norm_samplers.normalization import group_norm, layer_norm, rms_norm
from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, Parts, PerSampleGradient, add
from opacus_fgc.taps.functorch import gradients_by_sample
from opacus_fgc.taps.graph import leaves_of, part_of
from opacus_fgc.taps.tap import Call, Interleave, Use


class Op(NamedTuple):
    """An operation that was caught, as its tap keeps it.

    Attributes:
        function: what was called.
        shared: the arguments that the whole batch shares and that need a gradient, by their places among all arguments.
        norms: of the outputs by sample, if they are to be compared with a repeated forward's.
        constants: the places of what the batch shares and needs no gradient.
    """

    function: Callable[..., Any]
    shared: Mapping[int, Tensor]
    norms: Tensor | None = None
    constants: Collection[int] = ()


def _to_parameters(shared: Tensor, form: PerSampleGradient) -> Forms:
    """Carries the gradients by something that was computed from parameters on to these."""
    if shared.is_leaf:
        return {shared: form}
    part = part_of(shared)
    if part is not None:
        param, place, edge = part
        if edge is not None:
            gradients = form.materialize().to(shared.dtype)
            form = Dense(
                _carried(shared, [edge], gradients)[0] if len(gradients) else gradients.new_zeros(0, *param.shape[1:])
            )
        return {param: Parts({place: form}, param.shape)}
    params = leaves_of([shared])
    gradients = form.materialize().to(shared.dtype)
    if len(gradients) == 0:
        return {param: Dense(param.new_zeros(0, *param.shape)) for param in params}
    by_param = _carried(shared, params, gradients)
    return {param: Dense(gradient) for param, gradient in zip(params, by_param, strict=True)}


def _carried(shared: Tensor, ends: Sequence[Any], gradients: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(shared, ends, gradients, retain_graph=True, is_grads_batched=True)


class OpSampler:
    """Per-sample gradients of the parameters behind an operation, added up over its uses.

    Args:
        forms: gives the forms of what is shared in one use.
        name: what a plan calls it.
    """

    covers_children = False

    def __init__(self, forms: Callable[[Op, Call, Tensor], Mapping[Tensor, PerSampleGradient]], name: str) -> None:
        self.name = name
        self._forms = forms

    def fingerprint(self, outputs: list[Tensor], axis: int) -> None:
        """Not used: the tap of an operation keeps the `Op`."""

    def __call__(self, layer: Any, uses: Sequence[Use], interleave: Interleave) -> Forms:
        """The forms of the parameters."""
        several: dict[Any, list[PerSampleGradient]] = {}
        for call, backprops in uses:
            if len(backprops) != 1:
                raise NotImplementedError(f"operations with {len(backprops)} outputs are not supported")
            for shared, form in self._forms(call.fingerprint, call, backprops[0]).items():
                if call.rows_of_a_sample > 1:
                    form = form.sum_over_uses(call.rows_of_a_sample)
                for param, gradient in _to_parameters(shared, form).items():
                    several.setdefault(param, []).append(gradient)
        return {param: add(forms) for param, forms in several.items()}


def _batch_axis(op: Op, call: Call, backprops: Tensor) -> dict[Tensor, PerSampleGradient]:
    (shared,) = op.shared.values()
    gradients = backprops.movedim(call.batch_axis, 0)
    if gradients[:1].numel() > shared.numel():
        # It got a row for each position, too.
        gradients = gradients.sum(1)
    return {shared: Dense(gradients.reshape(len(gradients), *shared.shape))}


BATCH_AXIS = OpSampler(_batch_axis, "batch axis")
"""For parameters that got a batch axis, whose gradient autograd itself delivers by sample."""


def _arguments(op: Op, call: Call) -> tuple[list[Any], Any]:
    """Flattened arguments of the call with what is shared in its places, and their structure."""
    leaves, spec = tree_flatten(call.arguments())
    for place, shared in op.shared.items():
        leaves[place] = shared
    return leaves, spec


def _repeated(op: Op, call: Call, backprops: Tensor) -> dict[Tensor, PerSampleGradient]:
    leaves, spec = _arguments(op, call)
    for place in op.shared:
        leaves[place] = None

    def forward(params: Mapping[Any, Tensor], leaves: list[Any]) -> Any:
        leaves = [params.get(place, leaf) for place, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(leaves, spec)
        return op.function(*args, **kwargs)

    params = {place: shared.detach() for place, shared in op.shared.items()}
    gradients = gradients_by_sample(forward, params, leaves, call, (backprops,), op.norms, op.constants)
    forms: dict[Tensor, list[PerSampleGradient]] = {}
    for place, gradient in gradients.items():
        forms.setdefault(op.shared[place], []).append(Dense(gradient))
    return {shared: add(several) for shared, several in forms.items()}


REPEATED = OpSampler(_repeated, "torch.func")
"""For operations that nothing else is known of: repeated on one sample at a time."""


StandIn = tuple[Callable[..., Any], Any, Tensor]
"""A norm sampler, what stands for its layer, and the input."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> StandIn:
    return linear, SimpleNamespace(weight=weight, bias=bias), input


def _matmul(input: Tensor, other: Tensor) -> StandIn:
    return matrix, SimpleNamespace(weight=other, bias=None), input


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> StandIn:
    return matrix, SimpleNamespace(weight=mat2, bias=input), mat1


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> StandIn:
    layer = SimpleNamespace(
        weight=weight,
        padding_idx=padding_idx,
        max_norm=max_norm,
        scale_grad_by_freq=scale_grad_by_freq,
        embedding_dim=weight.shape[1],
    )
    return embedding, layer, input


def _lookup(input: Tensor, index: Any) -> StandIn:
    (index,) = index if isinstance(index, tuple) else (index,)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or not index.dim():
        raise TypeError("several rows by their numbers alone are what an embedding looks up")
    layer = SimpleNamespace(
        weight=input,
        padding_idx=None,
        max_norm=None,
        scale_grad_by_freq=False,
        embedding_dim=input.shape[1:].numel(),
    )
    return embedding, layer, index % len(input)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> StandIn:
    axes = weight.dim() - 2
    layer = SimpleNamespace(
        weight=weight,
        bias=bias,
        kernel_size=tuple(weight.shape[2:]),
        stride=_sizes(stride, axes),
        padding=_sizes(padding, axes),
        dilation=_sizes(dilation, axes),
        groups=groups,
        padding_mode="zeros",
    )
    return convolution, layer, input


def _sizes(value: Any, axes: int) -> Any:
    return value if isinstance(value, (str, tuple, list)) else (value,) * axes


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> StandIn:
    return layer_norm, SimpleNamespace(weight=weight, bias=bias, eps=eps, normalized_shape=normalized_shape), input


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> StandIn:
    return rms_norm, SimpleNamespace(weight=weight, eps=eps, normalized_shape=normalized_shape), input


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> StandIn:
    return group_norm, SimpleNamespace(weight=weight, bias=bias, eps=eps, num_groups=num_groups), input


_STAND_INS: dict[str, Callable[..., StandIn]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    "embedding": _embedding,
    "__getitem__": _lookup,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}


def _as_layer(op: Op, call: Call, backprops: Tensor) -> dict[Tensor, PerSampleGradient]:
    leaves, spec = _arguments(op, call)
    args, kwargs = tree_unflatten(leaves, spec)
    sampler, layer, activations = _STAND_INS[op.function.__name__](*args, **kwargs)
    axis = call.batch_axis
    activations = activations.movedim(axis, 0) if activations.dim() > axis else activations
    forms = sampler(layer, [activations], backprops.movedim(axis, 0))
    return {shared: forms[shared] for shared in op.shared.values()}


AS_LAYER = OpSampler(_as_layer, "norm sampler")
"""For operations that are what a layer with a norm sampler does."""


def sampler_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shared: set[int]
) -> OpSampler:
    """Which sampler serves an operation.

    Args:
        function: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        shared: the ids of those arguments that the whole batch shares.
    """
    stand_in = _STAND_INS.get(function.__name__)
    if stand_in is None:
        return REPEATED
    try:
        sampler, layer, activations = stand_in(*args, **kwargs)
    except TypeError:  # an option that no layer has
        return REPEATED
    # The arithmetic of forms other than `Dense` is one of real numbers.
    if layer.weight is not None and layer.weight.is_complex():
        return REPEATED
    matrices = sampler is not matrix or (layer.weight.dim() == 2 and (layer.bias is None or layer.bias.dim() == 1))
    return AS_LAYER if matrices and id(activations) not in shared else REPEATED
