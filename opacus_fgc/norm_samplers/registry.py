"""The table of norm samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from opacus_fgc.per_sample import PerSampleGradient

Forms = dict[Any, PerSampleGradient]
"""The form of each parameter's per-sample gradients."""

NormSampler = Callable[[Any, list[Tensor], Any], Mapping[Any, "PerSampleGradient | Tensor"]]

NORM_SAMPLERS: dict[type[nn.Module] | str, NormSampler] = {}
"""``{layer type: norm sampler}``. Opacus' ``GRAD_SAMPLERS`` serves the layers that are not in it."""


class Arranged(NamedTuple):
    """A call of a layer, as its tap and its norm sampler are to see it.

    Attributes:
        inputs: the tensors that it was called with, batch first.
        outputs: the tensors that it returned, likewise.
        restored: makes what the layer returned of such outputs.
        orders: the indices by which samples were moved for it, if they were.
    """

    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]
    restored: Callable[[Sequence[Tensor]], Any]
    orders: Sequence[Tensor] = ()


Arrange = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Arranged]
"""Arranges a call, given the layer, its positional and its keyword arguments, and what it returned."""


class Traits(NamedTuple):
    """What `register_norm_sampler` was told of a norm sampler; see there."""

    by_row: bool = False
    arrange: Arrange | None = None
    recomputes: bool = False


TRAITS: dict[NormSampler, Traits] = {}
"""By norm sampler; not those that were put into `NORM_SAMPLERS` without the decorator."""


def norm_sampler_of(layer_type: type) -> NormSampler | None:
    """The norm sampler registered for just this type, by itself or by its name."""
    return NORM_SAMPLERS.get(layer_type) or NORM_SAMPLERS.get(f"{layer_type.__module__}.{layer_type.__qualname__}")


def register_norm_sampler(
    target_class_or_classes: type[nn.Module] | str | Sequence[type[nn.Module] | str],
    by_row: bool = False,
    arrange: Arrange | None = None,
    recomputes: bool = False,
) -> Callable[[NormSampler], NormSampler]:
    """Registers the decorated function as the norm sampler of one or several types of layers.

    A norm sampler is called as ``sampler(layer, activations, backprops)`` with the layer, the list of the tensors that it
    was called with, and the gradient of the loss by its output; activations and backprops have the batch first. It returns
    a dict from each trainable parameter of the layer to the form of its per-sample gradients (`opacus_fgc.per_sample`), or
    to plain norms, shape ``(N,)``, as Opacus' own norm samplers do.

    It serves the types themselves and those subclasses that inherit their ``forward`` unchanged.

    Args:
        target_class_or_classes: a type of layer, or a sequence of them; a type by its full name,
            ``"package.module.Layer"``, need not be imported for it.
        by_row: whether the form of one row takes no more memory than the row does, as factors of a product do. Rows of samples
            that have different numbers of them need no padding then.
        arrange: for layers with several outputs, or whose tensors have their batch on several axes: arranges a call so that all
            have it first (`Arranged`). The sampler then gets the arranged inputs, and for backprops a list with one for each
            arranged output: zeros where the loss does not use it, None where it needs no gradient.
        recomputes: whether the sampler computes steps of the forward again, each from the one before it, so that roundings grow
            and its gradients are not those of autograd to the last few of them. Clipped sums are then made of its forms.

    Example:
        >>> @register_norm_sampler(Scale)
        ... def scale(layer, activations, backprops):
        ...     return {layer.factor: Dense((activations[0] * backprops).flatten(1, -2).sum(1))}
    """
    targets = target_class_or_classes
    targets = [targets] if isinstance(targets, (type, str)) else targets

    def decorator(sampler: NormSampler) -> NormSampler:
        NORM_SAMPLERS.update(dict.fromkeys(targets, sampler))
        TRAITS[sampler] = Traits(by_row, arrange, recomputes)
        return sampler

    return decorator


def refuse_unbatched(tensor: Tensor, dims: int) -> None:
    """Refuses a call without a batch axis.

    Args:
        tensor: the layer's input or output, batch first.
        dims: how many axes a batched one has at least.

    Raises:
        ValueError: if it has fewer.
    """
    if tensor.dim() < dims:
        raise ValueError(
            f"it was called without a batch axis, on shape {tuple(tensor.shape)} where {dims} axes were expected; call it on "
            "a batch"
        )
