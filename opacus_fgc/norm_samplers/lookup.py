"""Which sampler serves a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from opacus_fgc.norm_samplers.functorch import Functorch
from opacus_fgc.norm_samplers.ops import OpSampler
from opacus_fgc.norm_samplers.registry import Forms, norm_sampler_of
from opacus_fgc.per_sample import Dense, NormOnly, PerSampleGradient, add
from opacus_fgc.shards import plain_type
from opacus_fgc.taps import Call, Interleave, Use, interleaved, tensors_in


class Registered:
    """A sampler from a table, called with the activations and backprops of one layer, batch first.

    Args:
        function: the entry of the table.
        name: what a plan calls it.
        as_form: makes a form of what it returns for a parameter, given the parameter's shape.
    """

    covers_children = False

    def __init__(
        self, function: Callable[..., Mapping], name: str, as_form: Callable[[Any, torch.Size], PerSampleGradient]
    ) -> None:
        self.name = name
        self._function = function
        self._as_form = as_form

    def fingerprint(self, outputs: list[Tensor], axis: int) -> None:
        """Needs to know nothing about the outputs."""

    def __call__(self, layer: nn.Module, uses: Sequence[Use], interleave: Interleave) -> Forms:
        """The forms of the layer's parameters, added up over its uses; see `registry.register_norm_sampler`.

        Uses of one shape go to the function as one batch: a recurrent layer is one call, not one for each step.
        """
        groups: dict[Any, list[tuple[list[Tensor], Tensor]]] = {}
        for call, backprops in uses:
            activations, backprop = _by_sample(call, backprops)
            shapes = [(tensor.shape, tensor.dtype) for tensor in (*activations, backprop)]
            # Only for one input a row is sure to belong to one sample.
            key = tuple(shapes) if len(shapes) == 2 and shapes[0][0][:1] == backprop.shape[:1] else id(call)
            groups.setdefault(key, []).append((activations, backprop))
        forms: dict[Any, list[PerSampleGradient]] = {}
        for group in groups.values():
            activations, backprop = group[0]
            if len(group) > 1:
                activations = [interleaved([inputs[0] for inputs, _ in group])]
                backprop = interleave([backprop for _, backprop in group])
            for param, gradient in self._function(layer, activations, backprop).items():
                form = self._as_form(gradient, param.shape)
                forms.setdefault(param, []).append(form.folded(len(group)) if len(group) > 1 else form)
        return {param: add(several) for param, several in forms.items()}


def _by_sample(call: Call, backprops: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    if len(backprops) != 1:
        raise NotImplementedError(f"a registered sampler takes layers with one output, this one has {len(backprops)}")
    axis = call.batch_axis
    if axis == 0:
        return [call.by_sample(tensor) for tensor in call.activations], call.by_sample(backprops[0])
    activations = [tensor.movedim(axis, 0) if tensor.dim() > axis else tensor for tensor in call.activations]
    return activations, backprops[0].movedim(axis, 0)


def _form_or_norms(gradient: PerSampleGradient | Tensor, shape: torch.Size) -> PerSampleGradient:
    return NormOnly(gradient, shape) if isinstance(gradient, Tensor) else gradient


def _dense(gradient: Tensor, shape: torch.Size) -> PerSampleGradient:
    return Dense(gradient)


class ByOperation:
    """For modules that no table knows: what they do with their own parameters is caught; see `opacus_fgc.op_taps`."""

    name = "operations"
    covers_children = False


Sampler = Registered | Functorch | OpSampler


def find_sampler(layer: nn.Module) -> Sampler | ByOperation:
    """Finds what computes a layer's per-sample gradients.

    In this order: its type's norm sampler; the norm sampler of the nearest base class whose ``forward`` it inherits
    unchanged; Opacus' grad sampler of its very type; and for all other modules the operations on their parameters.

    Args:
        layer: a layer with trainable parameters of its own.
    """
    # Torch's attention uses the weight of the first, and never calls it. The second have a weight that is computed from their
    # parameters by a hook (`torch.nn.utils.spectral_norm`).
    if type(layer) is NonDynamicallyQuantizableLinear or any(isinstance(own, Tensor) for own in vars(layer).values()):
        return ByOperation()
    for base in type(layer).__mro__:
        function = norm_sampler_of(base)
        if function and getattr(base, "forward", None) is type(layer).forward and "forward" not in vars(layer):
            return Registered(function, "norm sampler", _form_or_norms)
    return _grad_sampler(layer) or ByOperation()


def find_gradient_sampler(layer: nn.Module) -> Sampler:
    """As `find_sampler`, but without the norm samplers: what gives gradients for sure.

    Args:
        layer: a layer with trainable parameters of its own.
    """
    return _grad_sampler(layer) or Functorch()


def _grad_sampler(layer: nn.Module) -> Registered | None:
    function = GradSampleHooks.GRAD_SAMPLERS.get(plain_type(layer))
    return None if function is None else Registered(function, "grad sampler", _dense)


def batch_axis(layer: nn.Module, inputs: Any, batch_first: bool) -> int:
    """The axis of a layer's inputs and outputs that counts samples.

    Layers that define their batch axis have it there whatever the model's convention is. With ``batch_first=False`` others
    have it second, ``(K, N, ...)``, where they have two axes in front of those that they work on, and first otherwise.

    Args:
        layer: the layer.
        inputs: what it was called with, tensors in any nesting.
        batch_first: the convention of the model.
    """
    if isinstance(layer, SequenceBias):
        return 0 if layer.batch_first else 1
    if batch_first or isinstance(layer, (RNNLinear, _ConvNd, nn.GroupNorm, _InstanceNorm, nn.EmbeddingBag)):
        return 0
    if isinstance(layer, nn.Embedding):
        features = 0
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        features = len(layer.normalized_shape)
    else:
        features = 1
    activations = tensors_in(inputs)
    return 1 if activations and activations[0].dim() - features >= 2 else 0
