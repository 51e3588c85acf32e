"""Taps: the way by which a layer's activations and backprops come to the samplers during backward.

A forward hook passes the layer's output through an identity, `Tap`, whose backward hands over what it sees. Autograd
owns the activations in between, so that whatever governs saved tensors (activation checkpointing, offloading) governs
these too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in any nesting of tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Call:
    """One call of a layer, as its tap sees it during backward.

    Attributes:
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        outputs: which leaves of the (flattened) output the backprops belong to.
        batch_axis: the axis of inputs and outputs that counts samples.
        fingerprint: what the layer's sampler noted about the output during forward.
        autocast: whether the forward ran under autocast, and in which dtype.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    batch_axis: int
    fingerprint: Any
    autocast: tuple[bool, torch.dtype]

    @property
    def activations(self) -> list[Tensor]:
        """The tensors among the arguments, in the order of the call."""
        return tensors_in((self.args, self.kwargs))


Receiver = Callable[[Call, tuple[Tensor, ...]], None]


class _Pending:
    """All of a call but its tensors, which autograd keeps."""

    def __init__(self, params: frozenset[Tensor], receive: Receiver) -> None:
        self.params = params
        self.receive = receive
        self.leaves: list[Any] = []
        self.spec: TreeSpec | None = None
        self.positions: list[int] = []
        self.outputs: tuple[int, ...] = ()
        self.batch_axis = 0
        self.fingerprint: Any = None
        self.autocast = (False, torch.float32)

    def with_activations(self, activations: tuple[Tensor, ...]) -> Call:
        """The call, with its tensors in their places."""
        leaves = list(self.leaves)
        for position, activation in zip(self.positions, activations, strict=True):
            leaves[position] = activation.detach()
        assert self.spec is not None
        args, kwargs = tree_unflatten(leaves, self.spec)
        return Call(args, kwargs, self.outputs, self.batch_axis, self.fingerprint, self.autocast)


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
    @once_differentiable
    def backward(ctx: Any, *backprops: Tensor) -> tuple[Tensor | None, ...]:
        """Shows the backprops and passes them on."""
        ctx.pending.receive(ctx.pending.with_activations(ctx.saved_tensors), backprops)
        return (None, None, *backprops, *[None] * ctx.activation_count)


def tap(
    output: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    anchor: Tensor,
    params: Iterable[Tensor],
    receive: Receiver,
    batch_axis: int,
    fingerprint: Callable[[list[Tensor], int], Any],
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

    Returns:
        The output, with every tensor that needs a gradient replaced by an alias; as it was if there is none.
    """
    outputs, output_spec = tree_flatten(output)
    tapped = tuple(i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad)
    if not tapped:
        return output
    pending = _Pending(frozenset(params), receive)
    pending.leaves, pending.spec = tree_flatten((args, kwargs))
    pending.positions = [i for i, leaf in enumerate(pending.leaves) if isinstance(leaf, Tensor)]
    activations = [pending.leaves[i] for i in pending.positions]
    for i in pending.positions:
        pending.leaves[i] = None
    pending.outputs = tapped
    pending.batch_axis = batch_axis
    pending.fingerprint = fingerprint([outputs[i] for i in tapped], batch_axis)
    device = outputs[tapped[0]].device.type
    pending.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    aliases = Tap.apply(pending, anchor, *[outputs[i] for i in tapped], *activations)
    for i, alias in zip(tapped, aliases, strict=True):
        outputs[i] = alias
    return tree_unflatten(outputs, output_spec)


def untapped(loss: Tensor, params: Iterable[Tensor]) -> set[Tensor]:
    """The parameters that a loss depends on by a way on which no tap stands.

    Their gradients would escape the norms: a weight used by another module than its own (``F.linear(x,
    embedding.weight)``), a penalty on the weights inside the loss, a module that calls a child's weight and not the child.

    Args:
        loss: a tensor with its autograd graph.
        params: the parameters to look for.

    Returns:
        Those among ``params`` that are used outside of the layers that were tapped for them.
    """
    wanted = set(params)
    found = set()
    seen: set[Any] = set()
    # Nodes outside of all layers; and, by the tap that stands for it, nodes between a layer's output and its input.
    todo: list[tuple[Any, Any]] = [(loss.grad_fn, None)]
    while todo:
        node, owner = todo.pop()
        if node is None or (node, owner) in seen:
            continue
        seen.add((node, owner))
        pending = getattr(node, "pending", None)
        if isinstance(pending, _Pending):
            edges = [edge[0] for edge in node.next_functions][1:]
            count = len(pending.outputs)
            todo += [(edge, None) for edge in edges[count:]]
            seen.update((edge, node) for edge in edges[count:])
            todo += [(edge, node) for edge in edges[:count]]
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and variable in wanted and (owner is None or variable not in owner.pending.params):
            found.add(variable)
        todo += [(edge[0], owner) for edge in node.next_functions]
    return found
