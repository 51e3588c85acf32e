"""Taps: the way by which a layer's activations and backprops come to the samplers during backward.

A forward hook passes the layer's output through an identity, `Tap`, whose backward hands over what it sees. Autograd
owns the activations in between, so that whatever governs saved tensors (activation checkpointing, offloading) governs
these too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.routes import moves_rows


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in any nesting of tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class Call:
    """One call of a layer, as its tap sees it during backward. Made for every call of every layer, so it is kept light.

    Attributes:
        activations: the tensors among the arguments, in the order of the call.
        outputs: which leaves of the (flattened) output the backprops belong to.
        batch_axis: the axis of inputs and outputs that counts samples.
        fingerprint: what the layer's sampler noted about the output during forward.
        autocast: whether the forward ran under autocast, and in which dtype.
    """

    __slots__ = ("_pending", "activations", "autocast", "batch_axis", "fingerprint", "outputs")

    def __init__(self, pending: _Pending, activations: list[Tensor]) -> None:
        self._pending = pending
        self.activations = activations
        self.outputs = pending.outputs
        self.batch_axis = pending.batch_axis
        self.fingerprint = pending.fingerprint
        self.autocast = pending.autocast

    @property
    def key(self) -> Any:
        """What is the same for this call in each backward pass, and for no other."""
        return self._pending

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
        samples = self._pending.samples
        if samples is None:
            return rows
        return rows.new_zeros(len(samples), *rows.shape[1:]).index_copy(0, samples[: len(rows)], rows)

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
        self._batch = torch.empty(0, device="cpu")

    def __call__(self, uses: list[Tensor]) -> Tensor:
        """See `interleaved`."""
        if len(uses) != len(self._uses) or not all(map(_same, uses, self._uses)):
            self._uses, self._batch = uses, interleaved(uses)
        return self._batch


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype


Receiver = Callable[[Call, tuple[Tensor, ...]], None]


class _Pending:
    """All of a call but its tensors, which autograd keeps. Made for every call of every layer, so it is kept light."""

    __slots__ = (
        "autocast",
        "batch_axis",
        "entrance",
        "fingerprint",
        "layer",
        "leaves",
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
    ) -> None:
        self.layer = layer
        self.entrance = entrance
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
        return any(param is own for own in self.params)

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


# The types of nodes in the graph.
_TAP_NODE: Any = Tap._backward_cls
_REENTRANT_NODE: Any = CheckpointFunction._backward_cls
_FSDP_NODE: Any = RegisterPostBackwardFunction._backward_cls


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

    Returns:
        The output, with every tensor that needs a gradient replaced by an alias; as it was if there is none.
    """
    pending = _Pending(layer, entrance, params, receive, batch_axis, samples)
    plain = isinstance(output, Tensor)
    outputs, spec = ([output], None) if plain else tree_flatten(output)
    tapped = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not tapped:
        return output
    if not plain:
        pending.outputs = tuple(i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad)
    pending.rows = tapped[0].shape[batch_axis] if tapped[0].dim() > batch_axis else 1
    pending.fingerprint = fingerprint(tapped, batch_axis)
    device = tapped[0].device.type
    if torch.is_autocast_enabled(device):
        pending.autocast = (True, torch.get_autocast_dtype(device))
    aliases = Tap.apply(pending, anchor, *tapped, *pending.take_activations(args, kwargs))
    if plain:
        return aliases[0]
    for i, alias in zip(pending.outputs, aliases, strict=True):
        outputs[i] = alias
    assert spec is not None
    return tree_unflatten(outputs, spec)


class Reached(NamedTuple):
    """What something depends on.

    Attributes:
        model: whether there are taps of the model.
        past: parameters that were looked for, and that are used by a way on which no tap stands for them.
        before_model: other leaves, on ways that no tap of the model stands on: between its outputs and the loss.
        in_model: other leaves, on ways behind its taps.
        other_models: whether there are taps of other models behind its own.
        calls: the tapped calls of the model, each a `Call.key`.
        moving: the operations on the way that may move rows by indices; see `routes`.
    """

    model: bool
    past: set[Tensor]
    before_model: set[Tensor]
    in_model: set[Tensor]
    other_models: bool
    calls: list[Any]
    moving: list[Any]


def reached_by(
    outputs: Iterable[Tensor], params: Iterable[Tensor], inputs: Iterable[Tensor] = (), anchor: Tensor | None = None
) -> Reached:
    """What something depends on but for what taps stand for.

    Gradients of parameters past their taps would escape the norms: a weight used by another module than its own (``F.linear(x,
    embedding.weight)``), a penalty on the weights inside the loss, a module that calls a child's weight and not the child.

    Args:
        outputs: a loss, or what a module returned; with their autograd graph.
        params: the parameters to look for.
        inputs: where the search ends.
        anchor: of the model whose taps are its own; without it all are.

    Raises:
        NotImplementedError: if a part of the graph is hidden by reentrant checkpointing.
    """
    wanted = set(params)
    past: set[Tensor] = set()
    others: tuple[set[Tensor], set[Tensor]] = (set(), set())
    model, other_models, behind = False, False, 0
    seen = set(_nodes(inputs))
    todo, later = _nodes(outputs), list[Any]()
    calls, moving = list[Any](), list[Any]()
    while todo:
        for node in _visit(todo, seen, moving):
            if type(node) is _TAP_NODE:
                own = anchor is None or _leaf(node.next_functions[0][0]) is anchor
                if own:
                    calls.append(node.pending)
                model, other_models = model or own, other_models or (bool(behind) and not own)
                edges = [_behind(*edge) for edge in node.next_functions]
                end = 1 + len(node.pending.outputs)
                (later if own and not behind else todo).extend(edges[end:])
                # Inside of the layer: from its output back to where its input came from, or to the tap of a child.
                for inner in _visit(edges[1:end], set(edges[end:])):
                    if type(inner) is _TAP_NODE:
                        todo.append(inner)
                    elif _leaf(inner) is not None and not node.pending.stands_for(inner.variable):
                        (past if inner.variable in wanted else others[1]).add(inner.variable)
            elif type(node) is _REENTRANT_NODE:
                raise PrivacyNotImplementedError(
                    "activation checkpointing with use_reentrant=True keeps layers out of the graph, so that no tap is "
                    "on them; pass use_reentrant=False"
                )
            elif _leaf(node) is not None:
                (past if node.variable in wanted else others[behind]).add(node.variable)
        todo, later, behind = later, [], 1
    return Reached(model, past, *others, other_models, calls, moving)


def brought_by(inputs: Iterable[Tensor]) -> dict[Tensor, bool]:
    """The leaves with a gradient that inputs of a model depend on, and whether they are inputs themselves."""
    with_gradient = [tensor for tensor in inputs if tensor.requires_grad]
    return (
        {leaf: any(leaf is one for one in with_gradient) for leaf in leaves_of(with_gradient)} if with_gradient else {}
    )


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
        edges = () if type(node) is _TAP_NODE else node.next_functions
        if edges and type(node) is not _REENTRANT_NODE:
            if moving is not None and moves_rows(node):
                moving.append(node)
            for edge, place in edges:
                todo.append(edge if type(edge) is not _FSDP_NODE else _behind(edge, place))
        else:
            yield node


def _behind(node: Any, place: int) -> Any:
    """Where an edge of the graph leads to, past what FSDP puts in front of a module: one node, an identity on several inputs."""
    while type(node) is _FSDP_NODE:
        node, place = node.next_functions[place]
    return node


def _nodes(tensors: Iterable[Tensor]) -> list[Any]:
    return [_behind(tensor.grad_fn, tensor.output_nr) for tensor in tensors]


def leaves_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that something depends on, or is."""
    outputs = list(outputs)
    behind = _visit(_nodes(outputs), set())
    leaves = [output for output in outputs if output.is_leaf] + [_leaf(node) for node in behind]
    return [leaf for leaf in leaves if leaf is not None]


def depends_past(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> bool:
    """Whether outputs depend on something with a gradient by another way than by their inputs."""
    ends = _visit(_nodes(outputs), set(_nodes(inputs)))
    return any(type(node) in (_TAP_NODE, _REENTRANT_NODE) or _leaf(node) is not None for node in ends)


def _leaf(node: Any) -> Tensor | None:
    return getattr(node, "variable", None)
