"""Recurrent layers as a whole: `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`.

The layer itself runs as it is, with torch's fused kernels. From what it was called on, the sampler computes its gates again, in
float32 or wider, and goes backward through time from the gradients of its outputs. That gives the gradients by the gates of each
step; the gradient of a weight is then a sum over steps of outer products with what the weight was multiplied with (`Outer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.recurrent_cells import CELLS, Cell, Gradients, Lstm
from opacus_fgc.norm_samplers.registry import Arranged, Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense, Outer, PerSampleGradient
from opacus_fgc.per_sample.precision import widened


class _Packing:
    """Where the elements of a packed sequence are in a padded batch: ``data[k]`` is step ``steps[k]`` of sample ``samples[k]``.

    Args:
        packed: the sequence.
    """

    def __init__(self, packed: PackedSequence) -> None:
        data, sizes, order, self._back = packed
        self._order = order
        self._shape = int(sizes[0]), len(sizes)
        # On the CPU, where the sizes are, so that no device is waited for.
        steps = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        samples = torch.arange(len(data), device="cpu") - (sizes.cumsum(0) - sizes)[steps]
        self._steps, self._samples = steps.to(data.device), samples.to(data.device)
        if order is not None:
            self._samples = order[self._samples]

    def lengths(self) -> Tensor:
        """How many steps each sample has, shape ``(N,)``."""
        return torch.bincount(self._samples, minlength=self._shape[0])

    def padded(self, data: Tensor) -> Tensor:
        """``(N, T, features)`` from the data of a packed sequence."""
        padded = data.new_zeros(*self._shape, data.shape[1])
        return padded.index_put((self._samples, self._steps), data)

    def data(self, padded: Tensor) -> Tensor:
        """The data of a packed sequence from ``(N, T, features)``."""
        return padded[self._samples, self._steps]

    def orders(self) -> list[Tensor]:
        """The indices by which samples are moved."""
        return [self._samples, *(order for order in (self._order, self._back) if order is not None)]


def arrange(layer: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Arranged:
    """A call of a recurrent layer with the batch first: in states it is second, and in packed sequences nowhere.

    Args:
        layer: the layer.
        args: its positional arguments: ``input`` and ``hx``.
        kwargs: its keyword arguments, likewise.
        output: what it returned.

    Returns:
        Inputs ``(N, T, d)``, the states ``(N, layers * directions, *)`` if there are some, and the lengths ``(N,)`` of packed
        sequences; outputs ``(N, T, directions * P)`` and states.

    Raises:
        NotImplementedError: if it drew dropout between its layers, which cannot be drawn again.
        ValueError: if it was called without a batch axis.
    """
    if layer.training and layer.dropout and layer.num_layers > 1:
        raise PrivacyNotImplementedError(
            f"dropout={layer.dropout} between its {layer.num_layers} layers: which elements were dropped stays inside of torch's "
            "kernels, so that its gates cannot be computed again. Set dropout=0 (layer.dropout = 0.0); or take layers with "
            "num_layers=1 and an nn.Dropout between them"
        )
    args, kwargs = args[:2], dict(kwargs)
    inputs = args[0] if args else kwargs["input"]
    states = args[1] if len(args) > 1 else kwargs.get("hx")
    states = [] if states is None else [states] if isinstance(states, Tensor) else list(states)
    sequence, last = output
    lasts = [last] if isinstance(last, Tensor) else list(last)
    packing = _Packing(inputs) if isinstance(inputs, PackedSequence) else None
    if packing is None and inputs.dim() < 3:
        raise ValueError(
            f"it was called without a batch axis, on shape {tuple(inputs.shape)}, which torch takes for one sequence. Call it on "
            "a batch of sequences, of 3 axes; on one sample as on a batch of one (x[i : i + 1])"
        )

    def batch_first(tensor: Any) -> Tensor:
        if packing is not None:
            return packing.padded(tensor.data)
        return tensor if layer.batch_first else tensor.transpose(0, 1)

    def restored(outputs: Sequence[Tensor]) -> Any:
        whole: Any = outputs[0]
        if packing is not None:
            whole = sequence._replace(data=packing.data(whole))
        elif not layer.batch_first:
            whole = whole.transpose(0, 1)
        # Whoever has hooks on what layers return (FSDP) loses them to in-place operations if it is a view.
        states = tuple(state.transpose(0, 1).clone() for state in outputs[1:])
        return whole, states[0] if isinstance(last, Tensor) else states

    activations = [batch_first(inputs), *(state.transpose(0, 1) for state in states)]
    if packing is not None:
        activations.append(packing.lengths())
    outputs = [batch_first(sequence), *(state.transpose(0, 1) for state in lasts)]
    return Arranged(tuple(activations), outputs, restored, [] if packing is None else packing.orders())


class _Direction(NamedTuple):
    """One direction of one layer, which has run.

    Attributes:
        suffix: of the names of its weights.
        reverse: whether it runs backward in time.
        cell: what ran, in its own order of time.
        inputs: what it ran on, likewise, shape ``(T, N, d)``.
    """

    suffix: str
    reverse: bool
    cell: Cell
    inputs: Tensor

    def in_own_order(self, tensor: Tensor) -> Tensor:
        """A tensor with time first in the direction's order, or back."""
        return tensor.flip(0) if self.reverse else tensor


_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _run(
    layer: nn.RNNBase, inputs: Tensor, states: Sequence[Tensor], valid: Tensor | None
) -> Iterator[list[_Direction]]:
    """Runs one layer after another, each on what the one before it returned.

    Args:
        layer: the layer.
        inputs: shape ``(T, N, d)``.
        states: the first ones, shape ``(layers * directions, N, *)`` each.
        valid: see `Cell`.
    """
    directions = 2 if layer.bidirectional else 1
    for number in range(layer.num_layers):
        ran = []
        for place in range(directions):
            reverse = bool(place)
            suffix = "_".join(("", f"l{number}", *(["reverse"] if reverse else [])))
            named = {kind: getattr(layer, kind + suffix, None) for kind in _KINDS}
            weights = {kind: weight.detach().to(inputs) for kind, weight in named.items() if weight is not None}
            own, steps = (inputs, valid) if not reverse else (inputs.flip(0), None if valid is None else valid.flip(0))
            gates = F.linear(own, weights["weight_ih"], weights.get("bias_ih"))
            state = tuple(of_all[number * directions + place] for of_all in states)
            ran.append(_Direction(suffix, reverse, CELLS[layer.mode](weights, gates, state, steps), own))
        yield ran
        inputs = torch.cat([one.in_own_order(one.cell.outputs) for one in ran], -1)


@register_norm_sampler([nn.LSTM, nn.GRU, nn.RNN], arrange=arrange, recomputes=True)
def recurrent(layer: nn.RNNBase, activations: list[Tensor], backprops: list[Tensor | None]) -> Forms:
    """Any number of layers and directions; see `arrange` for what it gets.

    Backward through time as in Hochreiter & Schmidhuber 1997 and Cho et al. 2014 (`recurrent_cells`).
    """
    inputs, *states = activations
    refuse_unbatched(inputs, 3)
    lengths = states.pop() if states and not states[-1].is_floating_point() else None
    some = next(gradient for gradient in backprops if gradient is not None)
    dtype = torch.promote_types(*(widened(tensor.dtype) for tensor in (some, next(layer.parameters()))))
    inputs = inputs.transpose(0, 1).to(dtype)
    valid = None
    if lengths is not None:
        valid = (torch.arange(len(inputs), device=lengths.device)[:, None] < lengths)[:, :, None]
    directions = 2 if layer.bidirectional else 1
    hidden = layer.proj_size or layer.hidden_size

    def time_first(tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        several = [*tensors, *[None] * len(shapes)]
        return [
            inputs.new_zeros(shape) if one is None else one.transpose(0, 1).to(dtype)
            for one, shape in zip(several, shapes, strict=False)
        ]

    states_of_all = layer.num_layers * directions, inputs.shape[1]
    shapes = [(*states_of_all, hidden), *([(*states_of_all, layer.hidden_size)] if layer.mode == "LSTM" else [])]
    ran = list(_run(layer, inputs, time_first(states, shapes), valid))
    by_outputs, *by_last = time_first(backprops, [(*inputs.shape[:2], directions * hidden), *shapes])
    forms: Forms = {}
    for number in reversed(range(layer.num_layers)):
        by_inputs: list[Tensor] = []
        for place, (one, own) in enumerate(zip(ran[number], by_outputs.chunk(directions, -1), strict=True)):
            state = tuple(gradient[number * directions + place] for gradient in by_last)
            gradients = one.cell.backward(one.in_own_order(own), state)
            by_inputs.append(one.in_own_order(gradients.by_input_gates @ one.cell.weights["weight_ih"]))
            for kind, form in _forms(layer, one, gradients).items():
                forms[getattr(layer, kind + one.suffix)] = form
        by_outputs = torch.stack(by_inputs).sum(0)
    return forms


def _forms(layer: nn.RNNBase, one: _Direction, gradients: Gradients) -> Mapping[str, PerSampleGradient]:
    def trained(kind: str) -> bool:
        param = getattr(layer, kind + one.suffix, None)
        return param is not None and param.requires_grad

    def outer(kind: str, left: Tensor, right: Tensor) -> Outer:
        # Steps are in the direction's order on both sides, so that their sum is the same.
        return Outer(left.transpose(0, 1), right.transpose(0, 1), getattr(layer, kind + one.suffix).shape)

    forms: dict[str, PerSampleGradient] = {}
    sides = {
        "ih": (gradients.by_input_gates, one.inputs),
        "hh": (gradients.by_hidden_gates, one.cell.before),
    }
    for side, (by_gates, inputs) in sides.items():
        if trained(f"weight_{side}"):
            forms[f"weight_{side}"] = outer(f"weight_{side}", by_gates, inputs)
        if trained(f"bias_{side}"):
            forms[f"bias_{side}"] = Dense(by_gates.sum(0))
    if isinstance(one.cell, Lstm) and trained("weight_hr"):
        forms["weight_hr"] = outer("weight_hr", gradients.by_hidden, one.cell.unprojected)
    return forms
