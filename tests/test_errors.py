"""What tells a refusal for privacy apart, and errors that get the name of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opacus_fgc import GradSampleModuleFastGradientClipping, PrivacyError, register_norm_sampler
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError, located
from opacus_fgc.norm_samplers import NORM_SAMPLERS


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
