"""Every way that the planner can choose gives the oracle's result, and it chooses by the shapes at hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from opacus_fgc import GradSampleModuleFastGradientClipping, planner
from opacus_fgc.loss import book_keeping, double_backward
from opacus_fgc.per_sample import Convolution, Dense, Outer, PerSampleGradient, SumOverPositions, add, convolution
from opacus_fgc.planner import NO_ROOM, KeepPolicy, NormMethod, Room
from opacus_fgc.step import held as held_module
from opacus_fgc.step.held import Held
from tests.case import Case, floats
from tests.operation_cases import CASES
from tests.test_exact import assert_equal, expected, private
from tests.test_shapes import OPTIONS, convolution_cases

EVERYTHING = Room(elements=float("inf"), everything=True)
WAYS = [NormMethod.GRAM, NormMethod.FORMED, NormMethod.KEPT]
MODES = {"ghost": double_backward, "ghost_bk": book_keeping}


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[NormMethod]:
    """Makes the planner take one way wherever it has that option; gives the list of the ways that it then took."""
    taken = []

    def cheapest(options):
        taken.append(request.param if request.param in options else min(options, key=options.__getitem__))
        return taken[-1]

    monkeypatch.setattr(planner, "cheapest", cheapest)
    # Room for every gradient, and shifted images whatever the kernel sees.
    for mode in MODES:
        keep = KeepPolicy(share=1e9, everything=mode == "ghost_bk")
        monkeypatch.setattr(planner.MEMORY, mode, keep)
    monkeypatch.setattr(convolution, "_FEW_SEEN", 0)
    return taken


def check(case: Case, backward) -> None:
    oracle = expected(case, "mean")
    max_grad_norm = oracle.total_norm().median().item()
    model, wrapper, _ = private(case, "wrapped", "mean", max_grad_norm, backward=backward)
    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert_equal(param._norm_sample, oracle.norms()[name], f"norms of {name}")
            assert_equal(param.summed_grad, clipped[name], f"clipped sum of {name}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_way_equals_oracle(case: Case, mode: str, forced: list[NormMethod]) -> None:
    check(case, MODES[mode])


# Long enough for every number of blocks that Gram matrices are cut into.
@pytest.mark.parametrize("positions", [2, 95, 96, 97, 255, 257])
def test_every_way_on_many_positions(positions: int, forced: list[NormMethod]) -> None:
    check(Case("linear", lambda: nn.Linear(3, 2), [floats(positions, 3)]), book_keeping)
    assert set(forced) <= set(WAYS) and forced


@pytest.mark.parametrize("mode", MODES)
def test_no_room_equals_oracle(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters go to the second pass, or only their activations and backprops are kept."""
    monkeypatch.setattr(planner.MEMORY, mode, KeepPolicy(everything=mode == "ghost_bk"))
    for case in CASES:
        check(case, MODES[mode])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@OPTIONS
@given(case=convolution_cases())
def test_every_way_of_a_convolution(case: Case, way: NormMethod) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_FEW_SEEN", 0)
        patch.setattr(planner, "cheapest", lambda options: way if way in options else NormMethod.GRAM)
        patch.setattr(planner.MEMORY, "ghost_bk", KeepPolicy(share=1e9, everything=True))
        check(case, book_keeping)


def linear(positions: int, p: int, d: int, n: int = 2) -> Outer:
    return Outer(torch.randn(n, positions, p), torch.randn(n, positions, d), torch.Size((p, d)))


def conv(channels: int, size: int, n: int = 2) -> Convolution:
    x = torch.randn(n, channels, size, size)
    return Convolution(x, torch.randn_like(x), torch.Size((channels, channels, 3, 3)), (1, 1), (1, 1), (1, 1), 1)


CHOICES = {
    "one-position": (linear(1, 32, 32), NO_ROOM, NormMethod.CLOSED),
    "few-positions": (linear(16, 128, 128), NO_ROOM, NormMethod.GRAM),
    "many-positions": (linear(256, 32, 32), NO_ROOM, NormMethod.FORMED),
    "many-positions-and-room": (linear(256, 32, 32), EVERYTHING, NormMethod.KEPT),
    "few-positions-and-room": (linear(4, 128, 128), EVERYTHING, NormMethod.GRAM),
    "convolution-of-one-position": (conv(8, 1), NO_ROOM, NormMethod.CLOSED),
    "convolution-of-a-small-image": (conv(64, 4), NO_ROOM, NormMethod.GRAM),
    "convolution-of-a-large-image": (conv(8, 24), NO_ROOM, NormMethod.FORMED),
    "convolution-of-a-large-image-and-room": (conv(8, 24), EVERYTHING, NormMethod.KEPT),
}


@pytest.mark.parametrize("form, room, way", CHOICES.values(), ids=CHOICES)
def test_choice_by_shapes(form: PerSampleGradient, room: Room, way: NormMethod) -> None:
    measured = form.measured(room)
    assert measured.method is way
    assert (measured.kept is not None) == room.everything
    torch.testing.assert_close(measured.norm, Dense(form.materialize()).norm())


def test_choice_follows_the_batch() -> None:
    """The same layer goes another way on longer sequences."""
    module = GradSampleModuleFastGradientClipping(nn.Linear(32, 32))
    ways = []
    for positions in (1, 4, 256):
        with module.plan() as plan:
            module.first_pass(module(torch.randn(2, positions, 32)).square().sum((1, 2)))
        ways.append(plan.rows[0].norm_method)
    assert ways == [way.value for way in (NormMethod.CLOSED, NormMethod.GRAM, NormMethod.FORMED)]


@pytest.mark.parametrize("form", [linear(64, 48, 40, 9), conv(16, 12, 9)], ids=["linear", "convolution"])
@pytest.mark.parametrize("way", [NormMethod.GRAM, NormMethod.FORMED], ids=lambda way: way.name)
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_temporaries_are_bounded(
    form: SumOverPositions, way: NormMethod, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "cheapest", lambda options: way)
    monkeypatch.setattr(planner.MEMORY, "temporary", 4 * samples * form.temporary(way))
    sizes = []
    select = type(form).select
    monkeypatch.setattr(type(form), "select", lambda self, s: sizes.append(s) or select(self, s))
    measured = form.measured()
    torch.testing.assert_close(measured.norm, Dense(form.materialize()).norm())
    assert [s.stop - s.start for s in sizes[: -(-9 // samples)]] == [samples] * -(-9 // samples)
    assert measured.temporary == samples * form.temporary(way)


def test_ghost_keeps_no_more_than_its_share() -> None:
    """Biases and norm layers take little; a linear layer's backprops on many positions do not."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    module = GradSampleModuleFastGradientClipping(model)
    module.first_pass(module(torch.randn(4, 48, 64)).square().sum((1, 2)), planner.MEMORY.ghost)
    assert set(module.record.unkept) == {model[0].weight, model[2].weight}


def test_ghost_spares_the_second_pass_where_all_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    module = GradSampleModuleFastGradientClipping(model)
    double_backward(module, module(torch.randn(4, 64)).square().sum(1))
    assert not module.record.unkept


class Chain(nn.Module):
    """Layers one after another, whose outputs the graph holds; in a checkpoint or not."""

    def __init__(self, segments: int = 0) -> None:
        super().__init__()
        self.segments = segments
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return (
            checkpoint_sequential(self.layers, self.segments, x, use_reentrant=False)
            if self.segments
            else self.layers(x)
        )


class Added(nn.Module):
    """Layers side by side, whose outputs are let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


def makes_one_pass(model: nn.Module, x: Tensor, retain_graph: bool = False) -> bool:
    module = GradSampleModuleFastGradientClipping(model)
    double_backward(module, module(x).square().flatten(1).sum(1), retain_graph=retain_graph)
    return not module.record.unkept


@pytest.fixture
def of_default_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode "ghost" as users have it; where it makes two passes, the first keeps nothing."""
    monkeypatch.setattr(planner.MEMORY, "peak", planner.Memory().peak)
    monkeypatch.setattr(planner.MEMORY, "ghost", planner.NOTHING)


@pytest.mark.usefixtures("of_default_peak")
def test_ghost_makes_one_pass_where_memory_allows() -> None:
    x = torch.randn(16, 8, 64)
    assert makes_one_pass(Chain(), x)
    # The gradients of the parameters are all that matters.
    assert makes_one_pass(Added(), x[:1])


@pytest.mark.usefixtures("of_default_peak")
def test_ghost_makes_two_passes_where_one_takes_more() -> None:
    x = torch.randn(16, 8, 64)
    assert not makes_one_pass(Added(), x)
    assert not makes_one_pass(Chain(segments=4), x)
    # Nothing of the graph is given up.
    assert not makes_one_pass(Chain(), x, retain_graph=True)


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, in elements: the most is held at the first layer, whose backprops and input gradients come on top."""
    monkeypatch.setattr(held_module, "_SMALL", 0)
    held = Held()
    x, y, z = torch.zeros(4, 8), torch.zeros(4, 16), torch.zeros(4, 2)
    held.note("first", [x], [y], [torch.zeros(16, 8)])
    held.note("second", [y], [z], [torch.zeros(2, 16)])
    del z  # as nothing in the graph keeps it
    activations, passing, gradient_of_second, kept_of_second = 32 + 64, 64 + 32, 32, 8 + 64
    plain, one_pass, two_passes = (size / 8 for size in held.peaks(4))
    assert plain == activations + gradient_of_second + passing
    assert one_pass == activations + kept_of_second + passing
    assert two_passes == activations + passing
    # Of one sample, the second layer's gradient takes less than what it is made of.
    assert held.peaks(1).one_pass / 8 == activations + gradient_of_second + passing


@pytest.mark.parametrize("features, is_held", [(2**9, True), (2**13, False)])
def test_what_is_small_counts_as_held(features: int, is_held: bool) -> None:
    held = Held()
    held.note("layer", [torch.zeros(1, 1)], [torch.zeros(1, features)], [torch.zeros(1)])
    passing = 8 * (1 + features)
    assert held.peaks(1).plain == passing + 8 + is_held * 8 * features


def test_freed() -> None:
    """By hand, in elements: where the first layer comes, the last one's output is given up, and its backprops are kept."""
    held = Held()
    x, y, z = torch.zeros(4, 8), torch.zeros(4, 16), torch.zeros(4, 256)
    held.note("first", [x], [y], [torch.zeros(16, 8)])
    held.note("second", [y], [z], [torch.zeros(256, 16)])
    freed = {layer: (own / 8, room / 8) for layer, (own, room) in held.freed(4).items()}
    kept_of_second, passing_first, gradient_of_second = 64 + 1024, 64 + 32, 4096
    most = 32 + 64 + gradient_of_second + passing_first
    assert held.peaks(4).plain / 8 == most
    at_first = 32 + 64 + kept_of_second
    assert freed["first"] == (32 + 64, most - at_first - passing_first)
    assert freed["second"] == (kept_of_second, most - (32 + 64 + 1024) - (1024 + 64))


def test_a_layer_has_room_in_memory_that_was_given_up() -> None:
    freed = {"last": planner.Freed(own=400, room=800), "first": planner.Freed(own=400, room=1200)}
    budget = planner.KeepBudget(KeepPolicy(everything=True, freed=True), freed)
    room = budget.room("last", 100, 1, True, 4)
    assert room == planner.Room(200, everything=True)
    budget.spend(room, 50)
    budget.spend(room, 90)
    # The layer kept 160 bytes more than it would in any case.
    assert budget.room("first", 100, 1, True, 4) == planner.Room((1200 - 160) / 4, everything=True)
    assert budget.room("other", 100, 1, True, 4) == planner.Room(0, everything=True)


@pytest.mark.usefixtures("of_default_peak")
def test_one_pass_equals_oracle() -> None:
    for case in CASES:
        check(case, double_backward)


@pytest.mark.parametrize("form", [linear(5, 4, 3, 6), linear(1, 4, 3, 6), conv(2, 4, 6), Dense(torch.randn(6, 4, 3))])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_folded_is_the_sum_over_uses(form: PerSampleGradient, uses: int) -> None:
    gradients = form.materialize()
    sum_over_uses = form.sum_over_uses(uses)
    torch.testing.assert_close(sum_over_uses.materialize(), gradients.unflatten(0, (-1, uses)).sum(1))
    torch.testing.assert_close(sum_over_uses.norm(), sum_over_uses.materialize().flatten(1).norm(dim=1))


def test_convolutions_of_large_images_add_up_as_gradients() -> None:
    forms = [conv(2, 8), conv(2, 8)]
    added = add(forms)
    assert isinstance(added, Dense)
    torch.testing.assert_close(added.materialize(), sum(form.materialize() for form in forms))


def test_patches_and_shifted_images_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    form = conv(3, 7)
    x, g = form.images, form.backprops
    oracle = torch.stack([F.conv2d(x[n, :, None], g[n, :, None], padding=1).movedim(0, 1) for n in range(len(x))])
    for few in (0, 10**9):
        monkeypatch.setattr(convolution, "_FEW_SEEN", few)
        torch.testing.assert_close(form.formed().materialize(), oracle)
