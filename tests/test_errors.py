"""What tells a refusal for privacy apart, and errors that get the name of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import GradSampleModuleFastGradientClipping, PrivacyEngine, PrivacyError, register_norm_sampler
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError, located
from opacus_fgc.norm_samplers import NORM_SAMPLERS
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply


@pytest.mark.parametrize(
    "kind, known",
    [
        (PrivacyValueError, ValueError),
        (PrivacyRuntimeError, RuntimeError),
        (PrivacyNotImplementedError, NotImplementedError),
    ],
)
def test_refusals_are_caught_as_what_they_were(kind: type[PrivacyError], known: type[Exception]) -> None:
    for caught in (kind, known, PrivacyError):
        with pytest.raises(caught, match="reason"):
            raise kind("reason")
    assert not issubclass(ValueError, PrivacyError)


class TwoArguments(ValueError):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name


class TextOfItsOwn(RuntimeError):
    def __init__(self, *, code: int) -> None:
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


@pytest.mark.parametrize(
    "error", [ValueError("reason"), torch.OutOfMemoryError("much"), PrivacyValueError("reason"), TwoArguments("a", "b")]
)
def test_located_error_is_the_error(error: Exception) -> None:
    cause = KeyError("why")
    error.__cause__ = cause
    text, attributes = str(error), dict(vars(error))
    result = located(error, "layer '0' (Linear)")
    assert result is error and str(error) == f"layer '0' (Linear): {text}"
    assert error.__cause__ is cause and vars(error) == attributes


@pytest.mark.parametrize("error", [TextOfItsOwn(code=3), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")])
def test_located_error_that_shows_no_text(error: Exception) -> None:
    arguments, text = error.args, str(error)
    result = located(error, "layer '0' (Linear)")
    assert type(result) is (RuntimeError if isinstance(error, RuntimeError) else ValueError)
    assert str(result) == f"layer '0' (Linear): {type(error).__name__}: {text}"
    assert result.__cause__ is error and error.args == arguments and str(error) == text


def test_error_of_a_sampler() -> None:
    """Of the user's own, with a constructor of its own, and a cause."""

    class Layer(nn.Linear):
        pass

    @register_norm_sampler(Layer)
    def sampler(*args):
        try:
            raise KeyError("why")
        except KeyError as reason:
            raise TextOfItsOwn(code=7) from reason

    try:
        module = GradSampleModuleFastGradientClipping(nn.Sequential(Layer(2, 2)))
        with pytest.raises(RuntimeError, match=r"layer '0' \(Layer\): TextOfItsOwn: code 7") as error:
            module(torch.randn(3, 2)).sum().backward()
        assert isinstance(error.value.__cause__, TextOfItsOwn)
        assert isinstance(error.value.__cause__.__cause__, KeyError)
    finally:
        del NORM_SAMPLERS[Layer]


def test_an_error_of_a_tap_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise NotImplementedError("no rows") from KeyError("rows")

    monkeypatch.setattr("opacus_fgc.taps.tapping.tap", fails)
    wrapped = GradSampleModuleFastGradientClipping(nn.Linear(4, 3))
    with pytest.raises(NotImplementedError, match=r"\(Linear\): no rows") as error:
        wrapped(torch.randn(2, 4))
    assert isinstance(error.value.__cause__, KeyError)


def mixing_model(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), Apply(lambda _, x: x - x.mean(0)))
    wrapped = GradSampleModuleFastGradientClipping(model)
    MODES[mode](wrapped, wrapped(torch.randn(4, 4)).square().sum(1))


def detached_statistic(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), Apply(lambda _, x: x / x.detach().std()))
    wrapped = GradSampleModuleFastGradientClipping(model)
    MODES[mode](wrapped, wrapped(torch.randn(4, 4)).square().sum(1))


def weight_penalty(mode: str) -> None:
    model = nn.Linear(4, 3)
    wrapped = GradSampleModuleFastGradientClipping(model)
    MODES[mode](wrapped, wrapped(torch.randn(4, 4)).square().sum(1) + model.weight.square().sum())


def criterion_of_the_batch(mode: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(8, 4), torch.randn(8, 3))
    wrapped, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=4),
        criterion=lambda output, target: ((output - target) / output.detach().std()).square().sum(1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    criterion(wrapped(data.tensors[0][:4]), data.tensors[1][:4]).backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "refused",
    [mixing_model, detached_statistic, weight_penalty, criterion_of_the_batch],
    ids=lambda case: case.__name__,
)
def test_what_would_not_be_private_is_told_apart(refused: Callable[[str], None], mode: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(PrivacyError):
        refused(mode)


def test_a_typing_error_is_none() -> None:
    with pytest.raises(ValueError, match="certify") as caught:
        GradSampleModuleFastGradientClipping(nn.Linear(4, 3), certify="sometimes")
    assert not isinstance(caught.value, PrivacyError)
