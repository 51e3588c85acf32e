"""The cases of layers: every one goes through every entry; see test_exact.py.

All are float64. Adding a layer to the package means adding a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from opacus_fgc import register_norm_sampler
from tests.case import Apply, Case, classes, floats, frozen, tied, tokens


class ScaleByOwn(nn.Module):
    """Hand-written: a parameter on a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


class TwoInputs(nn.Module):
    """Two inputs, one by keyword, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 4))
        self.b = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor, *, scale: Tensor, power: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
        return x @ self.a, {"second": (scale @ self.b) ** power}


class InheritedLinear(nn.Linear):
    """Served by the sampler of its base."""


class DoubledLinear(nn.Linear):
    """Not served by it: another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class NormOnlyScale(nn.Module):
    """Served by a norm sampler in Opacus' own form."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@register_norm_sampler(NormOnlyScale)
def norm_only_scale(layer: NormOnlyScale, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {layer.factor: (activations[0] * backprops).norm(dim=1)}


class NormOnlyBlock(NormOnlyScale):
    """The same on a module with a child, which has a tap of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


@register_norm_sampler(NormOnlyBlock)
def norm_only_block(layer: NormOnlyBlock, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    inner = F.linear(activations[0], layer.inner.weight, layer.inner.bias)
    return {layer.factor: (inner * backprops).norm(dim=1)}


class Conv1D(nn.Module):
    """As that of transformers, by whose name it goes."""

    def __init__(self, features: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, features))
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], len(self.bias))


Conv1D.__module__ = "transformers.pytorch_utils"


def relu_in_place(m: Apply, x: Tensor) -> Tensor:
    h = m.a(x)
    h += x
    return m.b(F.relu_(h))


def tied_head(m: Apply, x: Tensor) -> Tensor:
    return m.head(m.body(m.embedding(x)))


def flattened(function: Callable[[Apply, Tensor], Tensor]) -> Callable[[Apply, Tensor], Tensor]:
    return lambda m, x: function(m, x).flatten(1)


def permuted_conv(m: Apply, x: Tensor) -> Tensor:
    return m.conv(x.permute(0, 3, 1, 2))


def channels_last(m: Apply, x: Tensor) -> Tensor:
    return m.conv(x.to(memory_format=torch.channels_last))


def conv_cases() -> list[Case]:
    rows: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
        ("conv1d", lambda: nn.Conv1d(4, 6, 3), (4, 9)),
        ("conv1d-strided", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 9)),
        ("conv1d-same", lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (4, 11)),
        ("conv2d", lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),
        ("conv2d-no-bias", lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 6, 7)),
        ("conv2d-1x1", lambda: nn.Conv2d(3, 4, 1), (3, 4, 4)),
        ("conv2d-one-position", lambda: nn.Conv2d(3, 4, 5), (3, 5, 5)),
        ("conv2d-uneven", lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2), (4, 8, 7)),
        ("conv2d-remainder", lambda: nn.Conv2d(2, 3, 3, stride=3), (2, 8, 10)),
        ("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
        ("conv2d-valid", lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 6)),
        ("conv2d-same", lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (3, 7, 6)),
        ("conv2d-many-positions", lambda: nn.Conv2d(1, 2, 2), (1, 9, 9)),
        ("conv3d", lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), (1, 1, 0), groups=2), (2, 4, 5, 4)),
        ("conv3d-same", lambda: nn.Conv3d(2, 3, (2, 3, 2), padding="same"), (2, 3, 4, 3)),
    ]
    for mode in ("reflect", "replicate", "circular"):
        rows += [
            (f"conv1d-{mode}", lambda mode=mode: nn.Conv1d(2, 3, 3, padding=2, padding_mode=mode), (2, 7)),
            (f"conv2d-{mode}", lambda mode=mode: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), (2, 5, 6)),
            (f"conv2d-same-{mode}", lambda mode=mode: nn.Conv2d(2, 3, 4, padding="same", padding_mode=mode), (2, 5, 6)),
            (f"conv3d-{mode}", lambda mode=mode: nn.Conv3d(2, 3, 3, padding=1, padding_mode=mode), (2, 4, 4, 4)),
        ]
    covers = {"conv1d": [nn.Conv1d], "conv2d": [nn.Conv2d], "conv3d": [nn.Conv3d]}
    cases = [Case(id, module, [floats(*shape)], covers=covers.get(id, [])) for id, module, shape in rows]
    for id, function in (("conv2d-channels-last", channels_last), ("conv2d-permuted", permuted_conv)):
        cases.append(
            Case(
                id,
                lambda function=function: Apply(function, conv=nn.Conv2d(4, 6, 3, groups=2)),
                [floats(4, 6, 4)] if function is permuted_conv else [floats(4, 6, 5)],
            )
        )
    return cases


def recurrent(kind: Callable, **options: Any) -> nn.Module:
    return Apply(
        lambda m, x: m.head(m.rnn(x)[0]),
        rnn=kind(3, 4, **options),
        head=nn.Linear(8 if "bidirectional" in options else 4, 2),
    )


def first_of(m: Apply, x: Tensor) -> Tensor:
    """What a classifier takes of a sequence: the last state of all layers and directions."""
    state = m.rnn(x)[1]
    return m.head((state[0] if isinstance(state, tuple) else state).transpose(0, 1).flatten(1))


def encoder_decoder(m: Apply, x: Tensor, y: Tensor) -> Tensor:
    """The decoder begins where the encoder ended, and returns its cell state too."""
    output, state = m.b(y, m.a(x)[1])
    return m.head(output).sum(1) + state[1].transpose(0, 1).flatten(1)[:, :2]


def in_two_parts(m: Apply, x: Tensor) -> Tensor:
    first, state = m.rnn(x[:, :2])
    return m.head(torch.cat([first, m.rnn(x[:, 2:], hx=state)[0]], 1))


def recurrent_cases() -> list[Case]:
    """Torch's own layers, batch first unless said."""
    rows: list[tuple[str, Callable[[], nn.Module], list[type[nn.Module] | str]]] = [
        ("lstm", lambda: recurrent(nn.LSTM, batch_first=True), [nn.LSTM]),
        ("gru", lambda: recurrent(nn.GRU, batch_first=True), [nn.GRU]),
        ("rnn", lambda: recurrent(nn.RNN, batch_first=True), [nn.RNN]),
        ("rnn-relu", lambda: recurrent(nn.RNN, batch_first=True, nonlinearity="relu", num_layers=2), []),
        ("lstm-layers", lambda: recurrent(nn.LSTM, batch_first=True, num_layers=3, bidirectional=True), []),
        ("gru-layers", lambda: recurrent(nn.GRU, batch_first=True, num_layers=2, bidirectional=True), []),
        ("lstm-no-bias", lambda: recurrent(nn.LSTM, batch_first=True, bias=False), []),
        (
            "lstm-frozen-in-part",
            lambda: frozen(
                recurrent(nn.LSTM, batch_first=True, num_layers=2),
                *("rnn.weight_ih_l0", "rnn.bias_hh_l0", "rnn.weight_hh_l1"),
            ),
            [],
        ),
        (
            "lstm-projected",
            lambda: Apply(
                lambda m, x: m.head(m.rnn(x)[0]),
                rnn=nn.LSTM(3, 4, num_layers=2, proj_size=2, batch_first=True, bidirectional=True),
                head=nn.Linear(4, 2),
            ),
            [],
        ),
        (
            "lstm-second-inside",
            lambda: Apply(
                lambda m, x: m.head(m.rnn(x.transpose(0, 1))[0].transpose(0, 1)),
                rnn=nn.LSTM(3, 4),
                head=nn.Linear(4, 2),
            ),
            [],
        ),
        ("gru-used-twice", lambda: Apply(in_two_parts, rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2)), []),
        (
            "lstm-stacked",
            lambda: Apply(
                lambda m, x: m.head(m.b(F.relu(m.a(m.inputs(x))[0]))[0]),
                inputs=nn.Linear(3, 3),
                a=nn.LSTM(3, 4, batch_first=True),
                b=nn.GRU(4, 4, batch_first=True),
                head=nn.Linear(4, 2),
            ),
            [],
        ),
        (
            "rnn-tied",
            lambda: tied(
                Apply(
                    lambda m, x: m.head(m.b(m.a(x)[0])[0]),
                    a=nn.RNN(3, 3, batch_first=True),
                    b=nn.RNN(3, 3, batch_first=True),
                    head=nn.Linear(3, 2),
                ),
                *("b", "weight_ih_l0", "a.weight_hh_l0"),
            ),
            [],
        ),
        *(
            (
                f"{kind.__name__.lower()}-last",
                lambda kind=kind: Apply(
                    first_of,
                    rnn=kind(3, 4, num_layers=2, bidirectional=True, batch_first=True),
                    head=nn.Linear(16, 2),
                ),
                [],
            )
            for kind in (nn.LSTM, nn.GRU, nn.RNN)
        ),
    ]
    cases = [Case(f"torch-{id}", make, [floats(5, 3)], covers=covers, functorch=False) for id, make, covers in rows]
    cases += [
        Case(
            "torch-lstm-batch-second",
            lambda: recurrent(nn.LSTM, num_layers=2),
            [floats(6, 3)],
            tokens(2, 6),
            lambda r: OfTimeFirst(classes(r)),
            batch_first=False,
        ),
        Case(
            "torch-lstm-encoder-decoder",
            lambda: Apply(
                encoder_decoder,
                a=nn.LSTM(3, 4, batch_first=True),
                b=nn.LSTM(2, 4, batch_first=True),
                head=nn.Linear(4, 2),
            ),
            [floats(5, 3), floats(3, 2)],
            functorch=False,
        ),
        *(
            Case(
                f"torch-packed-{layer.__name__.lower()}",
                lambda layer=layer, options=options, width=width: Apply(
                    packed, a=layer(3, 4, **options), b=nn.Linear(width, 2, bias=False)
                ),
                [floats(6, 3), tokens(6)],
                functorch=False,
                empty=False,
            )
            for layer, options, width in (
                (nn.LSTM, {"num_layers": 2, "bidirectional": True}, 8),
                (nn.GRU, {"bidirectional": True}, 8),
                (nn.RNN, {}, 4),
            )
        ),
    ]
    return cases


def packed(m: Apply, x: Tensor, lengths: Tensor) -> Tensor:
    sequences = pack_padded_sequence(x, lengths.add(1), batch_first=True, enforce_sorted=False)
    output, hidden = m.a(sequences)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return m.b(pad_packed_sequence(output, batch_first=True)[0]).square().sum(1) + hidden.sum(0)[:, :2]


def tied_language_model(loss_target: int = 11) -> nn.Module:
    embedding, head = nn.Embedding(loss_target, 6), nn.Linear(6, loss_target)
    model = Apply(lambda m, x: tied_head(m, x).mT, embedding=embedding, body=nn.Linear(6, 6), head=head)
    return tied(model, "head", "weight", "embedding.weight")


class IgnoringLoss(nn.CrossEntropyLoss):
    """Ignores token 0, but never a whole sample, for which torch's mean is 0/0."""

    def __init__(self, reduction: str) -> None:
        super().__init__(ignore_index=0, reduction=reduction)


def tokens_and_padding(n: int) -> Tensor:
    target = torch.randint(11, (n, 4))
    target[:, 0] = 1
    return target


def transposed_convolutions() -> list[
    tuple[str, Callable[[], nn.Module], tuple[int, ...], list[type[nn.Module] | str]]
]:
    return [
        ("1d", lambda: nn.ConvTranspose1d(4, 6, 3), (4, 7), [nn.ConvTranspose1d]),
        ("1d-strided", lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), (4, 5), []),
        (
            "2d",
            lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
            (3, 4, 5),
            [nn.ConvTranspose2d],
        ),
        ("2d-large", lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), (2, 9, 9), []),
        (
            "2d-to-a-size",
            lambda: Apply(lambda m, x: m.a(x, [10, 9]), a=nn.ConvTranspose2d(2, 3, 2, stride=2)),
            (2, 5, 4),
            [],
        ),
        ("3d", lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 3, 2, 3), [nn.ConvTranspose3d]),
    ]


LAYERS = [
    Case("linear", lambda: nn.Linear(3, 4), [floats(3)], covers=[nn.Linear]),
    Case("linear-3d", lambda: nn.Linear(3, 4), [floats(6, 3)]),
    Case("linear-3d-gram", lambda: nn.Linear(16, 12), [floats(3, 16)]),
    Case("linear-4d", lambda: nn.Linear(3, 4), [floats(2, 5, 3)]),
    Case("linear-5d", lambda: nn.Linear(7, 9), [floats(2, 1, 2, 7)]),
    Case("linear-no-bias", lambda: nn.Linear(3, 4, bias=False), [floats(3)]),
    Case("linear-bias-only", lambda: frozen(nn.Linear(3, 4), "weight"), [floats(3)]),
    Case("linear-weight-only", lambda: frozen(nn.Linear(3, 4), "bias"), [floats(6, 3)]),
    Case("linear-one-output", lambda: nn.Linear(3, 1), [floats(3)]),
    Case("linear-transposed-input", lambda: Apply(lambda m, x: m.a(x.mT), a=nn.Linear(3, 4)), [floats(3, 6)]),
    Case("linear-by-keyword", lambda: Apply(lambda m, x: m.a(input=x), a=nn.Linear(3, 4)), [floats(3)]),
    Case("linear-inherited", lambda: InheritedLinear(3, 4), [floats(6, 3)]),
    Case("linear-other-forward", lambda: DoubledLinear(3, 4), [floats(6, 3)]),
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
        [floats(3)],
        tokens(4),
        classes,
    ),
    Case("in-place", lambda: Apply(relu_in_place, a=nn.Linear(4, 4), b=nn.Linear(4, 3)), [floats(4)]),
    Case(
        "frozen-layer-between",
        lambda: frozen(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)), "1.weight", "1.bias"),
        [floats(3)],
    ),
    Case("embedding", lambda: nn.Embedding(7, 3), [tokens(7, 6)], covers=[nn.Embedding]),
    Case("embedding-1d", lambda: nn.Embedding(7, 3), [tokens(7)]),
    Case("embedding-3d", lambda: nn.Embedding(7, 3), [tokens(7, 2, 3)]),
    Case("embedding-padding", lambda: nn.Embedding(4, 3, padding_idx=2), [tokens(4, 6)]),
    Case("embedding-sparse", lambda: nn.Embedding(7, 3, sparse=True), [tokens(7, 6)], functorch=False),
    Case(
        "embedding-expanded",
        lambda: Apply(lambda m, x: m.a(x[:, None].expand(-1, 4)), a=nn.Embedding(7, 3)),
        [tokens(7)],
    ),
    Case("embedding-int32", lambda: Apply(lambda m, x: m.a(x.int()), a=nn.Embedding(7, 3)), [tokens(7, 6)]),
    Case(
        "embedding-bag-sum",
        lambda: nn.EmbeddingBag(5, 3, mode="sum"),
        [tokens(5, 6)],
        covers=[nn.EmbeddingBag],
    ),
    Case("embedding-bag-mean", lambda: nn.EmbeddingBag(5, 3, padding_idx=1), [tokens(5, 6)]),
    Case(
        "embedding-bag-weights",
        lambda: Apply(lambda m, x, w: m.a(x, per_sample_weights=w), a=nn.EmbeddingBag(5, 3, mode="sum")),
        [tokens(5, 6), floats(6)],
    ),
    Case(
        "embedding-bag-offsets",
        lambda: Apply(lambda m, x: m.a(x.flatten(), torch.arange(len(x)) * x.shape[1]), a=nn.EmbeddingBag(5, 3)),
        [tokens(5, 6)],
        functorch=False,
    ),
    Case("layer-norm", lambda: nn.LayerNorm(4), [floats(3, 4)], covers=[nn.LayerNorm]),
    Case("layer-norm-2d", lambda: nn.LayerNorm(4), [floats(4)]),
    Case("layer-norm-two-axes", lambda: nn.LayerNorm((3, 4)), [floats(2, 3, 4)]),
    Case("layer-norm-no-bias", lambda: nn.LayerNorm(4, bias=False), [floats(3, 4)]),
    Case("layer-norm-bias-only", lambda: frozen(nn.LayerNorm(4), "weight"), [floats(3, 4)]),
    Case("rms-norm", lambda: nn.RMSNorm(4), [floats(3, 4)], covers=[nn.RMSNorm]),
    Case("rms-norm-eps", lambda: nn.RMSNorm((3, 4), eps=1e-3), [floats(2, 3, 4)]),
    Case("group-norm", lambda: nn.GroupNorm(2, 4), [floats(4, 3, 3)], covers=[nn.GroupNorm]),
    Case("group-norm-2d", lambda: nn.GroupNorm(2, 8), [floats(8)]),
    Case(
        "instance-norm-1d",
        lambda: nn.InstanceNorm1d(3, affine=True),
        [floats(3, 5)],
        covers=[nn.InstanceNorm1d],
        empty=False,
    ),
    Case(
        "instance-norm-2d",
        lambda: nn.InstanceNorm2d(3, affine=True),
        [floats(3, 4, 4)],
        covers=[nn.InstanceNorm2d],
        empty=False,
    ),
    Case(
        "instance-norm-3d",
        lambda: nn.InstanceNorm3d(2, affine=True),
        [floats(2, 2, 3, 3)],
        covers=[nn.InstanceNorm3d],
        empty=False,
    ),
    Case("rnn-linear", lambda: RNNLinear(3, 4), [floats(3)], covers=[RNNLinear]),
    Case("lstm", lambda: recurrent(DPLSTM, batch_first=True), [floats(5, 3)]),
    Case(
        "lstm-batch-second",
        lambda: recurrent(DPLSTM),
        [floats(6, 3)],
        tokens(2, 6),
        lambda r: OfTimeFirst(classes(r)),
        batch_first=False,
    ),
    Case("gru", lambda: recurrent(DPGRU, batch_first=True, num_layers=2), [floats(4, 3)]),
    Case("rnn-bidirectional", lambda: recurrent(DPRNN, batch_first=True, bidirectional=True), [floats(4, 3)]),
    Case("sequence-bias", lambda: SequenceBias(3, batch_first=True), [floats(4, 3)], covers=[SequenceBias]),
    Case(
        "attention",
        lambda: Apply(lambda m, x: m.a(x, x, x)[0], a=DPMultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)),
        [floats(3, 4)],
        empty=False,
    ),
    Case("tied-head", tied_language_model, [tokens(11, 4)], tokens(11, 4), classes),
    Case("ignored-tokens", tied_language_model, [tokens(11, 4)], tokens_and_padding, IgnoringLoss),
    Case("used-twice", lambda: Apply(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Linear(4, 4)), [floats(3, 4)]),
    Case(
        "used-at-two-lengths",
        lambda: Apply(lambda m, x: m.a(x).sum(1) + m.a(x[:, 0]), a=nn.Linear(4, 4)),
        [floats(3, 4)],
    ),
    Case("conv-used-twice", lambda: Apply(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Conv2d(2, 2, 3)), [floats(2, 6, 6)]),
    Case(
        "norm-used-twice",
        lambda: Apply(lambda m, x: m.n(m.a(m.n(x))), n=nn.LayerNorm(4), a=nn.Linear(4, 4)),
        [floats(3, 4)],
    ),
    Case(
        "embedding-used-twice", lambda: Apply(lambda m, x: m.a(x) + m.a(x[:, :1]), a=nn.Embedding(6, 3)), [tokens(6, 4)]
    ),
    Case(
        "module-with-two-names",
        lambda: (lambda a: nn.Sequential(a, nn.ReLU(), nn.Sequential(a, nn.Linear(4, 2))))(nn.Linear(4, 4)),
        [floats(4)],
    ),
    Case(
        "tied-linear-and-custom",
        lambda: tied(nn.Sequential(nn.Linear(4, 4), DoubledLinear(4, 4)), "1", "weight", "0.weight"),
        [floats(3, 4)],
    ),
    Case(
        "tied-embedding-and-custom",
        lambda: tied(nn.Sequential(nn.Embedding(4, 4), DoubledLinear(4, 4)), "1", "weight", "0.weight"),
        [tokens(4, 3)],
    ),
    Case(
        "tied-three-ways",
        lambda: tied(
            tied(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), DoubledLinear(4, 4)), "1", "weight", "0.weight"),
            "2",
            "weight",
            "0.weight",
        ),
        [tokens(4, 3)],
    ),
    Case("unused-layer", lambda: Apply(lambda m, x: m.a(x), a=nn.Linear(3, 4), b=nn.Linear(3, 4)), [floats(3)]),
    Case(
        "unused-output",
        lambda: Apply(lambda m, x: [m.a(x), m.b(x)][0], a=nn.Linear(3, 4), b=nn.Linear(3, 4)),
        [floats(3)],
    ),
    Case("custom-with-child", ScaleByOwn, [floats(3, 4)]),
    Case(
        "custom-two-inputs",
        lambda: Apply(
            lambda m, x, s: (lambda y, d: m.head(y + d["second"]))(*m.a(x, scale=s)),
            a=TwoInputs(),
            head=nn.Linear(4, 2),
        ),
        [floats(3), floats(3)],
    ),
    Case(
        "norm-only-with-child",
        lambda: nn.Sequential(nn.Linear(4, 3), NormOnlyBlock()),
        [floats(4)],
        covers=[NormOnlyBlock],
    ),
    Case("norm-only", lambda: nn.Sequential(nn.Linear(4, 3), NormOnlyScale()), [floats(4)], covers=[NormOnlyScale]),
    Case(
        "checkpointed",
        lambda: Apply(
            lambda m, x: m.c(checkpoint(lambda h: F.relu(m.b(F.relu(m.a(h)))), x, use_reentrant=False)),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 4),
            c=nn.Linear(4, 2),
        ),
        [floats(3, 4)],
    ),
    Case(
        "bilinear",
        lambda: Apply(lambda m, x, y: m.a(x, y), a=nn.Bilinear(3, 2, 4)),
        [floats(3), floats(2)],
        covers=[nn.Bilinear],
    ),
    Case(
        "bilinear-3d",
        lambda: Apply(lambda m, x, y: m.a(x, y), a=nn.Bilinear(3, 2, 4, bias=False)),
        [floats(6, 3), floats(6, 2)],
    ),
    Case("prelu", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), [floats(5, 4)], covers=[nn.PReLU]),
    Case("prelu-channels", lambda: nn.PReLU(3), [floats(3, 5)]),
    Case("prelu-2d", lambda: nn.PReLU(3), [floats(3)]),
    *(
        Case(f"transposed-{name}", make, [floats(*shape)], covers=covers)
        for name, make, shape, covers in transposed_convolutions()
    ),
    Case("hf-conv1d", lambda: Conv1D(4, 3), [floats(6, 3)], covers=["transformers.pytorch_utils.Conv1D"]),
    *(
        Case(
            f"packed-{name}",
            lambda layer=layer, options=options, width=width: Apply(
                packed, a=layer(3, 4, **options), b=nn.Linear(width, 2, bias=False)
            ),
            [floats(6, 3), tokens(6)],
            empty=False,
        )
        for name, layer, options, width in (
            ("lstm", DPLSTM, {"num_layers": 2}, 4),
            ("gru-bidirectional", DPGRU, {"bidirectional": True}, 8),
            ("rnn", DPRNN, {}, 4),
        )
    ),
    *recurrent_cases(),
    *conv_cases(),
]


class OfTimeFirst(nn.Module):
    """A criterion for outputs that have their batch second."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    @property
    def reduction(self) -> str:
        return self.criterion.reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        self.criterion.reduction = value

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.criterion(output.permute(1, 2, 0), target)
