"""Units of several records: drawn together, clipped as one, counted once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import CausalLMLoss, ChunkedCausalLMLoss, PrivacyEngine
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError
from opacus_fgc.sampling.units import UnitDataset
from tests.case import Apply
from tests.reference import reference
from tests.test_rows_with_owners import both_modes, double, wrapped  # noqa: F401  (a fixture for all tests here)

T, D, CLASSES = 5, 4, 3


def of_unit(unit: Sequence[Any]) -> list[list[int]]:
    """The records of each unit, units in the order in which they come."""
    return [[row for row, other in enumerate(unit) if other == one] for one in dict.fromkeys(unit)]


class ByUnit(nn.Module):
    """A model and its loss on all records of a unit, so that the oracle's sample is the unit."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], target: Tensor, reduction: str) -> None:
        super().__init__()
        self.model, self.inputs, self.target, self.reduction = model, inputs, target, reduction

    def forward(self, rows: list[list[int]]) -> Tensor:
        output = self.model(*(value[rows[0]] for value in self.inputs))
        losses = F.cross_entropy(output, self.target[rows[0]], reduction="none")
        return getattr(losses, self.reduction)()


def oracle(model: nn.Module, inputs: Sequence[Tensor], target: Tensor, unit: Sequence[Any], reduction: str) -> Any:
    units = of_unit(unit)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    of_units = ByUnit(copy.deepcopy(model), inputs, target, reduction)
    several = [reference(of_units, lambda loss, _: loss, ([rows],), torch.zeros(1), 1) for rows in units]
    norms = torch.cat([one.total_norm() for one in several])

    def clipped_sum(c: float) -> dict[str, Tensor]:
        return {name: torch.stack([one.clipped_sum(c)[f"model.{name}"] for one in several]).sum(0) for name in params}

    return norms, clipped_sum


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = DPLSTM(D, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


class RecurrentOfTorch(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, 5, num_layers=2, batch_first=True)


class Attention(nn.Module):
    """Positions that samples share, layers on tokens, norms, a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.norm = nn.Embedding(T, D), nn.GroupNorm(2, D)
        self.block = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.randn(D)), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm((x + self.positions(torch.arange(x.shape[1]))).mT).mT
        return self.head(self.scale * self.block(x).mean(1))


class Routed(nn.Module):
    """Tokens go to the experts that a layer chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(D, 3), nn.Linear(D, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights = self.router(tokens).softmax(-1)
        output = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            rows = (weights.argmax(-1) == place).nonzero().flatten()
            output = output.index_add(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return self.head(output.view(x.shape).mean(1))


def images() -> nn.Module:
    return Apply(
        lambda m, x: m.head(m.norm(m.conv(x.mT).relu().mean(2))),
        conv=nn.Conv1d(D, 6, 3),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, CLASSES),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "images": (images, lambda n: (torch.randn(n, T, D),)),
    "attention": (Attention, lambda n: (torch.randn(n, T, D),)),
    "routed": (Routed, lambda n: (torch.randn(n, T, D),)),
    "packed-sequence": (Recurrent, lambda n: (torch.randn(n, T, D), torch.randint(1, T + 1, (n,)))),
    "packed-sequence-of-torch": (
        RecurrentOfTorch,
        lambda n: (torch.randn(n, T, D), torch.randint(1, T + 1, (n,))),
    ),
    "zero-head": (
        # Nothing but the head has a gradient at first, as with LoRA.
        lambda: Apply(
            lambda m, x: m.head(m.body(x.mean(1))), body=nn.Linear(D, D), head=nn.Linear(D, CLASSES)
        ).requires_grad_(True),
        lambda n: (torch.randn(n, T, D),),
    ),
}
UNITS = {
    "ragged": [0, 0, 0, 1, 2, 2],
    "mixed-up": [5, 3, 5, 3, 3, 9],
    "regular": [0, 0, 1, 1, 2, 2],
    "views-behind-each-other": [0, 1, 2, 0, 1, 2],
    "one": [1, 1, 1, 1],
    "of-one-record-each": [3, 2, 1, 0, 4, 5],
    "of-three-rows": [7, 8, 8],
}


@pytest.mark.every(3)
@both_modes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_oracle(name: str, reduction: str, mode: str) -> None:
    make, draw = MODELS[name]
    model = make()
    if name == "zero-head":
        nn.init.zeros_(model.head.weight)
    data = TensorDataset(torch.zeros(4))
    module, optimizer, criterion, _ = make_private(
        model, data, None, mode, criterion=nn.CrossEntropyLoss(reduction=reduction), loss_reduction=reduction
    )
    for unit in UNITS.values():
        inputs, target = draw(len(unit)), torch.randint(CLASSES, (len(unit),))
        norms, clipped_sum = oracle(model, inputs, target, unit, reduction)
        module.max_grad_norm = c = float(norms.median())
        for _ in range(2):  # the second one has no certificate
            criterion(module(*inputs), target, unit=torch.tensor(unit)).backward()
            torch.testing.assert_close(module.per_sample_gradient_norms, norms, rtol=1e-10, atol=1e-10)
            for key, wanted in clipped_sum(c).items():
                torch.testing.assert_close(model.get_parameter(key).summed_grad, wanted, rtol=1e-10, atol=1e-10)
            optimizer.zero_grad()


@both_modes
@pytest.mark.parametrize("certify", ["always", "never"])
@pytest.mark.filterwarnings("ignore:certify='never'")
def test_with_and_without_certificates(certify: str, mode: str) -> None:
    model = Attention()
    data = TensorDataset(torch.randn(12, T, D), torch.randint(CLASSES, (12,)))
    unit = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5]
    module, optimizer, criterion, _ = make_private(model, data, unit, mode, certify=certify)
    for rows in ([0, 1, 2, 5], [3, 4, 6, 7, 8, 9, 10]):
        x, y = data[rows]
        norms, _ = oracle(model, (x,), y, [unit[row] for row in rows], "mean")
        criterion(module(x), y, unit=[unit[row] for row in rows]).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, norms, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()


def make_private(model: nn.Module, data: Any, unit: Any, mode: str = "ghost", **options: Any) -> Any:
    arguments = {
        "criterion": nn.CrossEntropyLoss(),
        "data_loader": DataLoader(data, batch_size=max(1, len(data) // 4)),
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
    }
    engine = options.pop("engine", None) or PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return engine.make_private(
        module=model, optimizer=optimizer, grad_sample_mode=mode, unit=unit, **{**arguments, **options}
    )


def data_of_users(records: int = 60, users: int = 12) -> tuple[TensorDataset, Tensor]:
    unit = torch.cat([torch.arange(users), torch.randint(users, (records - users,))])
    return TensorDataset(torch.randn(records, D), torch.randint(CLASSES, (records,)), unit), unit


@both_modes
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("most", [None, 2])
def test_a_run_is_that_of_the_oracle(most: int | None, physical: int | None, secure: bool, mode: str) -> None:
    data, unit = data_of_users()
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    plain = copy.deepcopy(model)
    engine = PrivacyEngine(accountant="rdp", secure_mode=secure)
    module, optimizer, criterion, loader = make_private(
        model, data, unit, mode, noise_multiplier=0.0, records_per_unit=most, engine=engine
    )
    batches: list[list[Tensor]] = [[]]
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=physical or 100, optimizer=optimizer
    ) as physical_loader:
        for _ in range(3):
            for x, y, user in physical_loader if physical else loader:
                assert physical is None or len(user.unique()) <= physical
                batches[-1].append((x, y, user))
                last = not optimizer._check_skip_next_step(pop_next=False)
                criterion(module(x), y, unit=user).backward()
                optimizer.step()
                optimizer.zero_grad()
                if last:
                    batches.append([])
    assert batches.pop() == [] and len(batches) == 3 * len(loader)
    sizes = set()
    for parts in batches:
        x, y, user = (torch.cat(several) for several in zip(*parts, strict=True))
        count = torch.bincount(user, minlength=12)
        everything = torch.bincount(unit, minlength=12)
        assert (count[count > 0] == everything[count > 0].clamp(max=most or 100)).all()
        sizes.add(int((count > 0).sum()))
        if not len(x):
            continue
        _, clipped_sum = oracle(plain, (x,), y, user.tolist(), "mean")
        with torch.no_grad():
            for name, total in clipped_sum(0.5).items():
                # 12 users, of whom a batch has each with probability 1 / 4.
                plain.get_parameter(name).sub_(total / 3)
    assert len(sizes) > 2
    for name, param in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-9, atol=1e-9)
    assert engine.accountant.history == [(0.0, 1 / 4, 12)]


def test_each_unit_is_drawn_with_the_rate_that_is_accounted() -> None:
    data, unit = data_of_users(records=200, users=10)
    loader = make_private(nn.Linear(D, CLASSES), data, unit)[3]
    drawn = torch.zeros(10)
    epochs = 100
    for _ in range(epochs):
        for _, _, user in loader:
            drawn += torch.bincount(user, minlength=10) > 0
    rate = drawn / (epochs * len(loader))
    # Five standard deviations of a binomial's mean, whatever number of records a user has.
    assert (rate - 1 / 4).abs().max() < 5 * (0.25 * 0.75 / (epochs * len(loader))) ** 0.5


def test_records_of_a_unit_are_drawn_anew() -> None:
    units = UnitDataset(list(range(10)), [0] * 6 + [1] * 4, most=2)
    drawn = [units[0] for _ in range(50)]
    assert all(len(set(records)) == 2 for records in drawn)
    assert {record for records in drawn for record in records} == set(range(6))


class Fetched(TensorDataset):
    """Fetches several records at once, as data sets of Hugging Face do."""

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [super(Fetched, self).__getitem__(row) for row in rows]


@pytest.mark.parametrize("kind", [TensorDataset, Fetched])
def test_records_come_from_workers(kind: type) -> None:
    data, unit = data_of_users()
    model = nn.Linear(D, CLASSES)
    module, optimizer, criterion, loader = make_private(
        model, kind(*data.tensors), unit, data_loader=DataLoader(kind(*data.tensors), batch_size=15, num_workers=2)
    )
    for x, y, user in loader:
        assert all((data.tensors[0] == row).all(1).any() for row in x)
        criterion(module(x), y, unit=user).backward()
        optimizer.step()
        optimizer.zero_grad()


@both_modes
def test_a_batch_without_units(mode: str) -> None:
    data, unit = data_of_users(records=8, users=4)
    model = nn.Linear(D, CLASSES)
    module, optimizer, criterion, loader = make_private(
        model, data, unit, mode, data_loader=DataLoader(data, batch_size=1), noise_multiplier=1.0
    )
    sizes = []
    for _ in range(4):
        for x, y, user in loader:
            sizes.append(len(x))
            criterion(module(x), y, unit=user).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 0 in sizes and max(sizes) > 0
    # Half a user a batch.
    assert optimizer.expected_batch_size == 0.5


@both_modes
def test_names_as_units(mode: str) -> None:
    model, x, y = nn.Linear(D, CLASSES), torch.randn(4, D), torch.randint(CLASSES, (4,))
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    names = ["ann", "bob", "ann", "cy"]
    criterion(module(x), y, unit=names).backward()
    norms, _ = oracle(model, (x,), y, names, "mean")
    torch.testing.assert_close(module.per_sample_gradient_norms, norms)


@both_modes
def test_views_of_a_sample_are_one(mode: str) -> None:
    """Augmentation multiplicity (De et al. 2022, arXiv:2204.13650), in each layout that users have."""
    n, k = 4, 3
    model, views, y = images(), torch.randn(n, k, T, D), torch.randint(CLASSES, (n,))
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    flat, targets = views.flatten(0, 1), y.repeat_interleave(k)
    unit = torch.arange(n).repeat_interleave(k)
    norms, _ = oracle(model, (flat,), targets, unit.tolist(), "mean")
    for x, labels, options in (
        (flat, targets, {"unit": unit}),
        (flat, targets, {"shape": (n, k)}),
        (views.transpose(0, 1).flatten(0, 1), y.repeat(k), {"unit": torch.arange(n).repeat(k)}),
    ):
        criterion(module(x), labels, **options).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, norms, rtol=1e-10, atol=1e-10)
        criterion.optimizer.zero_grad()


@both_modes
def test_a_private_loader_of_samples_and_views_of_them(mode: str) -> None:
    x, y = torch.randn(24, D), torch.randint(CLASSES, (24,))
    model = nn.Linear(D, CLASSES)
    module, optimizer, criterion, loader = make_private(model, TensorDataset(x, y), None, mode)
    for inputs, labels in loader:
        views = torch.cat([inputs, -inputs])
        criterion(module(views), labels.repeat(2), unit=torch.arange(len(labels)).repeat(2)).backward()
        optimizer.step()
        optimizer.zero_grad()


@both_modes
def test_packed_sequences_of_units(mode: str) -> None:
    lengths, unit = [3, 4, 2, 5], [0, 1, 0, 1]
    model = Apply(lambda m, tokens: m.head(m.table(tokens)), table=nn.Embedding(7, D), head=nn.Linear(D, 7))
    module, criterion = wrapped(model, CausalLMLoss(), mode)
    tokens = torch.randint(7, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    rows = tokens[0].split(lengths)
    for _ in range(2):
        criterion(module(tokens), tokens, positions, unit=unit).backward()
        wanted = []
        for own in of_unit(unit):
            losses = [F.cross_entropy(model(rows[one][None])[0, :-1], rows[one][1:]) for one in own]
            gradients = torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))
            wanted.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
        torch.testing.assert_close(module.per_sample_gradient_norms, torch.stack(wanted), rtol=1e-10, atol=1e-10)
        criterion.optimizer.zero_grad()


@both_modes
def test_positions_of_packed_sequences_are_records_of_them(mode: str) -> None:
    """So any criterion serves packed sequences."""
    lengths = [3, 1, 4]
    model = Apply(lambda m, x: m.head(m.body(x)), body=nn.Linear(D, D), head=nn.Linear(D, CLASSES))
    plain = copy.deepcopy(model)
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    unit = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    for _ in range(2):
        x, y = torch.randn(1, sum(lengths), D), torch.randint(CLASSES, (1, sum(lengths)))
        criterion(module(x).flatten(0, 1), y.flatten(), unit=unit).backward()
        wanted, _ = oracle(plain, (x[0],), y[0], unit.tolist(), "mean")
        torch.testing.assert_close(module.per_sample_gradient_norms, wanted, rtol=1e-10, atol=1e-10)
        criterion.optimizer.zero_grad()


@both_modes
def test_losses_of_the_same_units_add_up(mode: str) -> None:
    model, x, y = nn.Linear(D, CLASSES), torch.randn(5, D), torch.randint(CLASSES, (5,))
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    unit = [0, 1, 1, 0, 2]
    (0.5 * criterion(module(x), y, unit=unit) + 0.5 * criterion(module(x), y, unit=unit)).backward()
    norms, _ = oracle(model, (x,), y, unit, "mean")
    torch.testing.assert_close(module.per_sample_gradient_norms, norms)
    with pytest.raises(PrivacyValueError, match="losses whose samples are not the same"):
        criterion(module(x), y, unit=unit) + criterion(module(x), y, unit=[0, 1, 2, 0, 2])


# What is refused


def test_a_unit_in_two_physical_batches_is_refused() -> None:
    data, unit = data_of_users(records=24, users=4)
    model = nn.Linear(D, CLASSES)
    module, optimizer, criterion, loader = make_private(model, data, unit, data_loader=DataLoader(data, batch_size=24))
    x, y, user = next(iter(loader))
    assert user.unique().tolist() == [0, 1, 2, 3]
    middle = int((user == user[0]).sum()) - 1  # within the first user's records
    optimizer.signal_skip_step(do_skip=True)
    criterion(module(x[:middle]), y[:middle], unit=user[:middle]).backward()
    optimizer.step()
    optimizer.zero_grad()
    criterion(module(x[middle:]), y[middle:], unit=user[middle:]).backward()
    with pytest.raises(PrivacyValueError, match=r"this step is on 5 samples.* give the criterion the unit of each"):
        optimizer.step()


@pytest.mark.parametrize("wrong", [lambda y, user: y, lambda y, user: torch.arange(len(y))], ids=["labels", "records"])
def test_other_units_than_were_drawn_are_refused(wrong: Callable) -> None:
    data, unit = data_of_users()
    model = nn.Linear(D, CLASSES)
    module, optimizer, criterion, loader = make_private(model, data, unit, data_loader=DataLoader(data, batch_size=60))
    x, y, user = next(iter(loader))
    criterion(module(x), y, unit=wrong(y, user)).backward()
    with pytest.raises(PrivacyValueError, match=r"this step is on (3|60) samples"):
        optimizer.step()


def test_a_criterion_that_is_not_told_units_is_refused() -> None:
    data, unit = data_of_users()
    module, _, criterion, loader = make_private(nn.Linear(D, CLASSES), data, unit)
    x, y, _ = next(iter(loader))
    with pytest.raises(PrivacyValueError, match="was not told whose"):
        criterion(module(x), y)
    with torch.no_grad():
        assert criterion(module(x), y).item() > 0


@both_modes
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_records_in_another_order_than_their_units_are_refused(unit: list[int], mode: str) -> None:
    """Whose a row is, is proven, where the model's rows and the losses can be compared."""
    if len(set(unit)) == 1:
        pytest.skip("of one unit every order is right")
    model = Apply(lambda m, x: m.head(m.body(x).roll(1, 0)), body=nn.Linear(D, D), head=nn.Linear(D, CLASSES))
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    x, y = torch.randn(len(unit), D), torch.randint(CLASSES, (len(unit),))
    with pytest.raises(PrivacyNotImplementedError, match=r"its rows are not records, in the order of .* unit"):
        criterion(module(x), y, unit=unit).backward()


def divided(output: Tensor) -> Tensor:
    return output / (1 + output.detach().abs().mean(0))


MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch-norm": lambda m, x: m.head(F.batch_norm(m.body(x), None, None, training=True)),
    "a-mean-without-gradient": lambda m, x: m.head(divided(m.body(x))),
    "a-mean-of-what-is-returned": lambda m, x: divided(m.head(m.body(x))),
    "a-mean": lambda m, x: m.head(m.body(x) - m.body(x).mean(0)),
}


@both_modes
@pytest.mark.parametrize("unit", [UNITS["ragged"], UNITS["mixed-up"], UNITS["regular"]])
@pytest.mark.parametrize("name", MIXING)
def test_units_that_are_mixed_are_refused(name: str, unit: list[int], mode: str) -> None:
    model = Apply(MIXING[name], body=nn.Linear(D, D), head=nn.Linear(D, CLASSES))
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    x, y = torch.randn(len(unit), D), torch.randint(CLASSES, (len(unit),))
    with pytest.raises(PrivacyNotImplementedError, match="mixes samples"):
        criterion(module(x), y, unit=unit).backward()


@both_modes
def test_records_of_a_unit_may_see_each_other(mode: str) -> None:
    """A unit is the sample, so that what its records share is its own."""
    unit = torch.tensor([0, 0, 0, 1, 2, 2])
    same = (unit[:, None] == unit).double()
    model = Apply(
        lambda m, x: m.head((same / same.sum(1, keepdim=True)) @ m.body(x)),
        body=nn.Linear(D, D),
        head=nn.Linear(D, CLASSES),
    )
    plain = copy.deepcopy(model)
    module, criterion = wrapped(model, nn.CrossEntropyLoss(), mode)
    x, y = torch.randn(6, D), torch.randint(CLASSES, (6,))
    criterion(module(x), y, unit=unit).backward()
    losses = F.cross_entropy(plain(x), y, reduction="none")
    wanted = []
    for rows in of_unit(unit.tolist()):
        gradients = torch.autograd.grad(losses[rows].mean(), list(plain.parameters()), retain_graph=True)
        wanted.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
    torch.testing.assert_close(module.per_sample_gradient_norms, torch.stack(wanted))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"unit": [0, 1]}, ValueError, "unit has 2 values and the data set 60 records"),
        ({"records_per_unit": 0}, ValueError, "records_per_unit is 0"),
        ({"records_per_unit": 1.5}, ValueError, "records_per_unit is 1.5"),
        ({"unit": None, "records_per_unit": 2}, ValueError, "records_per_unit without unit"),
        ({"poisson_sampling": False}, ValueError, "unit and poisson_sampling=False"),
        ({"rand_on_empty": True}, ValueError, "unit and rand_on_empty=True"),
        ({"mode": "hooks"}, NotImplementedError, "in which each record is a unit"),
    ],
)
def test_arguments_are_refused_and_change_nothing(options: dict[str, Any], error: type, text: str) -> None:
    data, unit = data_of_users()
    model = nn.Linear(D, CLASSES)
    with pytest.raises(error, match=text):
        make_private(model, data, **{"unit": unit, **options})
    assert type(model) is nn.Linear and not model._forward_hooks


def test_a_private_loader_is_no_data_loader_of_records() -> None:
    data, unit = data_of_users()
    loader = make_private(nn.Linear(D, CLASSES), data, None)[3]
    with pytest.raises(ValueError, match="a data loader that make_private returned"):
        make_private(nn.Linear(D, CLASSES), data, unit, data_loader=loader)


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        (torch.zeros(3), "torch.float32; it is one whole number"),
        (torch.zeros(3, 1).long(), "shape"),
        ([0, 1], "2 values"),
    ],
)
def test_units_without_a_meaning_are_refused(unit: Any, text: str) -> None:
    module, criterion = wrapped(nn.Linear(D, CLASSES), nn.CrossEntropyLoss(), "ghost")
    with pytest.raises(ValueError, match=text):
        criterion(module(torch.randn(3, D)), torch.zeros(3).long(), unit=unit)


@both_modes
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_chunks(tied: bool, mode: str) -> None:
    model = Apply(lambda m, tokens: m.body(m.table(tokens)), table=nn.Embedding(7, D), body=nn.Linear(D, D))
    model.head = nn.Linear(D, 7, bias=not tied)
    if tied:
        model.head.weight = model.table.weight
    plain = copy.deepcopy(model)
    module, criterion = wrapped(model, ChunkedCausalLMLoss(), mode)
    for unit in UNITS.values():
        tokens = torch.randint(7, (len(unit), T))
        for _ in range(2):
            criterion(module(tokens), model.head, tokens, unit=unit).backward()
            wanted = []
            for rows in of_unit(unit):
                losses = CausalLMLoss(reduction="none")(plain.head(plain(tokens[rows])), tokens[rows])
                gradients = torch.autograd.grad(losses.mean(), list(plain.parameters()))
                wanted.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
            torch.testing.assert_close(module.per_sample_gradient_norms, torch.stack(wanted), rtol=1e-10, atol=1e-10)
            criterion.optimizer.zero_grad()
