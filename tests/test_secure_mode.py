"""``secure_mode=True``: noise and batches from a generator without seed or state, in a way that floating point does not undo."""

from __future__ import annotations

import copy
import io
import itertools
import math
import multiprocessing
import pickle
import random
import secrets
import sys
import warnings
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import opacus
import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.optimizers.optimizer import _generate_noise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from opacus_fgc import DPOptimizerFastGradientClipping, PrivacyEngine
from opacus_fgc.noise.secure import CHUNK, GRID, SecureGenerator
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.sampling.draws import Batches
from opacus_fgc.sampling.secure import SecurePoissonSampler, SecureRandomSampler, secured
from tests.reference import reference

SIZE, BATCH = 40, 8


def data() -> TensorDataset:
    """The target is the sample's number modulo 3, the first feature its number."""
    x = torch.randn(SIZE, 6)
    x[:, 0] = torch.arange(SIZE)
    return TensorDataset(x, torch.arange(SIZE) % 3)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def make_private(engine: Any = None, shuffle: bool = False, workers: dict[str, Any] | None = None, **options: Any):
    """Engine, model, optimizer, criterion, loader in secure mode, with ``options`` for `make_private`."""
    model = options.pop("module", None) or network()
    engine = engine or PrivacyEngine(accountant="rdp", secure_mode=True)
    defaults = dict(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        grad_sample_mode="ghost",
    )
    if "data_loader" not in options:
        options["data_loader"] = DataLoader(data(), batch_size=BATCH, shuffle=shuffle, **(workers or {}))
    return engine, *engine.make_private(**{**defaults, **options})


@pytest.fixture(params=MODES)
def private(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return partial(make_private, grad_sample_mode=request.param)


def flat(model: nn.Module, attribute: str) -> Tensor:
    return torch.cat([getattr(param, attribute).flatten() for param in model.parameters()])


def noise_of(model: nn.Module, optimizer: Any, criterion: Any, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return flat(model, "grad") * optimizer.expected_batch_size - flat(model, "summed_grad")


def batch(n: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(3, (n,))


# End to end


@pytest.mark.parametrize("wrap_model", [True, False])
def test_trains(private: Any, wrap_model: bool) -> None:
    model = network()
    x = torch.randn(SIZE, 6)
    engine, wrapped, optimizer, criterion, loader = private(
        module=model,
        wrap_model=wrap_model,
        noise_multiplier=0.01,
        data_loader=DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=BATCH),
    )
    called = wrapped if wrap_model else model
    assert engine.secure_mode and isinstance(engine.secure_rng, SecureGenerator)
    assert optimizer.secure_mode and optimizer.generator is engine.secure_rng
    assert isinstance(loader, DPDataLoader) and isinstance(loader.batch_sampler, SecurePoissonSampler)
    x, y = loader.dataset.tensors
    before = nn.functional.cross_entropy(called(x), y).item()
    for _ in range(20):
        for x_batch, y_batch in loader:
            optimizer.zero_grad()
            criterion(called(x_batch), y_batch).backward()
            optimizer.step()
    assert nn.functional.cross_entropy(called(x), y).item() < 0.8 * before
    assert engine.accountant.history == [(0.01, BATCH / SIZE, 20 * SIZE // BATCH)]


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
def test_with_epsilon(private: Any) -> None:
    model = network()
    engine = PrivacyEngine(secure_mode=True)
    _, optimizer, criterion, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data(), batch_size=BATCH),
        target_epsilon=3.0,
        target_delta=1e-3,
        epochs=1,
        max_grad_norm=0.5,
        grad_sample_mode=private.keywords["grad_sample_mode"],
    )
    assert optimizer.secure_mode and isinstance(loader.batch_sampler, SecurePoissonSampler)


@pytest.mark.parametrize("noise_multiplier", [0.0, 1e-9])
def test_noise_is_added_to_the_clipped_sum(private: Any, noise_multiplier: float) -> None:
    _, model, optimizer, criterion, _ = private(poisson_sampling=False, noise_multiplier=noise_multiplier)
    x, y = batch()
    oracle = reference(model._module, nn.CrossEntropyLoss(), (x,), y, len(x))
    criterion(model(x), y).backward()
    optimizer.step()
    expected = torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(0.5).values()]) / BATCH
    torch.testing.assert_close(flat(model, "grad"), expected, rtol=0, atol=1e-9)
    assert torch.equal(flat(model, "grad") * BATCH, flat(model, "summed_grad")) == (noise_multiplier == 0)


def test_gradients_have_to_be_cleared_between_steps(private: Any) -> None:
    _, model, optimizer, criterion, _ = private(poisson_sampling=False)
    x, y = batch()
    criterion(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_model(private: Any, dtype: torch.dtype) -> None:
    _, model, optimizer, criterion, _ = private(poisson_sampling=False, module=network().to(dtype))
    x, y = batch()
    noise = torch.cat([noise_of(model, optimizer, criterion, x.to(dtype), y).double() for _ in range(40)])
    assert all(param.grad.dtype == param.dtype == dtype for param in model.parameters())
    assert noise.std().item() == pytest.approx(0.5, rel=0.07)


# The noise


@pytest.mark.parametrize("max_grad_norm, noise_multiplier", [(0.5, 1.0), (2.0, 0.3)])
def test_noise_is_normal_and_independent(private: Any, max_grad_norm: float, noise_multiplier: float) -> None:
    options = {"max_grad_norm": max_grad_norm, "noise_multiplier": noise_multiplier}
    _, model, optimizer, criterion, _ = private(poisson_sampling=False, **options)
    x, y = batch()
    noise = torch.stack([noise_of(model, optimizer, criterion, x, y) for _ in range(200)])
    noise /= noise_multiplier * max_grad_norm
    # 16,600 draws: the bounds are five deviations of each estimate and more.
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert abs(noise.mean().item()) < 0.04
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6
    assert noise.std(0).min() > 0.7 and noise.std(1).min() > 0.5
    for ahead in (1, 2, 7):
        assert abs((noise[ahead:] * noise[:-ahead]).mean().item()) < 0.04, "between steps"
        assert abs((noise[:, ahead:] * noise[:, :-ahead]).mean().item()) < 0.04, "between parameters"


def test_noise_of_a_tensor_of_many_chunks() -> None:
    # A row is a chunk: one that took the numbers of another would be correlated with it.
    noise = SecureGenerator().add_normal(torch.zeros(3, CHUNK), 2.0)
    assert stats.kstest(noise.flatten().numpy() / 2, "norm").pvalue > 1e-6
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 6 / math.sqrt(CHUNK)


def test_noise_without_samples_and_for_unused_parameters(private: Any) -> None:
    _, model, optimizer, criterion, _ = private(poisson_sampling=False)
    x, y = batch()
    criterion(model(x[:0]), y[:0]).backward()
    assert flat(model, "summed_grad").abs().max() == 0
    optimizer.step()
    assert (flat(model, "grad") != 0).all()
    optimizer.zero_grad()
    # The second layer only.
    criterion(model._module[2](torch.randn(BATCH, 8)), y).backward()
    assert model._module[0].weight.summed_grad.abs().max() == 0
    optimizer.step()
    assert (flat(model, "grad") != 0).all()


def test_each_value_has_four_draws_of_four_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    n, drawn = 5, []

    def uniform(self: SecureGenerator, *shape: int) -> Tensor:
        drawn.append(torch.rand(shape))
        return drawn[-1]

    monkeypatch.setattr(SecureGenerator, "uniform", lambda *args: uniform(*args).clone())
    values = SecureGenerator().normal(n)
    (uniforms,) = drawn
    # Four draws a value, and for each row a pair more, one of which is the first draw that is thrown away.
    assert uniforms.numel() == 4 * (n + 1)

    def draw(row: int, column: int, function: Any) -> float:
        radius, angle = uniforms[0, row, column].item(), uniforms[1, row, column].item()
        return math.sqrt(-2 * math.log(1 - radius)) * function(2 * math.pi * angle)

    for i, value in enumerate(values):
        draws = [draw(row, i + 1, math.cos) for row in (0, 1)] + [draw(row, i, math.sin) for row in (0, 1)]
        assert value.item() == pytest.approx(sum(draws) / 2, rel=1e-12)


def off_grid(values: Tensor, std: float) -> int:
    steps = values.double() / (std * 2.0**-GRID)
    return int((steps != steps.round()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_bits_of_the_noisy_sum_do_not_tell_the_sum(dtype: torch.dtype) -> None:
    # Near 0, 0 + noise has bits below 2**-24 in float32, which 1 + noise cannot have.
    sums = {value: torch.full((20_000,), value, dtype=dtype) for value in (0.0, 1.0, math.pi, -1e-3)}
    for value, exact in sums.items():
        noisy = SecureGenerator().add_normal(exact, 1.0)
        assert noisy.dtype == dtype
        assert off_grid(noisy, 1.0) == 0
        assert noisy.mean().item() == pytest.approx(value, abs=0.05)
    # The attack on Opacus' own secure mode.
    told = {
        value: off_grid(exact + _generate_noise(1.0, exact, secure_mode=True), 1.0) for value, exact in sums.items()
    }
    assert min(told.values()) > 1000


@pytest.mark.parametrize("std", [0.37, 1e-6, 300.0])
def test_grid_depends_on_the_deviation_alone(std: float) -> None:
    power = 2.0 ** math.floor(math.log2(std))
    noisy = SecureGenerator().add_normal(torch.randn(10_000) * std, std)
    assert off_grid(noisy, power) == 0
    # No coarser than it says.
    assert off_grid(noisy, 2 * power) > 4000


def test_shapes_and_strides() -> None:
    generator = SecureGenerator()
    for values in (torch.ones(()), torch.ones(0, 3), torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        for std in (0.0, 1e-12):
            noisy = generator.add_normal(values, std)
            assert noisy is not values and noisy.shape == values.shape
            torch.testing.assert_close(noisy, values)


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_every_value_gets_its_own_noise(n: int) -> None:
    values = torch.arange(n) + 0.5
    noise = SecureGenerator().add_normal(values, 0.01) - values
    assert (noise.abs() < 0.1).all()
    # One value in three million is not moved off its place on the grid.
    assert (noise == 0).sum() <= 5
    assert stats.kstest(noise.numpy() / 0.01, "norm").pvalue > 1e-6


# The generator


def test_words_are_aes_256_in_counter_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def zeros(size: int) -> bytes:
        sizes.append(size)
        return bytes(size)

    monkeypatch.setattr(secrets, "token_bytes", zeros)
    words = SecureGenerator().words(2, 3)
    # McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13 and 14: AES-256 with key 0 of the blocks 0, 1, 2.
    known = "dc95c078a2408989ad48a21492842087 530f8afbc74536b9a963b4f1c4cb738b cea7403d4d606b6e074ec5d3baf39d18"
    assert words.numpy().tobytes() == bytes.fromhex(known)
    assert sizes == [32]


def test_uniform_is_on_53_bits() -> None:
    uniform = SecureGenerator().uniform(100_000)
    assert uniform.dtype == torch.float64
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-6
    steps = uniform * 2**53
    assert torch.equal(steps, steps.round())
    assert (steps.long() & 1).double().mean().item() == pytest.approx(0.5, abs=0.01)


def forked(pipe: Any, generator: SecureGenerator) -> None:
    pipe.send(generator.words(4).tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_nothing_repeats_the_numbers_of_another(private: Any) -> None:
    engine, *_ = private()
    generator = engine.secure_rng
    generator.words(1)
    context = multiprocessing.get_context("fork")
    drawn = []
    for _ in range(2):
        here, there = context.Pipe()
        child = context.Process(target=forked, args=(there, generator))
        child.start()
        drawn.append(here.recv())
        child.join()
    again = PrivacyEngine(secure_mode=True).secure_rng
    for other in (generator, copy.deepcopy(generator), pickle.loads(pickle.dumps(generator)), again):
        drawn += [other.words(4).tolist(), other.words(4).tolist()]
    words = [word for words in drawn for word in words]
    assert len(set(words)) == len(words) == 4 * 10


def seed_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def assert_all_differ(noise: list[Tensor], batches: list[Any]) -> None:
    for a, b in itertools.combinations(noise, 2):
        assert not torch.isclose(a, b, rtol=0, atol=1e-9).any()
    for a, b in itertools.combinations(batches, 2):
        assert a != b


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_no_seed_makes_a_run_again(private: Any, poisson_sampling: bool) -> None:
    x, y = batch()
    noise, batches = [], []
    for _ in range(3):
        seed_everything()
        _, model, optimizer, criterion, loader = private(shuffle=True, poisson_sampling=poisson_sampling)
        optimizer.batches = Batches()  # its steps are on samples that are not drawn
        for _ in range(2):
            seed_everything()
            noise.append(noise_of(model, optimizer, criterion, x, y))
            batches.append(list(loader.batch_sampler))
    assert_all_differ(noise, batches)


RANDOM = ["normal", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial"]
IN_PLACE = ["random_", "normal_", "uniform_", "bernoulli_", "exponential_"]


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_torch_and_numpy_draw_nothing(private: Any, poisson_sampling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a random number that is not secure")

    _, model, optimizer, criterion, loader = private(shuffle=True, poisson_sampling=poisson_sampling)

    optimizer.batches = Batches()  # its steps are on samples that are not drawn
    x, y = batch()
    criterion(model(x), y).backward()
    for name in RANDOM:
        monkeypatch.setattr(torch, name, refuse)
    for name in IN_PLACE:
        monkeypatch.setattr(Tensor, name, refuse)
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    optimizer.step()
    assert (flat(model, "grad") * BATCH != flat(model, "summed_grad")).all()
    assert len(list(loader.batch_sampler)) == SIZE // BATCH
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == pickle.dumps(np.random.get_state())


def test_checkpoint_has_nothing_of_the_generator(private: Any) -> None:
    engine, model, optimizer, criterion, loader = private()
    optimizer.batches = Batches()  # its steps are on samples that are not drawn
    x, y = batch()
    noise = [noise_of(model, optimizer, criterion, x, y)]
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    assert b"Generator" not in file.getvalue() and b"secure" not in file.getvalue()
    batches = [list(loader.batch_sampler)]
    noise.append(noise_of(model, optimizer, criterion, x, y))
    for _ in range(2):
        resumed, other, other_optimizer, other_criterion, other_loader = private()
        other_optimizer.batches = Batches()  # its steps are on samples that are not drawn
        file.seek(0)
        resumed.load_checkpoint(path=file, module=other, optimizer=other_optimizer)
        assert resumed.accountant.history == [(1.0, BATCH / SIZE, 1)]
        noise.append(noise_of(other, other_optimizer, other_criterion, x, y))
        batches.append(list(other_loader.batch_sampler))
    assert_all_differ(noise, batches)


# The batches


def test_poisson_sampling_draws_each_sample_at_its_rate() -> None:
    steps, rate = 4000, 0.15
    sampler = SecurePoissonSampler(num_samples=SIZE, sample_rate=rate, generator=SecureGenerator(), steps=steps)
    drawn = torch.zeros(steps, SIZE)
    for row, indices in zip(drawn, sampler, strict=True):
        assert indices == sorted(set(indices))
        row[indices] = 1
    # Five deviations of each estimate.
    deviation = math.sqrt(rate * (1 - rate) / steps)
    assert (drawn.mean(0) - rate).abs().max() < 5 * deviation
    assert drawn.mean().item() == pytest.approx(rate, abs=5 * deviation / math.sqrt(SIZE))
    assert drawn.sum(1).var().item() == pytest.approx(SIZE * rate * (1 - rate), rel=0.13)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(steps)
    between = (drawn[1:] - rate) * (drawn[:-1] - rate)
    assert abs(between.mean().item()) < 5 * rate * (1 - rate) / math.sqrt(steps * SIZE)


def test_loader_has_the_rate_and_steps_of_opacus(private: Any) -> None:
    *_, loader = private()
    plain = DPDataLoader.from_data_loader(DataLoader(data(), batch_size=BATCH))
    assert len(loader) == len(plain) == SIZE // BATCH
    assert loader.sample_rate == loader.batch_sampler.sample_rate == plain.sample_rate
    sizes = torch.tensor([float(len(x)) for _ in range(100) for x, _ in loader])
    assert sizes.mean().item() == pytest.approx(BATCH, abs=5 * math.sqrt(BATCH / 500))


def test_every_order_is_as_likely() -> None:
    generator = SecureGenerator()
    orders = Counter(tuple(generator.permutation(4).tolist()) for _ in range(6000))
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-6


def epoch(loader: DataLoader) -> list[list[int]]:
    """The numbers of the samples in each batch, and that target belongs to input."""
    batches = []
    for x, y in loader:
        numbers = x[:, 0].long()
        assert torch.equal(numbers % 3, y)
        batches.append(numbers.tolist())
    return batches


WORKERS = {
    "none": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("poisson_sampling", [True, False])
@pytest.mark.parametrize("workers", WORKERS)
def test_workers(workers: str, poisson_sampling: bool) -> None:
    given = DataLoader(data(), batch_size=6, shuffle=True, **WORKERS[workers])
    list(given)  # has living workers by now, if they are to stay
    batch_sampler, sampler = given.batch_sampler, given.sampler
    *_, loader = make_private(data_loader=given, poisson_sampling=poisson_sampling)
    assert given.batch_sampler is batch_sampler and given.sampler is batch_sampler.sampler is sampler
    assert (loader.num_workers, loader.prefetch_factor) == (given.num_workers, given.prefetch_factor)
    assert loader.persistent_workers == given.persistent_workers
    epochs = []
    for _ in range(3):
        seed_everything()
        epochs.append(epoch(loader))
        if not poisson_sampling:
            assert [len(numbers) for numbers in epochs[-1]] == [6] * 6 + [4]
            assert sorted(itertools.chain(*epochs[-1])) == list(range(SIZE))
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_shuffling_keeps_the_options_of_the_loader() -> None:
    given = DataLoader(data(), batch_size=6, shuffle=True, drop_last=True, collate_fn=len)
    *_, loader = make_private(data_loader=given, poisson_sampling=False)
    assert list(loader) == [6] * 6
    assert loader.sampler is loader.batch_sampler.sampler and type(loader.sampler) is SecureRandomSampler


def test_samples_as_they_lie_are_left_so() -> None:
    *_, loader = make_private(poisson_sampling=False)
    assert list(itertools.chain(*epoch(loader))) == list(range(SIZE))


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_loader_of_an_earlier_call(poisson_sampling: bool) -> None:
    *_, first = make_private(shuffle=True, poisson_sampling=poisson_sampling)
    *_, second = make_private(data_loader=first, poisson_sampling=False)
    assert type(second.batch_sampler) is type(first.batch_sampler)
    plain = DPDataLoader.from_data_loader(DataLoader(data(), batch_size=BATCH))
    *_, third = make_private(data_loader=plain, poisson_sampling=False)
    assert type(third.batch_sampler) is SecurePoissonSampler


@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_memory_manager(private: Any, poisson_sampling: bool) -> None:
    engine, model, optimizer, criterion, loader = private(shuffle=True, poisson_sampling=poisson_sampling)
    sizes = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as memory_safe:
        for x, y in memory_safe:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            sizes.append(len(x))
    assert max(sizes) == 3
    assert poisson_sampling or sum(sizes) == SIZE
    assert engine.accountant.history == [(1.0, BATCH / SIZE, SIZE // BATCH)]


# What is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield from data()

    def __len__(self):
        return SIZE


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.ones(SIZE), SIZE)


LOADERS = {
    "replacement": (
        lambda: DataLoader(data(), batch_size=4, sampler=RandomSampler(data(), replacement=True)),
        "RandomSampler",
    ),
    "some": (lambda: DataLoader(data(), batch_size=4, sampler=RandomSampler(data(), num_samples=9)), "RandomSampler"),
    "weighted": (lambda: DataLoader(data(), batch_size=4, sampler=weighted()), "WeightedRandomSampler"),
    "no-batches": (lambda: DataLoader(data(), batch_size=None, shuffle=True), "NoneType"),
    "iterable": (lambda: DataLoader(Stream(), batch_size=4), "_InfiniteConstantSampler"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_cannot_be_secured(private: Any, name: str) -> None:
    make, found = LOADERS[name]
    model = network()
    with pytest.raises(NotImplementedError, match=rf"drawn securely.*{found}.*poisson_sampling=True"):
        private(module=model, data_loader=make(), poisson_sampling=False)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"grad_sample_mode": mode} for mode in ("hooks", "functorch", "ew")] + [{}])
def test_other_modes_are_refused(options: dict[str, str]) -> None:
    model = network()
    arguments = dict(
        module=model,
        optimizer=torch.optim.SGD(model.parameters()),
        data_loader=DataLoader(data(), batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    named = options.get("grad_sample_mode", "hooks")
    with pytest.raises(NotImplementedError, match=f"'ghost' and 'ghost_bk'; this is '{named}'"):
        PrivacyEngine(secure_mode=True).make_private(**arguments, **options)
    assert not any(module._forward_hooks for module in model.modules())


def test_seeded_noise_is_refused(private: Any) -> None:
    with pytest.raises(ValueError, match="noise_generator and secure_mode"):
        private(noise_generator=torch.Generator().manual_seed(0))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ImportError, match=r"cryptography.*pip install opacus_fgc\[secure\]"):
        PrivacyEngine(secure_mode=True)
    PrivacyEngine()


def test_optimizer_by_hand() -> None:
    inner = torch.optim.SGD(network().parameters())
    make = partial(
        DPOptimizerFastGradientClipping, inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    assert isinstance(make(secure_mode=True).generator, SecureGenerator)
    with pytest.raises(ValueError, match="secure_mode is True and the generator a Generator"):
        make(secure_mode=True, generator=torch.Generator())
    with pytest.raises(ValueError, match="secure_mode is False and the generator a SecureGenerator"):
        make(generator=SecureGenerator())


def test_warnings_of_opacus() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = PrivacyEngine(secure_mode=True)
        assert caught == []
        PrivacyEngine()
    assert ["Secure RNG turned off" in str(warning.message) for warning in caught] == [True]
    assert isinstance(engine, opacus.PrivacyEngine)
    make_private(engine, poisson_sampling=False)
    with pytest.warns(UserWarning, match="new dataset object"):
        make_private(engine, poisson_sampling=False)


def test_secured_loader_is_another() -> None:
    given = DataLoader(data(), batch_size=BATCH, shuffle=True)
    loader = secured(given, SecureGenerator())
    assert loader is not given and type(given.sampler) is RandomSampler
