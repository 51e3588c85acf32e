"""Torch's own recurrent layers: what the matrix of cases (test_exact.py) does not have."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import GradSampleModuleFastGradientClipping, PrivacyEngine, check, planner
from opacus_fgc.certificates.model import CertifiedModel
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.loss import MODES
from tests.case import Apply, two_passes_by_hand
from tests.reference import reference
from tests.test_rows_with_owners import assert_clipped, both_modes, squares, wrapped

N, T, D, H = 5, 6, 3, 4
KINDS: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm-projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Using(nn.Module):
    """Gives of each sample some of what a layer returns: sequence, hidden and cell state."""

    def __init__(self, layer: nn.RNNBase, used: str) -> None:
        super().__init__()
        self.layer, self.used = layer, used

    def forward(self, x: Tensor) -> Tensor:
        axis = 0 if self.layer.batch_first else 1
        output, last = self.layer(x.movedim(0, axis))
        states = [last] if isinstance(last, Tensor) else last
        rows = {"o": output.movedim(axis, 0), "h": states[0].transpose(0, 1), "c": states[-1].transpose(0, 1).sin()}
        return torch.cat([rows[one].flatten(1) for one in self.used], 1)


@pytest.mark.every(3)
@pytest.mark.parametrize("used", ["o", "h", "c", "oh", "ohc"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_that_a_loss_may_use(kind: str, used: str) -> None:
    make, options = KINDS[kind]
    for layers, both, first, bias in itertools.product((1, 2), *[(False, True)] * 3):
        torch.manual_seed(0)
        layer = make(D, H, num_layers=layers, bidirectional=both, batch_first=first, bias=bias, **options)
        assert_clipped(*wrapped(Using(layer, used), squares, "ghost" if first else "ghost_bk"), torch.randn(N, T, D))


def lstm(**options: Any) -> nn.LSTM:
    return nn.LSTM(D, H, batch_first=True, **options)


def packed(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """Sequence and states of a packed sequence that begins with states of its own, twice the same layer."""
    sequences = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    state = m.start(x[:, 0])[None].repeat(2, 1, 1)
    output, (hidden, cell) = m.r(sequences, (state, state.tanh()))
    first = pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]
    again = pad_packed_sequence(m.r(sequences)[0], batch_first=True, total_length=x.shape[1])[0]
    return torch.cat([(first + again * first).flatten(1), hidden[-1], cell[0]], 1)


def sorted_by_hand(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    lengths, order = lengths.sort(descending=True)
    return m.r(pack_padded_sequence(x[order], lengths, batch_first=True))[1][0][-1][order.argsort()]


def of_lists(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rows = [row[:length] for row, length in zip(x, lengths.tolist(), strict=True)]
    return m.r(pack_sequence(rows, enforce_sorted=False))[1][1][-1]


def in_place(m: Any, x: Tensor) -> Tensor:
    """What a layer returned is written into, and has the strides that it always had."""
    output, (hidden, _) = m.r(x.transpose(0, 1))
    output[0] += 1
    output.mul_(2)
    hidden.mul_(3)
    return output.view(T, -1, H).transpose(0, 1) + hidden.view(2, 1, -1, H)[1].transpose(0, 1)


class Learned(nn.Module):
    """States to begin with are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.h, self.c = lstm(), nn.Parameter(torch.randn(1, 1, H)), nn.Parameter(torch.randn(1, 1, H))

    def forward(self, x: Tensor) -> Tensor:
        states = self.h.expand(1, len(x), H).contiguous(), self.c.repeat(1, len(x), 1)
        return self.r(x, states)[0]


class Inherited(nn.LSTM):
    pass


class First(nn.LSTM):
    """Served otherwise: another forward, of one output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def in_eval(model: Any) -> Any:
    model.r.eval()
    return model


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: Apply(packed, r=lstm(bidirectional=True), start=nn.Linear(D, H)),
    "sorted-by-hand": lambda: Apply(sorted_by_hand, r=lstm()),
    "of-lists": lambda: Apply(of_lists, r=lstm()),
    "learned-states": Learned,
    "in-place": lambda: Apply(in_place, r=nn.LSTM(D, H, 2)),
    "by-keyword": lambda: Apply(
        lambda m, x: m.r(input=x, hx=x.new_ones(1, len(x), H))[0], r=nn.GRU(D, H, batch_first=True)
    ),
    "one-by-one": lambda: Apply(lambda m, x: torch.cat([m.r(x[i : i + 1])[0] for i in range(len(x))]), r=lstm()),
    "views-of-a-sample": lambda: Apply(
        lambda m, x: m.r(torch.stack([x, 2 * x], 1).flatten(0, 1))[0].reshape(len(x), -1), r=lstm()
    ),
    "two-views": lambda: Apply(lambda m, x: torch.cat(m.r(torch.cat([x, 2 * x]))[0].chunk(2), 1), r=lstm()),
    "some-samples": lambda: Apply(
        lambda m, x: (
            x.new_zeros(len(x), H).index_put((own := (x[:, 0, 0] > 0).nonzero()[:, 0],), m.r(x[own])[1][0][0])
            + m.a(x[:, 0])
        ),
        r=lstm(),
        a=nn.Linear(D, H),
    ),
    "checkpointed": lambda: Apply(
        lambda m, x: m.h(checkpoint(lambda z: m.r(z)[0], m.a(x), use_reentrant=False)),
        a=nn.Linear(D, D),
        r=lstm(num_layers=2),
        h=nn.Linear(H, 2),
    ),
    "dropout-of-one-layer": lambda: Apply(lambda m, x: m.r(x)[0], r=in_one_layer()),
    "dropout-in-eval": lambda: in_eval(Apply(lambda m, x: m.r(x)[0], r=lstm(num_layers=2, dropout=0.5))),
    "constant-input": lambda: Apply(lambda m, x: m.a(x) + m.r(torch.ones(1, T, D))[0], a=nn.Linear(D, H), r=lstm()),
    "inherited": lambda: Apply(lambda m, x: m.r(x)[0], r=Inherited(D, H, batch_first=True)),
    "of-its-own-forward": lambda: Apply(lambda m, x: m.r(x), r=First(D, H, batch_first=True)),
    "cells": lambda: Apply(lambda m, x: m.b(m.a(x[:, 0])[0]), a=nn.LSTMCell(D, H), b=nn.GRUCell(H, H)),
    "compiled": lambda: torch.compile(Apply(lambda m, x: m.h(m.r(x)[0]), r=lstm(), h=nn.Linear(H, 2)), backend="eager"),
}


PACKED = ("packed", "sorted-by-hand", "of-lists")


def in_one_layer() -> nn.LSTM:
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        return lstm(dropout=0.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@both_modes
@pytest.mark.parametrize("certify", ["always", "thinning"])
@pytest.mark.parametrize("name", RIGHT)
def test_however_it_is_called(name: str, certify: str, mode: str) -> None:
    torch.manual_seed(0)
    module, private = wrapped(RIGHT[name](), squares, mode, certify=certify)
    for _ in range(3):
        lengths = [torch.randint(1, T + 1, (N,))] if name in PACKED else []
        assert_clipped(module, private, torch.randn(N, T, D), *lengths)


@both_modes
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_model_of_packed_sequences(kind: Callable[..., nn.RNNBase], mode: str) -> None:
    """Its samples come packed, and it returns them so."""
    torch.manual_seed(0)
    model = Apply(lambda m, x: m.r(x)[0], r=kind(D, H, batch_first=True, bidirectional=True))
    rows = [torch.randn(length, D) for length in (3, 5, 1, 4, 4)]
    alone = [
        reference(model, lambda output, _: output.square().sum(), (row[None],), torch.zeros(1), 1).total_norm()
        for row in rows
    ]
    module = GradSampleModuleFastGradientClipping(model, certify="always", max_grad_norm=1.0)
    output = pad_packed_sequence(module(pack_sequence(rows, enforce_sorted=False)), batch_first=True)[0]
    MODES[mode](module, squares(output))
    torch.testing.assert_close(module.per_sample_gradient_norms, torch.cat(alone), rtol=1e-10, atol=1e-10)


def mixing(m: Any, x: Tensor) -> Tensor:
    output, (hidden, _) = m.r(x)
    return output[:, 0] + hidden.roll(1, 1)[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "dropout-between-layers": (
        lambda: Apply(lambda m, x: m.r(x)[0], r=lstm(num_layers=2, dropout=0.1)),
        {},
        PrivacyNotImplementedError,
        r"layer 'r' \(LSTM\): dropout=0.1 between its 2 layers.*Set dropout=0.*nn.Dropout",
    ),
    "one-sample": (
        lambda: Apply(lambda m, x: torch.stack([m.r(one)[0] for one in x]), r=lstm()),
        {},
        ValueError,
        r"layer 'r' \(LSTM\): it was called without a batch axis, on shape \(6, 3\)",
    ),
    "functorch": (
        lambda: Apply(lambda m, x: m.r(x)[0], r=lstm()),
        {"force_functorch": True},
        NotImplementedError,
        r"layer 'r' \(LSTM\).*Leave force_functorch out",
    ),
    "weights-used-outside": (
        lambda: Apply(lambda m, x: m.r(x)[0] + F.linear(x, m.r.weight_ih_l0[:H]), r=lstm()),
        {},
        NotImplementedError,
        r"layer 'r' \(LSTM\).*use the weights in its forward only",
    ),
    "time-for-samples": (
        lambda: Apply(lambda m, x: m.r(x)[0], r=nn.LSTM(D, H)),
        {},
        PrivacyNotImplementedError,
        r"layer 'r' \(LSTM\): its rows are not samples",
    ),
    "hidden-of-others": (
        lambda: Apply(mixing, r=lstm()),
        {},
        PrivacyNotImplementedError,
        r"layer 'r' \(LSTM\) gets a gradient of several samples in one row",
    ),
    "mean-of-the-batch": (
        lambda: Apply(lambda m, x: m.r(x - x.mean(0))[0], r=lstm()),
        {},
        PrivacyNotImplementedError,
        "mixes samples",
    ),
    "mean-of-hidden-states": (
        lambda: Apply(
            lambda m, x: m.b(m.a(x)[0], m.a(x)[1].detach().mean(1, keepdim=True).expand(1, len(x), H).contiguous())[0],
            a=nn.GRU(D, H, batch_first=True),
            b=nn.GRU(H, H, batch_first=True),
        ),
        {},
        PrivacyNotImplementedError,
        "mixes samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    torch.manual_seed(0)
    make, options, error, text = REFUSED[name]
    module = GradSampleModuleFastGradientClipping(make(), **options)
    with pytest.raises(error, match=text):
        module.first_pass(squares(module(torch.randn(N, T, D))))


@both_modes
@pytest.mark.parametrize("kind", KINDS)
def test_make_private(kind: str, mode: str) -> None:
    """The model stays as it is, and a step without noise is that of the oracle."""
    torch.manual_seed(0)
    make, options = KINDS[kind]
    model = Using(make(D, H, num_layers=2, bidirectional=True, **options), "oh")
    model = nn.Sequential(model, nn.Linear(2 * (T + 2) * (options.get("proj_size") or H), 2))
    x, y = torch.randn(8, T, D), torch.randn(8, 2)
    criterion = nn.MSELoss()
    oracle = reference(model, criterion, (x,), y, 8)
    clip, before = oracle.total_norm().median().item(), copy.deepcopy(model)
    private, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=criterion,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        poisson_sampling=False,
        grad_sample_mode=mode,
        certify="always",
    )
    for inputs, target in loader:
        criterion(private(inputs), target).backward()
        optimizer.step()
    for name, param in before.named_parameters():
        step = param - oracle.clipped_sum(clip)[name] / 8
        torch.testing.assert_close(model.get_parameter(name), step, rtol=1e-10, atol=1e-10)


def test_check() -> None:
    torch.manual_seed(0)
    check(
        Apply(lambda m, x: m.r(x)[0][:, -1], r=lstm()),
        nn.CrossEntropyLoss(),
        torch.randn(8, T, D),
        torch.randint(H, (8,)),
    ).raise_if_wrong()


def test_rows_are_idle_where_all_outputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that the loss does not use does not take a call out of the comparison of samples."""
    seen = []
    monkeypatch.setattr(
        CertifiedModel, "_check_independence", lambda self, due, reached, owned, idle: seen.append(dict(idle))
    )
    module = GradSampleModuleFastGradientClipping(Using(lstm(), "o"), certify="always")
    module.first_pass(squares(module(torch.randn(N, T, D))))
    assert seen == [{}]


@both_modes
@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision(autocast: bool, mode: str) -> None:
    """Gates are computed again in float32, of what the layer got."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model = Using(nn.LSTM(D, H, 2, bidirectional=True), "ohc").to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(N, T, D, dtype=torch.float32 if autocast else torch.bfloat16)
    oracle = reference(copy.deepcopy(model).float(), lambda output, _: squares(output).sum(), (x.float(),), x, N)
    module = GradSampleModuleFastGradientClipping(model, max_grad_norm=1e-2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = squares(module(x).float())
    MODES[mode](module, losses)
    torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=0.03, atol=0)
    total = torch.cat([param.summed_grad.double().flatten() for param in module.parameters()]).norm().item()
    assert total <= N * 1e-2 * (1 + 1e-6)


class Chaos(nn.Module):
    """Roundings grow over time."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.RNN(16, 32, batch_first=True)
        with torch.no_grad():
            for param in self.r.parameters():
                param.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(x)[0][:, -1]


@pytest.mark.parametrize("keep", [True, False])
@both_modes
def test_the_bound_where_roundings_grow(mode: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    if not keep:
        monkeypatch.setattr(planner.MEMORY, "ghost", planner.NOTHING)
    for seed in range(3):
        torch.manual_seed(seed)
        module = GradSampleModuleFastGradientClipping(Chaos(), max_grad_norm=1e-4)
        MODES[mode](module, squares(module(torch.randn(1, 400, 16))))
        total = torch.cat([param.summed_grad.double().flatten() for param in module.parameters()]).norm().item()
        assert 0.999e-4 < total <= 1e-4 * (1 + 1e-6)


def test_two_passes_by_hand_in_float32_are_refused() -> None:
    torch.set_default_dtype(torch.float32)
    module = GradSampleModuleFastGradientClipping(Using(lstm(), "o"))
    with pytest.raises(PrivacyNotImplementedError, match=r"two passes by hand.*recurrent layers but in float64"):
        two_passes_by_hand(module, squares(module(torch.randn(N, T, D))))
