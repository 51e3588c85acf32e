"""Mixtures of experts: tokens are routed by what is in them, and each sample's gradient is the oracle's; in both modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.loss import book_keeping
from opacus_fgc.per_sample import Outer, Parts, Routed, Rows
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.step import record
from tests.reference import reference
from tests.test_loss import wrapped

N, T, D, E = 4, 5, 4, 4
MAX_GRAD_NORM = 0.05

both_modes = pytest.mark.parametrize("mode", MODES)
needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


def losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1)


class Experts(nn.Module):
    """A layer of experts after an embedding of features, and before a head.

    Args:
        how: applies the experts to rows of tokens, given their experts and weights, ``(rows, k)`` each.
        k: how many experts a token has.
    """

    def __init__(self, how: Callable[[Experts, Tensor, Tensor, Tensor], Tensor], k: int = 1) -> None:
        super().__init__()
        self.how, self.k = how, k
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.router = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * D, D))
        self.up_bias = nn.Parameter(torch.randn(E, 2 * D))
        self.down = nn.Parameter(torch.randn(E, 2 * D, D))
        self.modules_of = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).flatten(0, 1)
        weights, experts = self.router(rows).softmax(-1).topk(self.k, -1)
        return self.head(rows + self.how(self, rows, experts, weights)).view(*x.shape[:2], 2)


def by_loop(
    net: Experts, rows: Tensor, experts: Tensor, weights: Tensor, several: Iterable[int | Tensor] = range(E)
) -> Tensor:
    out = torch.zeros_like(rows)
    for expert in several:
        row, place = (experts == expert).nonzero(as_tuple=True)
        inner = F.linear(rows[row], net.up[expert], net.up_bias[expert]).tanh() @ net.down[expert]
        out = out.index_add(0, row, inner * weights[row, place, None])
    return out


def by_hits(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """A loop over those experts that a token reaches."""
    return by_loop(net, rows, experts, weights, experts.unique())


def by_modules(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(rows)
    for expert, module in enumerate(net.modules_of):
        row, place = (experts == expert).nonzero(as_tuple=True)
        out = out.index_add(0, row, module(rows[row]) * weights[row, place, None])
    return out


def by_lookup(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    chosen, several = experts.flatten(), rows.repeat_interleave(net.k, 0)
    inner = torch.bmm(net.up[chosen], several.unsqueeze(2)).squeeze(2) + net.up_bias[chosen]
    inner = torch.bmm(inner.tanh().unsqueeze(1), net.down[chosen]).squeeze(1)
    return (inner * weights.reshape(-1, 1)).view(len(rows), net.k, D).sum(1)


def by_group(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    chosen, order = experts.flatten().sort(stable=True)
    ends = torch.bincount(chosen, minlength=E).cumsum(0).int()
    inner = F.grouped_mm(rows[order // net.k], net.up.mT, offs=ends) + net.up_bias[chosen]
    inner = F.grouped_mm(inner.tanh(), net.down, offs=ends) * weights.flatten()[order, None]
    return torch.zeros_like(rows).index_add(0, order // net.k, inner)


def by_all(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """All experts on all rows, of which those that were not chosen count nothing."""
    dense = torch.zeros(len(rows), E).scatter(1, experts, weights)
    inner = torch.baddbmm(net.up_bias[:, None], rows.expand(E, -1, -1), net.up.mT).tanh()
    return (torch.matmul(inner, net.down) * dense.T[..., None]).sum(0)


WAYS = {"loop": by_loop, "hits": by_hits, "modules": by_modules, "lookup": by_lookup, "all": by_all}


def spread(n: int = N) -> Tensor:
    return torch.randn(n, T, D)


def assert_exact(net: nn.Module, batches: list[Tensor], mode: str, tolerance: float = 1e-10) -> None:
    """Several steps of one private model, each on a batch with routes of its own."""
    module, private = wrapped(net, losses, max_grad_norm=MAX_GRAD_NORM, backward=MODES[mode])
    for x in batches:
        y = torch.zeros(N, T, 2)
        oracle = reference(net, lambda *args: losses(*args).sum(), (x,), y, N)
        private(module(x), y).backward()
        scale, clipped = oracle.total_norm().max().item(), oracle.clipped_sum(MAX_GRAD_NORM)
        close = dict(rtol=tolerance, atol=tolerance * scale)
        torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), **close)
        for path, param in net.named_parameters():
            torch.testing.assert_close(param._norm_sample, oracle.norms()[path], **close)
            torch.testing.assert_close(param.summed_grad, clipped[path], **close)
        if x is not batches[-1]:
            private.optimizer.zero_grad()


@both_modes
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_experts_are_exact(way: str, k: int, mode: str) -> None:
    torch.manual_seed(0)
    assert_exact(Experts(WAYS[way], k), [spread() for _ in range(4)], mode)


@needs_grouped_mm
@both_modes
@pytest.mark.parametrize("k", [1, 2])
def test_grouped_products_are_exact(k: int, mode: str) -> None:
    """Torch has them in float32 at the most."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    assert_exact(Experts(by_group, k), [spread() for _ in range(4)], mode, tolerance=1e-5)


def steered(net: Experts, to: Tensor) -> tuple[Experts, Tensor]:
    """A model whose tokens go to these experts, by a feature; and the tokens."""
    x = spread()
    with torch.no_grad():
        net.embed.weight.copy_(torch.eye(D) + 0.01 * torch.randn(D, D))
        net.router.weight.copy_(torch.eye(E))
        x += 20 * F.one_hot(to, E)
    return net, x


@both_modes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["none", "one token", "one sample"])
def test_experts_that_few_tokens_reach(what: str, way: str, mode: str) -> None:
    torch.manual_seed(0)
    to = torch.randint(1, 3, (N, T))
    if what == "one token":
        to[2, 3] = 3
    elif what == "one sample":
        to[1] = 3
    net, x = steered(Experts(WAYS[way]), to)
    reached = net.router(net.embed(x)).argmax(-1).flatten().bincount(minlength=E)
    assert reached[3] == {"none": 0, "one token": 1, "one sample": T}[what]
    assert_exact(net, [x], mode)
    if way != "modules":
        assert net.up.summed_grad[0].count_nonzero() == 0
        assert (net.up.summed_grad[3].count_nonzero() > 0) == (what != "none")


@pytest.mark.parametrize(
    "way, form",
    [(by_loop, Parts), (by_lookup, Rows), (by_all, Outer), pytest.param(by_group, Routed, marks=needs_grouped_mm)],
)
def test_no_gradient_is_formed(way: Callable, form: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' per-sample gradients would be as many times the experts as there are samples."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    seen: dict[Tensor, type] = {}
    receive = record.Record.receive

    def noted(self: Any, several: Any, uses: Any) -> Any:
        seen.update((param, type(form)) for param, form in several.items())
        return receive(self, several, uses)

    monkeypatch.setattr(record.Record, "receive", noted)
    net = Experts(way, 2)
    module, private = wrapped(net, losses, backward=book_keeping)
    private(module(spread()), torch.zeros(N, T, 2)).backward()
    assert seen[net.up] is seen[net.down] is form


# What is no function of the token alone


def over_capacity(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Each expert takes the first tokens of the batch that come to it, and drops the others."""
    out = torch.zeros_like(rows)
    for expert in range(E):
        row = (experts[:, 0] == expert).nonzero().flatten()[: len(rows) // 10]
        out = out.index_add(0, row, (rows[row] @ net.up[expert].mT) @ net.down[expert] * weights[row])
    return out


def chosen_by_experts(net: Experts, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Each expert takes those tokens of the batch that suit it best."""
    best, chosen = net.router(rows).softmax(-1).topk(len(rows) // 10, 0)
    out = torch.zeros_like(rows)
    for expert in range(E):
        row = chosen[:, expert]
        out = out.index_add(0, row, (rows[row] @ net.up[expert].mT) @ net.down[expert] * best[:, expert, None])
    return out


@both_modes
@pytest.mark.parametrize("how", [over_capacity, chosen_by_experts])
def test_routing_by_the_batch_is_refused(how: Callable, mode: str) -> None:
    torch.manual_seed(0)
    net, x = Experts(how), spread(16)
    module, private = wrapped(net, losses, backward=MODES[mode])
    with pytest.raises(NotImplementedError, match=r"gives a sample another value when other samples .* are replaced"):
        private(module(x), torch.zeros(len(x), T, 2)).backward()


class Balanced(Experts):
    """Returns with its output how far the batch's tokens are from being spread evenly."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.embed(x).flatten(0, 1)
        scores = self.router(rows).softmax(-1)
        load = F.one_hot(scores.argmax(-1), E).to(rows.dtype).mean(0)
        return super().forward(x), E * (load * scores.mean(0)).sum()


@both_modes
def test_a_loss_that_balances_the_batch_is_refused(mode: str) -> None:
    torch.manual_seed(0)
    module, private = wrapped(
        Balanced(by_loop), lambda output, y: losses(output[0], y) + output[1], backward=MODES[mode]
    )
    with pytest.raises((NotImplementedError, ValueError), match=r"mixes samples|of several samples|other samples"):
        private(module(spread()), torch.zeros(N, T, 2)).backward()
