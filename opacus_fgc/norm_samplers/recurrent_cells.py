"""The cells of recurrent layers over time: forward with all that backward needs, and backward to the gates.

Each cell has hidden states ``h`` of shape ``(N, P)``, and gates that a linear map of the input and one of the hidden state before
go into. Time is the first axis, and runs forward; whoever has it run backward flips it before and after. The products with
the hidden state go step by step; all else is computed for all steps at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
"""The hidden state, and the cell state where there is one."""


class Gradients(NamedTuple):
    """What backward through time gives, time first.

    Attributes:
        by_input_gates: of the input's side of the gates, shape ``(T, N, G)``.
        by_hidden_gates: of the hidden state's side, likewise.
        by_hidden: by the hidden states that the steps returned, shape ``(T, N, P)``.
    """

    by_input_gates: Tensor
    by_hidden_gates: Tensor
    by_hidden: Tensor


class Cell(ABC):
    """A cell that has run over time.

    Args:
        weights: its weights, by the first part of their names in torch's layers (``"weight_hh"``), in one dtype.
        gates: the linear map of the inputs, with its bias, shape ``(T, N, G)``.
        state: before the first step, shape ``(N, P)`` or ``(N, H)`` each.
        valid: which steps are of a sequence, and not of padding, shape ``(T, N, 1)``; None if all are. Others leave the state
            as it is.

    Attributes:
        outputs: the hidden state after each step, shape ``(T, N, P)``.
        before: that before each step, likewise.
    """

    def __init__(self, weights: Mapping[str, Tensor], gates: Tensor, state: State, valid: Tensor | None) -> None:
        self.weights = weights
        self._valid = valid
        states, kept = [state], []
        for step, of_step in enumerate(gates.unbind(0)):
            after, own = self._step(of_step, state)
            if valid is not None:
                after = tuple(torch.where(valid[step], *both) for both in zip(after, state, strict=True))
            state = after
            states.append(state)
            kept.append(own)
        hidden = torch.stack([one[0] for one in states])
        self.outputs, self.before = hidden[1:], hidden[:-1]
        self._others = [torch.stack(several)[:-1] for several in list(zip(*states, strict=True))[1:]]
        self._kept = [torch.stack(several) for several in zip(*kept, strict=True)]

    def backward(self, by_outputs: Tensor, by_last: State) -> Gradients:
        """Backward through time.

        Args:
            by_outputs: gradients by `outputs`.
            by_last: those by the last state, on top of that.
        """
        self._prepare()
        by_state, hidden_gates, hidden = by_last, [], []
        for step in reversed(range(len(by_outputs))):
            of_step: State = (by_state[0] + by_outputs[step], *by_state[1:])
            passed: State = ()
            if self._valid is not None:
                passed = tuple(gradient.masked_fill(self._valid[step], 0) for gradient in of_step)
                of_step = tuple(gradient.masked_fill(~self._valid[step], 0) for gradient in of_step)
            by_gates, by_state = self._step_back(step, of_step)
            if passed:
                by_state = tuple(a + b for a, b in zip(by_state, passed, strict=True))
            hidden_gates.append(by_gates)
            hidden.append(of_step[0])
        by_hidden_gates, by_hidden = (torch.stack(several[::-1]) for several in (hidden_gates, hidden))
        return Gradients(self._by_input_gates(by_hidden, by_hidden_gates), by_hidden_gates, by_hidden)

    def _of_hidden(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weights["weight_hh"], self.weights.get("bias_hh"))

    @abstractmethod
    def _step(self, gates: Tensor, state: State) -> tuple[State, State]:
        """The state after a step, and what `_prepare` is to have of each step."""

    @abstractmethod
    def _prepare(self) -> None:
        """Computes the slopes that `_step_back` multiplies with, for all steps."""

    @abstractmethod
    def _step_back(self, step: int, by_state: State) -> tuple[Tensor, State]:
        """The gradients by the hidden state's side of the gates, and by the state before the step."""

    def _by_input_gates(self, by_hidden: Tensor, by_hidden_gates: Tensor) -> Tensor:
        return by_hidden_gates


class Elman(Cell):
    """``h' = f(a)`` with ``a = W_ih x + b_ih + W_hh h + b_hh`` (Elman 1990), and for f what a subclass says."""

    _slopes: Tensor

    def _step_back(self, step: int, by_state: State) -> tuple[Tensor, State]:
        by_gates = by_state[0] * self._slopes[step]
        return by_gates, (by_gates @ self.weights["weight_hh"],)


class Tanh(Elman):
    """With the hyperbolic tangent."""

    def _step(self, gates: Tensor, state: State) -> tuple[State, State]:
        return ((gates + self._of_hidden(state[0])).tanh_(),), ()

    def _prepare(self) -> None:
        self._slopes = 1 - self.outputs.square()


class Relu(Elman):
    """With max(0, a)."""

    def _step(self, gates: Tensor, state: State) -> tuple[State, State]:
        return ((gates + self._of_hidden(state[0])).relu_(),), ()

    def _prepare(self) -> None:
        self._slopes = (self.outputs > 0).to(self.outputs.dtype)


class Gru(Cell):
    """Gated recurrent units (Cho et al. 2014, arXiv:1406.1078), as torch has them; gates r, z, n in this order.

    ``h' = n + z (h - n)`` with ``n = tanh(a_n + r (W_hn h + b_hn))``, ``r = sigmoid(a_r + W_hr h + b_hr)`` and z likewise.
    """

    def _step(self, gates: Tensor, state: State) -> tuple[State, State]:
        (hidden,) = state
        of_hidden, size = self._of_hidden(hidden), hidden.shape[1]
        both = (gates[:, : 2 * size] + of_hidden[:, : 2 * size]).sigmoid_()
        inner = of_hidden[:, 2 * size :]
        new = torch.addcmul(gates[:, 2 * size :], both[:, :size], inner).tanh_()
        return (new + both[:, size:] * (hidden - new),), (both, inner, new)

    def _prepare(self) -> None:
        both, inner, new = self._kept
        reset, self._update = both.chunk(2, -1)
        by_new = (1 - self._update) * (1 - new.square())
        by_update = (self.before - new) * self._update * (1 - self._update)
        by_reset = by_new * inner * reset * (1 - reset)
        self._slopes = torch.cat([by_reset, by_update, by_new * reset], -1)
        self._input_slopes = torch.cat([by_reset, by_update, by_new], -1)

    def _step_back(self, step: int, by_state: State) -> tuple[Tensor, State]:
        (by_hidden,) = by_state
        by_gates = by_hidden.repeat(1, 3) * self._slopes[step]
        return by_gates, (torch.addmm(by_hidden * self._update[step], by_gates, self.weights["weight_hh"]),)

    def _by_input_gates(self, by_hidden: Tensor, by_hidden_gates: Tensor) -> Tensor:
        return by_hidden.repeat(1, 1, 3) * self._input_slopes


class Lstm(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997), as torch has it; gates i, f, g, o in this order.

    ``c' = f c + i g`` and ``h' = o tanh(c')``, with ``g = tanh(a_g)`` and sigmoids of the others; with a projection (Sak et al.
    2014, arXiv:1402.1128) ``h' = W_hr o tanh(c')``.

    Attributes:
        unprojected: ``o tanh(c')`` of each step, shape ``(T, N, H)``, after backward.
    """

    unprojected: Tensor

    def _step(self, gates: Tensor, state: State) -> tuple[State, State]:
        hidden, cell = state
        i, f, g, o = (gates + self._of_hidden(hidden)).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = torch.addcmul(f * cell, i, g)
        squashed = cell.tanh()
        hidden = o * squashed
        if "weight_hr" in self.weights:
            hidden = F.linear(hidden, self.weights["weight_hr"])
        return (hidden, cell), (i, f, g, o, squashed)

    def _prepare(self) -> None:
        i, self._forget, g, o, squashed = self._kept
        (cells,) = self._others
        self.unprojected = o * squashed
        self._by_cell = o * (1 - squashed.square())
        slopes = [
            g * i * (1 - i),
            cells * self._forget * (1 - self._forget),
            i * (1 - g.square()),
            squashed * o * (1 - o),
        ]
        self._slopes = torch.cat(slopes, -1)

    def _step_back(self, step: int, by_state: State) -> tuple[Tensor, State]:
        by_hidden, by_cell = by_state
        if "weight_hr" in self.weights:
            by_hidden = by_hidden @ self.weights["weight_hr"]
        by_cell = torch.addcmul(by_cell, by_hidden, self._by_cell[step])
        by_gates = torch.cat([by_cell, by_cell, by_cell, by_hidden], 1) * self._slopes[step]
        return by_gates, (by_gates @ self.weights["weight_hh"], by_cell * self._forget[step])


CELLS: dict[str, type[Cell]] = {"RNN_TANH": Tanh, "RNN_RELU": Relu, "GRU": Gru, "LSTM": Lstm}
"""By what torch calls them (``nn.RNNBase.mode``)."""
