"""The watch over the operations of a forward: when it begins and ends, and where checkpoints run a part again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from opacus_fgc._compat.checkpointing import innermost_checkpoint
from opacus_fgc._compat.overrides import current_function_mode
from opacus_fgc.taps.shared import SharedTensors

_AS_IT_IS: AbstractContextManager = nullcontext()


class ForwardWatch(SharedTensors):
    """Active from the outermost `enter` to its `leave`."""

    _compiled = False
    _stance: Any = None
    _trying = False
    _again = False

    @property
    def active(self) -> bool:
        """Whether a forward runs of which operations are caught."""
        return bool(self._batch_sizes)

    def enter(self, batch_size: int | None, trying: bool = False) -> None:
        """Begins a forward.

        Args:
            batch_size: number of samples, None if it is not known.
            trying: whether it is of no consequence, so that what is not known yet may be guessed.
        """
        if self._again:
            return
        self._batch_sizes.append(batch_size)
        self._trying = trying
        if self._compiled:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        self.__enter__()

    def leave(self) -> None:
        """Ends it, if it began."""
        if self.active and not self._again:
            self._batch_sizes.clear()
            # A copy of a model that was interrupted has been entered by none.
            if current_function_mode() is self:
                self.__exit__(None, None, None)
                if self._compiled:
                    self._stance.__exit__(None, None, None)

    def _catch_again(self) -> None:
        """Has operations caught also where activation checkpointing runs again what runs now: it need not be a module."""
        frame = innermost_checkpoint()
        if frame is None or isinstance(frame.recompute_fn, _Again):
            return
        frame.recompute_fn = _Again(self, self._batch_sizes[0], frame.recompute_fn)

    def paused(self) -> AbstractContextManager:
        """A context in which operations are not looked at, where they are a tap's own; they would cost some microseconds each."""
        return self._left() if current_function_mode() is self else _AS_IT_IS

    @contextmanager
    def _left(self) -> Iterator[None]:
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    @contextmanager
    def again(self, batch_size: int | None) -> Iterator[None]:
        """A context in which a part of a forward runs again; see `enter`."""
        if self.active:
            yield
            return
        self.enter(batch_size)
        self._again = True
        try:
            yield
        finally:
            self._again = False
            self.leave()


class _Again:
    """What a checkpoint is to run again, with operations caught."""

    def __init__(self, ops: ForwardWatch, batch_size: int | None, function: Callable[..., Any]) -> None:
        self._ops, self._batch_size, self._function = ops, batch_size, function

    def __call__(self, *args: Any) -> None:
        with self._ops.again(self._batch_size):
            self._function(*args)
