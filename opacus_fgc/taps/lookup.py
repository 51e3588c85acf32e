"""Which sampler serves a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from opacus_fgc._compat.modules import PRIVATE_NAMES_BESIDE_FORWARD, ConvNd, InstanceNorm, parameters_by_name
from opacus_fgc.distributed.shards import plain_type
from opacus_fgc.norm_samplers.head import are_head_rows
from opacus_fgc.norm_samplers.registry import TRAITS, Arranged, Forms, Traits, norm_sampler_of
from opacus_fgc.per_sample import Dense, NormOnly, PerSampleGradient, add
from opacus_fgc.taps.functorch import Functorch
from opacus_fgc.taps.operation_samplers import OpSampler
from opacus_fgc.taps.tap import Call, Interleave, Use, interleaved, tensors_in


class Registered:
    """A sampler from a table, called with the activations and backprops of one layer, batch first.

    Args:
        function: the entry of the table.
        name: what a plan calls it.
        as_form: makes a form of what it returns for a parameter, given the parameter's shape.

    Attributes:
        traits: what is known of the function; see `registry.register_norm_sampler`.
    """

    covers_children = False

    def __init__(
        self, function: Callable[..., Mapping], name: str, as_form: Callable[[Any, torch.Size], PerSampleGradient]
    ) -> None:
        self.name = name
        self._function = function
        self._as_form = as_form
        self.traits = TRAITS.get(function, Traits())

    def fingerprint(self, outputs: list[Tensor], axis: int) -> None:
        """Needs to know nothing about the outputs."""

    def __call__(self, layer: nn.Module, uses: Sequence[Use], interleave: Interleave) -> Forms:
        """The forms of the layer's parameters, added up over its uses; see `registry.register_norm_sampler`.

        Uses of one shape go to the function as one batch: a recurrent layer is one call, not one for each step.
        """
        if self.traits.arrange is not None:
            each = [self._function(layer, call.activations, _by_place(call, backprops)) for call, backprops in uses]
            return {param: add([self._as_form(one[param], param.shape) for one in each]) for param in each[0]}
        if len(uses) == 1:
            gradients = self._function(layer, *_by_sample(*uses[0]))
            return {param: self._as_form(gradient, param.shape) for param, gradient in gradients.items()}
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
                forms.setdefault(param, []).append(form.sum_over_uses(len(group)) if len(group) > 1 else form)
        return {param: add(several) for param, several in forms.items()}


def _by_sample(call: Call, backprops: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    if len(backprops) != 1:
        raise NotImplementedError(f"a registered sampler takes layers with one output, this one has {len(backprops)}")
    axis = call.batch_axis
    if axis == 0:
        return [call.by_sample(tensor) for tensor in call.activations], call.by_sample(backprops[0])
    activations = [tensor.movedim(axis, 0) if tensor.dim() > axis else tensor for tensor in call.activations]
    return activations, backprops[0].movedim(axis, 0)


def _by_place(call: Call, backprops: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The backprops of an arranged call by the places of its outputs, None for those that need no gradient."""
    by_place = dict(zip(call.outputs, backprops, strict=True))
    return [by_place.get(place) for place in range(call.outputs[-1] + 1)]


def arranged(
    layer: nn.Module, sampler: Sampler, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Arranged | None:
    """How the tap on a call, and its sampler, are to see it; None for as it is.

    Args:
        layer: the layer.
        sampler: its sampler.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned.
    """
    if not isinstance(sampler, Registered) or sampler.traits.arrange is None:
        return None
    return sampler.traits.arrange(layer, args, kwargs, output)


def _form_or_norms(gradient: PerSampleGradient | Tensor, shape: torch.Size) -> PerSampleGradient:
    return NormOnly(gradient, shape) if isinstance(gradient, Tensor) else gradient


def _dense(gradient: Tensor, shape: torch.Size) -> PerSampleGradient:
    return Dense(gradient)


class ByOperation:
    """For modules that no table knows: what they do with their own parameters is caught; see `opacus_fgc.taps.operations`."""

    name = "operations"
    covers_children = False


Sampler = Registered | Functorch | OpSampler


def find_sampler(layer: nn.Module) -> Sampler | ByOperation:
    """Finds what computes a layer's per-sample gradients.

    In this order: its type's norm sampler; the norm sampler of the nearest base class whose ``forward`` it inherits
    unchanged, with all that this calls and reads; Opacus' grad sampler of its very type; and for all other modules the
    operations on their parameters.

    Args:
        layer: a layer with trainable parameters of its own.
    """
    # Torch's attention uses the weight of the first, and never calls it.
    if type(layer) is NonDynamicallyQuantizableLinear or not _is_plain(layer):
        return ByOperation()
    kind = plain_type(layer)
    for base in kind.__mro__:
        function = norm_sampler_of(base)
        if function and _inherits(kind, base):
            return Registered(function, "norm sampler", _form_or_norms)
    return _grad_sampler(layer) or ByOperation()


def holds_only(layer: nn.Module, params: Mapping[str, Tensor]) -> bool:
    """Whether a layer has just these parameters, and nothing in the place of one: it was called on them as they are.

    Another tensor is there during `torch.func.functional_call`, or after a hook has put it there
    (`torch.nn.utils.spectral_norm`).

    Args:
        layer: the layer.
        params: its own parameters by name.
    """
    # Asked at every call, so it is kept light: by loops, not by generators.
    own = parameters_by_name(layer)
    for name, param in own.items():
        if param is not None and param is not params.get(name):
            return False
    for name in params:
        if name not in own:
            return False
    for value in vars(layer).values():  # noqa: SIM110
        if isinstance(value, Tensor):
            return False
    return True


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its type does, and a sampler of real numbers can serve it."""
    own, kind = vars(layer), type(layer)
    return not (
        any(isinstance(value, Tensor) for value in own.values())
        or any(param is not None and param.is_complex() for param in parameters_by_name(layer).values())
        # To look for those first that no class has spares most of the time that it takes to wrap a small layer.
        or any(_has(kind, name) and callable(inspect.getattr_static(kind, name, None)) for name in own)
    )


def _has(kind: type, name: str) -> bool:
    return any(name in vars(base) for base in kind.__mro__)


@cache
def _inherits(kind: type, base: type) -> bool:
    """Whether a type inherits a base's ``forward`` unchanged, with all that it may rely on."""
    if getattr(base, "forward", None) is not getattr(kind, "forward", None):
        return False
    own = {name for cls in kind.__mro__ if cls not in base.__mro__ for name in vars(cls)}
    if (own & _relied_on(base)) - _NOT_IN_FORWARD:
        return False
    # A library may have put another method into a class of torch.
    return not any(
        isinstance(value, FunctionType) and cls.__module__.startswith("torch.") and not _is_torchs(value)
        for cls in base.__mro__
        for name, value in vars(cls).items()
        if issubclass(cls, nn.Module) and cls is not nn.Module and name not in _NOT_IN_FORWARD
    )


def _is_torchs(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _relied_on(base: type) -> set[str]:
    """The names of all attributes of a type, and of all that its methods read."""
    names = set(dir(base))
    for cls in base.__mro__:
        if issubclass(cls, nn.Module) and cls is not nn.Module:
            for name, value in vars(cls).items():
                if name not in _NOT_IN_FORWARD:
                    function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
                    names.update(_names_in(getattr(function, "__code__", None)))
    return names


def _names_in(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names_in(constant)


_NOT_IN_FORWARD = frozenset(dir(object)) - {"__getattribute__", "__class__"} | PRIVATE_NAMES_BESIDE_FORWARD
_NOT_IN_FORWARD |= {
    *("__abstractmethods__", "__annotations__", "__constants__", "__copy__", "__deepcopy__", "__dict__", "__module__"),
    *("__firstlineno__", "__orig_bases__", "__parameters__", "__setstate__", "__slots__", "__static_attributes__"),
    *("__annotate__", "__annotate_func__", "__annotations_cache__", "__type_params__", "__weakref__", "_abc_impl"),
    *("eval", "extra_repr", "load_state_dict", "reset_parameters", "state_dict", "to", "train"),
}
"""What a subclass may have of its own without doing anything else in its ``forward``."""


def find_gradient_sampler(layer: nn.Module) -> Sampler:
    """As `find_sampler`, but without the norm samplers: what gives gradients for sure.

    Args:
        layer: a layer with trainable parameters of its own.
    """
    return _grad_sampler(layer) or Functorch()


def _grad_sampler(layer: nn.Module) -> Registered | None:
    function = GradSampleHooks.GRAD_SAMPLERS.get(plain_type(layer))
    return None if function is None else Registered(function, "grad sampler", _dense)


def with_batch_second(model: nn.Module) -> set[nn.Module]:
    """The layers in torch's transformers that get ``(T, N, features)``, whatever the model gets."""
    found: set[nn.Module] = set()
    for module in model.modules():
        stacked = isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder))
        first: Any = next(module.layers.children(), None) if stacked else module  # type: ignore[union-attr]
        is_layer = isinstance(first, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if is_layer and not first.self_attn.batch_first:
            found.update(module.modules())
    return found


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
    if batch_first or isinstance(layer, (RNNLinear, ConvNd, nn.GroupNorm, InstanceNorm, nn.EmbeddingBag)):
        return 0
    if are_head_rows(inputs[0]):
        return 0
    if isinstance(layer, nn.Embedding):
        features = 0
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        features = len(layer.normalized_shape)
    else:
        features = 1
    activations = tensors_in(inputs)
    return 1 if activations and activations[0].dim() - features >= 2 else 0


def lacks_batch_axis(layer: nn.Module, output: Any) -> bool:
    """Whether what a layer returned is a row without an axis for the batch. Asked at every call, so it is kept light.

    Args:
        layer: the layer.
        output: what it returned.
    """
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return isinstance(output, Tensor) and output.dim() == 1
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return isinstance(output, Tensor) and output.dim() == len(layer.normalized_shape)
    return isinstance(layer, ConvNd) and isinstance(output, Tensor) and output.dim() == layer.weight.dim() - 1
