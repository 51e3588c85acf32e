"""Rows that are not the samples in order: each is found to be its sample's, or the model is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.criterion.causal_lm import CausalLMLoss
from opacus_fgc.loss import MODES
from opacus_fgc.per_sample import Grouped
from tests.case import Apply
from tests.reference import reference

N, T, D = 5, 4, 6
both_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def wrapped(model: nn.Module, criterion: Any, mode: str, **options: Any) -> tuple[Any, Any]:
    module = GradSampleModuleFastGradientClipping(model, **options)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=module.max_grad_norm,
        expected_batch_size=1,
    )
    return module, DPLossFastGradientClipping(module, optimizer, criterion, backward=MODES[mode])


def squares(output: Tensor) -> Tensor:
    return output.square().flatten(1).sum(1)


def assert_clipped(module: Any, private: Any, *inputs: Tensor) -> None:
    """One clipped backward pass equals the oracle."""
    size = len(inputs[0])
    oracle = reference(module._module, lambda output, _: squares(output).sum(), inputs, torch.zeros(size), size)
    module.max_grad_norm = oracle.total_norm().median().item()
    private(module(*inputs)).backward()
    for name, wanted in oracle.clipped_sum(module.max_grad_norm).items():
        torch.testing.assert_close(module._module.get_parameter(name).summed_grad, wanted, rtol=1e-10, atol=1e-10)
    private.optimizer.zero_grad()


def lengths(*several: int) -> Tensor:
    return torch.arange(T) < torch.tensor(several)[:, None]


def scattered(mask: Tensor, rows: Tensor) -> Tensor:
    """Rows in the places that a mask has, and 0 in the others."""
    return torch.zeros(*mask.shape, *rows.shape[1:]).index_put(mask.nonzero(as_tuple=True), rows)


class Scaled(nn.Module):
    """Parameters of its own, on each row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * (1 + self.scale) + self.shift


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor) -> Any:
        return x * weight, 0


class OutOfSight(nn.Module):
    """A parameter in an autograd function, which torch.func repeats on each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(x, self.weight)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "layer-norm": lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)),
    "rms-norm": lambda: nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D)),
    "own-parameters": lambda: nn.Sequential(nn.Linear(D, D), Scaled()),
    "out-of-sight": lambda: nn.Sequential(nn.Linear(D, D), OutOfSight()),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, D // 2)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()),
    "group-norm": lambda: nn.Sequential(nn.Linear(D, D), nn.GroupNorm(2, D)),
    "tied": lambda: (lambda layer: nn.Sequential(layer, nn.Tanh(), layer))(nn.Linear(D, D)),
}


@both_modes
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("several", [(2, 4, 1, 3, 3), (4, 4, 4, 4, 4), (1, 4, 1, 1, 1), (0, 2, 0, 4, 1)], ids=str)
def test_layers_on_the_rows_of_a_mask(name: str, several: tuple[int, ...], mode: str) -> None:
    model = Apply(
        lambda m, x, mask: m.head(scattered(mask, m.a(x[mask]))).tanh().sum(1), a=LAYERS[name](), head=nn.Linear(D, 3)
    )
    module, private = wrapped(model, squares, mode)
    for other in (several, several[::-1]):
        assert_clipped(module, private, torch.randn(N, T, D), lengths(*other))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "two-views": (
        lambda: Apply(lambda m, a, b: torch.stack(m.a(torch.cat([a, b])).tanh().chunk(2)).prod(0), a=nn.Linear(D, 3)),
        lambda: [torch.randn(N, D), torch.randn(N, D)],
    ),
    "views-of-views": (
        lambda: Apply(
            lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1))).unflatten(0, (T, -1)).sum(0),
            a=nn.Linear(D, 3),
            b=nn.Linear(3, 2),
        ),
        lambda: [torch.randn(N, T, D)],
    ),
    "tokens-of-a-mask": (
        lambda: Apply(
            lambda m, ids, mask: m.b(scattered(mask, m.a(ids[mask])).sum(1)), a=nn.Embedding(9, D), b=nn.Linear(D, 2)
        ),
        lambda: [torch.randint(9, (N, T)), lengths(3, 1, 4, 2, 2)],
    ),
    "sets-of-other-sizes": (
        lambda: Apply(
            lambda m, x, sizes: torch.stack([m.a(x[n, : int(size)]).relu().sum(0) for n, size in enumerate(sizes)]),
            a=nn.Linear(D, 3),
        ),
        lambda: [torch.randn(N, T, D), torch.tensor([1, 3, 4, 1, 2])],
    ),
    "a-mask-token": (
        lambda: Own(lambda m, x, mask: m.a(torch.where(mask[..., None], m.token, x)).tanh().sum(1)),
        lambda: [torch.randn(N, T, D), lengths(3, 1, 4, 2, 2)],
    ),
    "sorted-and-put-back": (
        lambda: Apply(sorted_inside, a=nn.Linear(D, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2)),
        lambda: [torch.randn(N, D)],
    ),
    "nested-tensors": (
        lambda: Apply(
            lambda m, x, sizes: torch.stack(
                [rows.tanh().sum(0) for rows in m.b(m.a(nested(x, sizes)).tanh()).unbind()]
            ),
            a=nn.Linear(D, 3),
            b=nn.LayerNorm(3),
        ),
        lambda: [torch.randn(N, T, D), torch.tensor([1, 3, 4, 1, 2])],
    ),
    "rows-by-keyword": (
        lambda: Apply(
            lambda m, x: torch.stack([m.b(input=m.a(input=row)) for row in x]), a=nn.Linear(D, 3), b=nn.LayerNorm(3)
        ),
        lambda: [torch.randn(N, D)],
    ),
    "two-rows-for-each-sample": (
        lambda: Apply(lambda m, x: m.a(x.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).prod(1), a=nn.Linear(D, 3)),
        lambda: [torch.randn(N, D)],
    ),
    "time-first-inside": (
        lambda: Apply(
            lambda m, ids: m.d(m.c(m.b(m.a(ids).transpose(0, 1)).tanh()).transpose(0, 1)).sum(1),
            a=nn.Embedding(9, D),
            b=nn.Linear(D, 3),
            c=nn.LayerNorm(3),
            d=nn.Linear(3, 2),
        ),
        lambda: [torch.randint(9, (N, T))],
    ),
    "time-first-inside-of-as-many-steps-as-samples": (
        lambda: Apply(lambda m, x: m.a(x.transpose(0, 1)).tanh().transpose(0, 1).sum(1), a=nn.Linear(D, 3)),
        lambda: [torch.randn(N, N, D)],
    ),
    "all-samples-twice": (
        lambda: Apply(lambda m, x: m.a(x.repeat(2, 1)).unflatten(0, (2, -1)).prod(0), a=nn.Linear(D, 3)),
        lambda: [torch.randn(N, D)],
    ),
}


def nested(x: Tensor, sizes: Tensor) -> Tensor:
    rows = [x[n, : int(size)] for n, size in enumerate(sizes)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class Own(Apply):
    def __init__(self, function: Callable) -> None:
        super().__init__(function, a=nn.Linear(D, 3))
        self.token = nn.Parameter(torch.randn(D))


def sorted_inside(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    order = hidden[:, 0].argsort()
    return m.c(m.b(hidden[order]).tanh()[order.argsort()])


@both_modes
@pytest.mark.parametrize("certify", ["thinning", "always"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, certify: str, mode: str) -> None:
    make, inputs = MODELS[name]
    module, private = wrapped(make(), squares, mode, certify=certify)
    for _ in range(3):
        assert_clipped(module, private, *inputs())


@both_modes
def test_a_single_row_that_the_batch_shares(mode: str) -> None:
    model = Apply(lambda m, x: m.a(x) + m.p(torch.arange(T)[None]), a=nn.Linear(D, 3), p=nn.Embedding(T, 3))
    module, private = wrapped(model, squares, mode)
    for _ in range(2):
        assert_clipped(module, private, torch.randn(N, T, D))


@both_modes
def test_a_sample_that_is_dropped_takes_no_other_with_it(mode: str) -> None:
    """Padding has no activations of other samples, whose inf or NaN would come to it."""
    model = Apply(lambda m, x, mask: scattered(mask, m.a(x[mask])).sum(1), a=nn.Linear(D, 3))
    module, private = wrapped(model, squares, mode, nonfinite="drop")
    x, mask = torch.randn(N, T, D), lengths(3, 0, 4, 1, 2)
    oracle = reference(model, lambda output, _: squares(output).sum(), (x, mask), torch.zeros(N), N)
    private(module(x, mask)).backward()
    private.optimizer.zero_grad()
    x[0, 0, 0] = torch.inf
    module.max_grad_norm = oracle.total_norm().median().item()
    private(module(x, mask)).backward()
    assert module.dropped == 1
    oracle.gradients = {
        name: gradient.index_fill(0, torch.tensor([0]), 0.0) for name, gradient in oracle.gradients.items()
    }
    for name, wanted in oracle.clipped_sum(module.max_grad_norm).items():
        torch.testing.assert_close(model.get_parameter(name).summed_grad, wanted, rtol=1e-10, atol=1e-10)


REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "samples-in-another-order": lambda m, x: m.a(x).roll(1, 0),
    "sorted-and-not-put-back": lambda m, x: m.a(x)[x[:, 0].argsort()],
    "the-largest-rows": lambda m, x: m.a(x)[m.a(x)[:, 0].topk(len(x)).indices],
    "tokens-up-to-a-capacity": lambda m, x: m.a(x) * ((x[:, 0] > 0).cumsum(0) <= 2)[:, None],
}


@both_modes
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, mode: str) -> None:
    """Other samples are replaced in each step, until one shows it."""
    module, private = wrapped(Apply(REFUSED[name], a=nn.Linear(D, 3)), squares, mode, certify="always")

    def train() -> None:
        for _ in range(20):
            private(module(torch.randn(N, D))).backward()
            private.optimizer.zero_grad()

    with pytest.raises(NotImplementedError, match=r"mixes samples|not samples|cannot be told"):
        train()


@both_modes
def test_two_passes_by_hand_are_refused(mode: str) -> None:
    model = Apply(lambda m, x, mask: scattered(mask, m.a(x[mask])).sum(1), a=nn.Linear(D, 3))
    module, _ = wrapped(model, squares, mode)
    losses = squares(module(torch.randn(N, T, D), lengths(2, 4, 4, 4, 1)))
    losses.mean().backward(retain_graph=True)
    coef = module.get_clipping_coef()
    module.disable_hooks()
    with pytest.raises(NotImplementedError, match="two passes by hand"):
        (coef * losses).sum().backward()


# Packed sequences


class Language(nn.Module):
    """A language model in which tokens see those of their sequence that come before them."""

    def __init__(self, apart: bool = True) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(11, D), nn.Embedding(9, D)
        self.mix, self.norm, self.head = nn.Linear(D, D), Scaled(), nn.Linear(D, 11, bias=False)
        self.apart = apart

    def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) + self.places(position_ids)
        sequence = (position_ids == 0).cumsum(1)
        seen = (
            (sequence[:, None] == sequence[..., None]).tril()
            if self.apart
            else torch.ones(ids.shape[1], ids.shape[1]).tril()
        )
        hidden = hidden + self.mix(seen.to(hidden) @ hidden).tanh()
        return self.head(self.norm(hidden))


def packed(*several: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(11, (1, sum(several)))
    return ids, torch.cat([torch.arange(length) for length in several])[None]


def assert_packed(module: Any, private: Any, ids: Tensor, position_ids: Tensor) -> None:
    model, criterion = copy.deepcopy(module._module), CausalLMLoss()
    starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    params = dict(model.named_parameters())
    gradients = []
    for start, end in itertools.pairwise(starts):
        loss = criterion(model(ids[:, start:end], position_ids[:, start:end]), ids[:, start:end])
        gradients.append(torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True))
    norms = torch.stack([torch.cat([part.flatten() for part in gradient]).norm() for gradient in gradients])
    module.max_grad_norm = max(norms.median().item(), 1e-6)
    private(module(ids, position_ids), ids, position_ids).backward()
    coef = module.max_grad_norm / norms.clamp(min=module.max_grad_norm)
    for name, *parts in zip(params, *gradients, strict=True):
        wanted = sum(factor * part for factor, part in zip(coef, parts, strict=True))
        torch.testing.assert_close(module._module.get_parameter(name).summed_grad, wanted, rtol=1e-10, atol=1e-10)
    private.optimizer.zero_grad()


@both_modes
@pytest.mark.parametrize("certify", ["thinning", "always"])
def test_packed_sequences(certify: str, mode: str) -> None:
    """Of other numbers, lengths and orders in each step, also of one sequence, and of one token."""
    module, private = wrapped(Language(), CausalLMLoss(), mode, certify=certify)
    for several in ((3, 5, 2, 7), (6, 2), (2, 2, 2, 2), (8,), (1, 4, 1, 3), (5, 3, 2, 7), (2, 8, 2, 2, 2, 3, 4)):
        assert_packed(module, private, *packed(*several))


@both_modes
def test_packed_sequences_that_see_each_other_are_refused(mode: str) -> None:
    module, private = wrapped(Language(apart=False), CausalLMLoss(), mode)
    ids, position_ids = packed(3, 5, 2)
    with pytest.raises(NotImplementedError, match="several of these have a part in one row"):
        private(module(ids, position_ids), ids, position_ids).backward()


@both_modes
def test_position_ids_of_other_sequences_are_refused(mode: str) -> None:
    """Given to the criterion, and not to the model."""
    module, private = wrapped(Language(), CausalLMLoss(), mode)
    ids, position_ids = packed(3, 5, 2)
    _, others = packed(4, 4, 2)
    with pytest.raises(NotImplementedError, match=r"several of these|other losses than position_ids"):
        private(module(ids, position_ids), ids, others).backward()


def test_losses_of_packed_sequences() -> None:
    ids, position_ids = packed(3, 5, 1, 2)
    logits, criterion = torch.randn(1, 11, 11), CausalLMLoss(reduction="none")
    labels = ids.clone()
    labels[0, 5] = -100
    losses = criterion(logits, labels, position_ids)
    starts = (0, 3, 8, 9, 11)
    for loss, start, end in zip(losses, starts[:-1], starts[1:], strict=True):
        torch.testing.assert_close(loss, criterion(logits[:, start:end], labels[:, start:end])[0])
    assert losses[2] == 0
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
        criterion(torch.randn(2, 4, 11), torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="first token's position"):
        criterion(logits, ids, position_ids + 1)


def test_a_lost_token_stays_with_its_sequence() -> None:
    """Losses that are inf or NaN are those of their sequence alone."""
    ids, position_ids = packed(3, 2)
    logits = torch.randn(1, 5, 11)
    logits[0, 0] = torch.nan
    losses = CausalLMLoss(reduction="none")(logits, ids, position_ids)
    assert losses.isnan().tolist() == [True, False]


def test_groups_of_samples_with_other_places_add_up() -> None:
    gradients = torch.randn(2, 4, 3, 2)
    places = ([torch.tensor([0, 2]), torch.tensor([1, 3])], [torch.tensor([0, 1, 2]), torch.tensor([3])])
    from opacus_fgc.per_sample import Dense, add

    forms = [
        Grouped([Dense(values[own]) for own in groups], groups)
        for values, groups in zip(gradients, places, strict=True)
    ]
    for form, values in zip((*forms, add(forms)), (*gradients, gradients.sum(0)), strict=True):
        torch.testing.assert_close(form.materialize(), values)
        torch.testing.assert_close(form.norm(), values.flatten(1).norm(dim=1))
        coef = torch.rand(4)
        torch.testing.assert_close(form.weighted_sum(coef), torch.einsum("n,nij->ij", coef, values))
        mask = torch.tensor([True, False, True, True])
        torch.testing.assert_close(form.select(mask).materialize(), values[mask])
        torch.testing.assert_close(form.select(slice(1, 3)).materialize(), values[1:3])
    torch.testing.assert_close(forms[0].inner(forms[1]), gradients.prod(0).flatten(1).sum(1))


class Bags(nn.Module):
    """Texts that lie one after another, with offsets, as the text classification of torch's tutorials has them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(11, D, **options), nn.Linear(D, 3)

    def forward(self, tokens: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(self.bags(tokens, offsets, weights).tanh())


@both_modes
@pytest.mark.parametrize(
    "options", [{"mode": "mean"}, {"mode": "sum"}, {"mode": "sum", "include_last_offset": True}, {"padding_idx": 3}]
)
@pytest.mark.parametrize("sizes", [[2, 1, 5, 4], [0, 3, 3, 0], [3, 3, 3, 3]])
def test_joined_bags_of_tokens(sizes: list[int], options: dict[str, Any], mode: str) -> None:
    model = Bags(**options)
    plain = copy.deepcopy(model)
    module, private = wrapped(model, nn.CrossEntropyLoss(), mode)
    last = options.get("include_last_offset", False)
    weighted = options["mode"] == "sum" if "mode" in options else False
    for _ in range(3):
        tokens, y = torch.randint(11, (sum(sizes),)), torch.randint(3, (len(sizes),))
        offsets = torch.tensor([0, *itertools.accumulate(sizes)])
        weights = torch.rand(len(tokens)) if weighted else None
        private(module(tokens, offsets if last else offsets[:-1], weights), y).backward()
        norms = []
        for n, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            of_one = torch.tensor([0, end - start] if last else [0])
            output = plain(tokens[start:end], of_one, None if weights is None else weights[start:end])
            gradients = torch.autograd.grad(F.cross_entropy(output, y[n : n + 1]), list(plain.parameters()))
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
        torch.testing.assert_close(module.per_sample_gradient_norms, torch.stack(norms), rtol=1e-10, atol=1e-10)
        private.optimizer.zero_grad()


class MixedBags(Bags):
    def forward(self, tokens: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        bags = self.bags(tokens, offsets)
        return self.head(bags / (1 + bags.detach().abs().mean(0)))


@both_modes
def test_joined_bags_that_are_mixed_are_refused(mode: str) -> None:
    module, private = wrapped(MixedBags(mode="sum"), nn.CrossEntropyLoss(), mode)
    with pytest.raises(NotImplementedError, match="mixes samples"):
        private(module(torch.randint(11, (12,)), torch.tensor([0, 2, 3, 8])), torch.randint(3, (4,))).backward()
