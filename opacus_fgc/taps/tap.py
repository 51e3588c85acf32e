"""Taps: the way by which a layer's activations and backprops come to the samplers during backward.

A forward hook passes the layer's output through an identity, `Tap`, whose backward hands over what it sees. Autograd
owns the activations in between, so that whatever governs saved tensors (activation checkpointing, offloading) governs
these too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from opacus_fgc._compat.autograd import node_type
from opacus_fgc._compat.pytree import TreeSpec, tree_flatten, tree_unflatten
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.per_sample.precision import autocast_dtype


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in any nesting of tuples, lists and dicts, in order. Called for every call of every layer."""
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind in (tuple, list, dict):  # a tenth of the time that `tree_flatten` takes
        return [tensor for inner in (tree.values() if kind is dict else tree) for tensor in tensors_in(inner)]
    return [] if kind in _SINGLE else [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


_SINGLE = frozenset((bool, float, int, str, type(None)))


class Call:
    """One call of a layer, as its tap sees it during backward. Made for every call of every layer, so it is kept light.

    Attributes:
        activations: the tensors among the arguments, in the order of the call.
        outputs: which leaves of the (flattened) output the backprops belong to.
        batch_axis: the axis of inputs and outputs that counts samples.
        fingerprint: what the layer's sampler noted about the output during forward.
        autocast: whether the forward ran under autocast, and in which dtype.
        places: the places of the rows in the batch, where they are some of it in another order; else None.
        rows_of_a_sample: how many rows each sample has, one after another.
    """

    __slots__ = (
        "_pending",
        "activations",
        "autocast",
        "batch_axis",
        "fingerprint",
        "outputs",
        "places",
        "rows_of_a_sample",
    )

    def __init__(self, pending: _Pending, activations: list[Tensor]) -> None:
        self._pending = pending
        self.activations = activations
        self.outputs = pending.outputs
        self.batch_axis = pending.batch_axis
        self.fingerprint = pending.fingerprint
        self.autocast = pending.autocast
        self.places = pending.samples
        self.rows_of_a_sample = 1

    @property
    def key(self) -> Any:
        """What is the same for this call in each backward pass, and for no other."""
        return self._pending

    @property
    def has_other_arguments(self) -> bool:
        """Whether the call had more than one tensor for its arguments."""
        return self._pending.leaves is not None

    def with_activations(self, activations: list[Tensor]) -> Call:
        """The same call with other activations."""
        return Call(self._pending, activations)

    @property
    def shown_to(self) -> Any:
        """Who has seen this call's backprops first; None before."""
        return self._pending.shown_to

    def is_first_shown_to(self, receiver: Any) -> bool:
        """Whether no other receiver has seen this call's backprops before."""
        if self._pending.shown_to is None:
            self._pending.shown_to = receiver
        return self._pending.shown_to is receiver

    def by_sample(self, rows: Tensor) -> Tensor:
        """Puts rows of this call in the places of their samples, and 0 for samples that have none in it."""
        if self.places is None:
            return rows
        return rows.new_zeros(len(self.places), *rows.shape[1:]).index_copy(0, self.places[: len(rows)], rows)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the call."""
        leaves, spec = self._pending.leaves, self._pending.spec
        if leaves is None or spec is None:
            return tuple(self.activations), {}
        tensors = iter(self.activations)
        return tree_unflatten([next(tensors) if leaf is _TENSOR else leaf for leaf in leaves], spec)


class Use(NamedTuple):
    """One use of a layer's parameters: a call, and the gradients of the loss by its tapped outputs."""

    call: Call
    backprops: tuple[Tensor, ...]


def interleaved(uses: list[Tensor]) -> Tensor:
    """One batch of a tensor of several uses, ``(N, *)`` each: row ``n * len(uses) + u`` is row ``n`` of use ``u``."""
    # Along the second axis, `cat` is much faster than `stack`.
    batch = torch.stack(uses, 1) if uses[0].dim() == 1 else torch.cat(uses, 1)
    return batch.view(-1, *uses[0].shape[1:])


class Interleave:
    """`interleaved`, with a memory of its last result: the layers of a recurrent cell get the same backprops."""

    def __init__(self) -> None:
        self._uses: list[Tensor] = []
        self._batch: Any = None

    def __call__(self, uses: list[Tensor]) -> Tensor:
        """See `interleaved`."""
        if len(uses) != len(self._uses) or not all(map(_same, uses, self._uses)):
            self._uses, self._batch = uses, interleaved(uses)
        return self._batch


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype


class Receiver(Protocol):
    """What a tap hands its backprops to."""

    def __call__(self, call: Call, backprops: tuple[Tensor, ...]) -> None:
        """Takes in the backprops of a call.

        Args:
            call: the call.
            backprops: the gradients of the loss by its tapped outputs.
        """


class _Pending:
    """All of a call but its tensors, which autograd keeps. Made for every call of every layer, so it is kept light."""

    __slots__ = (
        "autocast",
        "batch_axis",
        "entrance",
        "fingerprint",
        "layer",
        "leaves",
        "number",
        "outputs",
        "params",
        "receive",
        "rows",
        "samples",
        "shown_to",
        "spec",
    )

    def __init__(
        self,
        layer: Any,
        entrance: Any,
        params: Collection[Tensor],
        receive: Receiver,
        batch_axis: int,
        samples: Tensor | None,
        number: int,
    ) -> None:
        self.layer = layer
        self.entrance = entrance
        self.number = number
        self.params = params
        self.receive = receive
        self.batch_axis = batch_axis
        self.samples = samples
        self.rows = -1
        self.outputs: tuple[int, ...] = (0,)
        self.leaves: list[Any] | None = None
        self.spec: TreeSpec | None = None
        self.fingerprint: Any = None
        self.shown_to: Any = None
        self.autocast = (False, torch.float32)

    def stands_for(self, param: Tensor) -> bool:
        """Whether the tap is one for this parameter."""
        for own in self.params:  # noqa: SIM110, since any() of a generator takes twice the time, for each leaf of each step
            if own is param:
                return True
        return False

    def take_activations(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Takes the tensors out of a call and remembers their places."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]
        leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


_TENSOR = object()


class Tap(torch.autograd.Function):
    """An identity on a layer's outputs that shows its backprops to a receiver on their way back.

    Inputs are the pending call, the anchor, the outputs and the activations. The anchor is a leaf that every tap hangs
    on: a backward pass to the anchor alone visits all taps and computes no weight gradient.
    """

    @staticmethod
    def forward(ctx: Any, pending: _Pending, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns aliases of the outputs, and has autograd keep the activations."""
        count = len(pending.outputs)
        ctx.pending = pending
        ctx.activation_count = len(tensors) - count
        ctx.save_for_backward(*tensors[count:])
        # An alias that is no view: in-place operations on the output stay allowed.
        return tuple(output.detach() for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor) -> tuple[Tensor | None, ...]:
        """Shows the backprops and passes them on."""
        if torch.is_grad_enabled():
            raise PrivacyNotImplementedError(
                "create_graph=True in a backward through a private model: a gradient inside of a loss, as a gradient "
                "penalty has it, uses the weights a second time, where no per-sample norms are taken. Leave the "
                "penalty out (WGAN also has weight clipping: clamp the weights after optimizer.step())"
            )
        pending = ctx.pending
        pending.receive(Call(pending, [activation.detach() for activation in ctx.saved_tensors]), backprops)
        return (None, None, *backprops, *[None] * ctx.activation_count)


# The types of nodes in the graph; what FSDP puts there is `_compat.distributed.FSDP_NODE`.
TAP_NODE: Any = node_type(Tap)
REENTRANT_NODE: Any = node_type(CheckpointFunction)


def tap(
    output: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    anchor: Tensor,
    params: Collection[Tensor],
    receive: Receiver,
    batch_axis: int,
    fingerprint: Callable[[list[Tensor], int], Any],
    samples: Tensor | None = None,
    layer: Any = None,
    entrance: Any = None,
    number: int = 0,
) -> Any:
    """Taps what a layer returned.

    Args:
        output: the layer's output: a tensor, or any nesting of tuples, lists and dicts with tensors in it.
        args: positional arguments that the layer was called with.
        kwargs: keyword arguments that it was called with.
        anchor: the leaf that all taps of a model hang on, shape ``()``.
        params: the parameters whose use the tap stands for.
        receive: called in backward with the `Call` and the backprops, one for each tapped output.
        batch_axis: the axis of inputs and outputs that counts samples.
        fingerprint: called now with the tapped outputs and the batch axis; its result is kept in the `Call`.
        samples: which samples the rows belong to, for a call on the first some of these; None for a row a sample.
        layer: what the tap is on.
        entrance: the call of the model that this is a part of.
        number: which of the layer's calls in that this is, from 0 on.

    Returns:
        The output, with every tensor that needs a gradient replaced by an alias; as it was if there is none.
    """
    pending = _Pending(layer, entrance, params, receive, batch_axis, samples, number)
    plain = isinstance(output, Tensor)
    outputs, spec = ([output], None) if plain else tree_flatten(output)
    tapped = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not tapped:
        return output
    if not plain:
        pending.outputs = tuple(i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad)
    pending.rows = tapped[0].shape[batch_axis] if tapped[0].dim() > batch_axis else 1
    pending.fingerprint = fingerprint(tapped, batch_axis)
    dtype = autocast_dtype(tapped[0].device.type)
    if dtype is not None:
        pending.autocast = (True, dtype)
    aliases = Tap.apply(pending, anchor, *tapped, *pending.take_activations(args, kwargs))
    if plain:
        return aliases[0]
    for i, alias in zip(pending.outputs, aliases, strict=True):
        outputs[i] = alias
    assert spec is not None
    return tree_unflatten(outputs, spec)
