"""What losses depend on, read off autograd's graph: which tapped calls, and which parameters past their taps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from opacus_fgc._compat.autograd import gradient_dtypes
from opacus_fgc._compat.distributed import FSDP_NODE
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.per_sample.precision import HALF
from opacus_fgc.taps.routes import moves_rows, selected
from opacus_fgc.taps.tap import REENTRANT_NODE, TAP_NODE


class Reached(NamedTuple):
    """What something depends on.

    Attributes:
        model: whether there are taps of the model.
        past: parameters that were looked for, and that are used by a way on which no tap stands for them.
        before_model: other leaves, on ways that no tap of the model stands on: between its outputs and the loss.
        in_model: other leaves, on ways behind its taps.
        other_models: whether there are taps of other models behind its own.
        calls: the tapped calls of the model, each a `Call.key`.
        nodes: what the graph has for each of them.
        moving: the operations on the way that may move rows by indices; see `taps.routes`.
    """

    model: bool
    past: set[Tensor]
    before_model: set[Tensor]
    in_model: set[Tensor]
    other_models: bool
    calls: list[Any]
    nodes: list[Any]
    moving: list[Any]


def reached_by(
    outputs: Iterable[Tensor], params: Iterable[Tensor], inputs: Iterable[Tensor] = (), anchor: Tensor | None = None
) -> Reached:
    """What something depends on but for what taps stand for.

    Gradients of parameters past their taps would be missing from the norms: a weight used by another module than its own
    (``F.linear(x, embedding.weight)``), a penalty on the weights inside the loss, a module that calls a child's weight and not
    the child.

    Args:
        outputs: a loss, or what a module returned; with their autograd graph.
        params: the parameters to look for.
        inputs: where the search ends.
        anchor: of the model whose taps are its own; without it all are.

    Raises:
        NotImplementedError: if a part of the graph is hidden by reentrant checkpointing.
    """
    wanted = params if isinstance(params, Set) else set(params)
    past: set[Tensor] = set()
    others: tuple[set[Tensor], set[Tensor]] = (set(), set())
    model, other_models, behind = False, False, 0
    seen = set(_nodes(inputs))
    todo, later = _nodes(outputs), list[Any]()
    calls, nodes, moving = list[Any](), list[Any](), list[Any]()
    while todo:
        for node in _visit(todo, seen, moving):
            if type(node) is TAP_NODE:
                edges, call = [_behind(*edge) for edge in node.next_functions], node.pending
                own = anchor is None or _leaf(edges[0]) is anchor
                if own:
                    calls.append(call)
                    nodes.append(node)
                model, other_models = model or own, other_models or (bool(behind) and not own)
                end = 1 + len(call.outputs)
                (later if own and not behind else todo).extend(edges[end:])
                # Inside of the layer: from its output back to where its input came from, or to the tap of a child.
                for inner in _visit(edges[1:end], set(edges[end:])):
                    if type(inner) is TAP_NODE:
                        todo.append(inner)
                    elif (leaf := _leaf(inner)) is not None and not call.stands_for(leaf):
                        (past if leaf in wanted else others[1]).add(leaf)
            elif type(node) is REENTRANT_NODE:
                raise PrivacyNotImplementedError(
                    "activation checkpointing with use_reentrant=True keeps layers out of the graph, so that no tap is "
                    "on them; pass use_reentrant=False"
                )
            elif (leaf := _leaf(node)) is not None:
                (past if leaf in wanted else others[behind]).add(leaf)
        todo, later, behind = later, [], 1
    return Reached(model, past, *others, other_models, calls, nodes, moving)


def before_call(node: Any) -> set[Any]:
    """The tapped calls that a call got its activations from, each a `Call.key`.

    Args:
        node: what the graph has for the call; see `Reached`.
    """
    edges = [_behind(*edge) for edge in node.next_functions[1 + len(node.pending.outputs) :]]
    return {one.pending for one in _visit(edges, set()) if type(one) is TAP_NODE}


def brought_by(inputs: Iterable[Tensor]) -> dict[Tensor, bool]:
    """The leaves with a gradient that inputs of a model depend on, and whether they are inputs themselves."""
    with_gradient = [tensor for tensor in inputs if tensor.requires_grad]
    return (
        {leaf: any(leaf is one for one in with_gradient) for leaf in leaves_of(with_gradient)} if with_gradient else {}
    )


def made_by(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves with a gradient, on ways that no tap stands on, that outputs of a model depend on, but for parameters."""
    with_gradient = [tensor for tensor in outputs if tensor.requires_grad]
    return (leaf for leaf in leaves_of(with_gradient) if not isinstance(leaf, nn.Parameter))


def _visit(todo: list[Any], seen: set[Any], moving: list[Any] | None = None) -> Iterator[Any]:
    """Taps and ends of a graph, each once, from the nodes in ``todo`` on; behind a tap only what the caller puts there.

    It runs over the whole graph of every step, so it is kept light.

    Args:
        todo: where to begin.
        seen: what is not to be visited; it is added to.
        moving: nodes that may move rows by indices are added to it.
    """
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        edges = () if type(node) is TAP_NODE else node.next_functions
        if edges and type(node) is not REENTRANT_NODE:
            if moving is not None and moves_rows(node):
                moving.append(node)
            for edge, place in edges:
                todo.append(edge if type(edge) is not FSDP_NODE else _behind(edge, place))
        else:
            yield node


def _behind(node: Any, place: int) -> Any:
    """Where an edge of the graph leads to, past what FSDP puts in front of a module: one node, an identity on several inputs."""
    while type(node) is FSDP_NODE:
        node, place = node.next_functions[place]
    return node


def _nodes(tensors: Iterable[Tensor]) -> list[Any]:
    return [_behind(tensor.grad_fn, tensor.output_nr) for tensor in tensors]


def goes_through(losses: Tensor, dtypes: Collection[torch.dtype] = HALF) -> bool:
    """Whether gradients have one of these dtypes somewhere on their way, such as in a frozen part of a model.

    In half precision each of them is rounded there, so that the gradient of a loss times a coefficient is not the coefficient
    times that of the loss.

    Args:
        losses: shape ``(N,)``, with their autograd graph.
        dtypes: those of half precision if left out.
    """
    todo, seen = _nodes([losses]), set[Any]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(dtype in dtypes for dtype in gradient_dtypes(node)):
            return True
        todo.extend(edge for edge, _ in node.next_functions)
    return False


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that something depends on, or is."""
    outputs = list(outputs)
    behind = _visit(_nodes(outputs), set())
    leaves = [output for output in outputs if output.is_leaf] + [_leaf(node) for node in behind]
    return [leaf for leaf in leaves if leaf is not None]


def part_of(tensor: Tensor) -> tuple[Tensor, int, GradientEdge | None] | None:
    """The part of a leaf that a tensor is computed from, if it is from one place along the leaf's first axis alone.

    Returns:
        The leaf, the place, and where the graph has the part; None for the latter if the tensor is the part itself.
    """
    node, edge = tensor.grad_fn, None
    while node is not None and len([one for one, _ in node.next_functions if one is not None]) == 1:
        before = next(one for one, _ in node.next_functions if one is not None)
        leaf = _leaf(before)
        if leaf is not None:
            place = selected(node)
            if place is None or leaf.dim() < 2:
                return None
            return leaf, place % len(leaf), edge
        node, edge = before, GradientEdge(before, 0)
    return None


def leaf_of_view(tensor: Tensor) -> tuple[Tensor, bool] | None:
    """The leaf that a tensor is all of, by views alone: of other sizes, and perhaps with the last two axes swapped.

    Returns:
        The leaf, and whether its elements are in the order of the tensor's transpose; None if the tensor is something else.
    """
    node = tensor.grad_fn
    while node is not None and type(node).__name__.startswith(_VIEWS):
        node = node.next_functions[0][0]
    leaf = tensor if tensor.is_leaf else _leaf(node)
    if leaf is None or leaf.numel() != tensor.numel() or not leaf.is_contiguous():
        return None
    if leaf.data_ptr() != tensor.data_ptr() or tensor.dim() < 2:
        return None
    return next(((leaf, swapped) for swapped in (False, True) if (tensor, tensor.mT)[swapped].is_contiguous()), None)


_VIEWS = ("TransposeBackward", "PermuteBackward", "ViewBackward", "UnsafeViewBackward", "UnflattenBackward")


def depends_past(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> bool:
    """Whether outputs depend on something with a gradient by another way than by their inputs."""
    ends = _visit(_nodes(outputs), set(_nodes(inputs)))
    return any(type(node) in (TAP_NODE, REENTRANT_NODE) or _leaf(node) is not None for node in ends)


def _leaf(node: Any) -> Tensor | None:
    return getattr(node, "variable", None)
