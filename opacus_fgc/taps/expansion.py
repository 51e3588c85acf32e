"""Where a model gives something shared one row a sample itself: ``token.expand(len(x), -1, -1)``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor

from opacus_fgc._compat.autograd import version_of
from opacus_fgc.taps.graph import leaves_of
from opacus_fgc.taps.meeting import Meeting, NotCaughtError
from opacus_fgc.taps.shared import size_of


class Expansion:
    """Whether what is expanded at one place in a model gets one row a sample, or so many for another reason, as for positions.

    In one forward the two may be as many. They are not for two numbers of samples.
    """

    def __init__(self) -> None:
        self.by_samples: bool | None = None
        self._samples = 0

    def see(self, rows: int, samples: int) -> None:
        """Notes how many rows it got in a forward on so many samples."""
        if rows != samples:
            self.by_samples = False
        elif self.by_samples is None and self._samples not in (0, samples):
            self.by_samples = True
        self._samples = samples


def _place() -> tuple[Any, ...]:
    """The place in the model's code from which an operation was called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "opacus_fgc"):
        frame = frame.f_back
    return () if frame is None else (frame.f_code, frame.f_lasti)


def _expansion(
    name: str, tensor: Tensor, *sizes: Any, dim: int | None = None, output_size: int | None = None, **named: Any
) -> list[int] | None:
    """The sizes that a tensor is expanded to, or how often it is repeated along each axis; None if it is in another way."""
    if name == "repeat_interleave":
        (times, dim) = (*sizes, *named.values(), dim)[:2]
        if not isinstance(times, int) or dim is None or tensor.shape[dim] != 1:
            return None
        repeats = [1] * tensor.dim()
        repeats[dim] = times
        return repeats
    pattern = sizes[0] if sizes else next(iter(named.values()))
    several = list(sizes) if isinstance(pattern, int) else pattern.shape if isinstance(pattern, Tensor) else pattern
    return list(several)


class Expanding(Meeting):
    """Tells rows that are one a sample from others of the same number, and taps the former."""

    _expansions: dict[Any, Expansion]

    @property
    def undecided(self) -> bool:
        """Whether it is not known of some rows whether they are samples, since there was but one number of samples yet."""
        return any(expansion.by_samples is None for expansion in self._expansions.values())

    def _expand(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where the batch axis is the model's own doing: ``token.expand(len(x), -1, -1)``."""
        tensor = args[0]
        if not self.is_shared(tensor) or (tensor.requires_grad and tensor in self._others):
            return func(*args, **kwargs)
        sizes = _expansion(func.__name__, *args, **kwargs)
        if sizes is None:
            return self._mark(func(*args, **kwargs))
        copies = func.__name__ in ("repeat", "repeat_interleave", "tile")
        return self._expand_to(tensor, sizes, copies)

    def _expand_to(self, tensor: Tensor, sizes: list[int], copies: bool) -> Tensor:
        """Expands, or copies, something shared: to these sizes, or so many times along each axis."""
        size, dims = self._batch_sizes[-1], len(sizes)

        def expanded(tensor: Tensor) -> Tensor:
            return self._mark(tensor.repeat(*sizes) if copies else tensor.expand(*sizes))

        first = self._axis(dims)
        if copies and size is not None and tensor.requires_grad and tensor.dim() == dims > first:
            times = sizes[first]
            if times != 1 and tensor.shape[first] > 1:
                # Several rows a sample, as of its heads, one sample after another.
                sizes = [*sizes[:first], times, 1, *sizes[first + 1 :]]
                several = self._expand_to(self._mark(tensor.unsqueeze(first)), sizes, copies)
                flat = several.flatten(first, first + 1)
                return self._mark(flat) if self.is_shared(several) else flat
        # Torch's own attention has samples second.
        for axis in (first, 1 - first) if dims > 2 else (first,):
            new = dims > axis and size_of(tensor, axis - dims) in (None, 1) and sizes[axis] != -1
            if size is not None and new and self._by_samples(tensor, sizes[axis], size, axis):
                sizes[axis] = 1
                rows = self._expanded(expanded(tensor), size, dims, axis)
                if not rows.requires_grad:
                    rows._copied_version = version_of(rows)  # type: ignore[attr-defined]
                # A copy may be written into.
                return rows.clone() if copies else rows
        return expanded(tensor)

    def _join_copies(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where the batch axis comes of a list: ``torch.stack([token] * len(x))``."""
        several = args[0] if args else kwargs["tensors"]
        tensor, dim = several[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if func.__name__ == "stack":
            dim = dim % (tensor.dim() + 1)
            tensor = self._mark(tensor.unsqueeze(dim))
        sizes = [1] * tensor.dim()
        sizes[dim] = len(several)
        if tensor.requires_grad and tensor in self._others:
            raise NotCaughtError
        return self._expand_to(tensor, sizes, copies=True)

    def _by_samples(self, tensor: Tensor, rows: int, samples: int, axis: int) -> bool:
        """Whether so many rows that something shared is expanded to are one a sample."""
        params = [id(leaf) for leaf in leaves_of([tensor]) if leaf in self.params or leaf in self._others]
        expansion = self._expansions.setdefault((*_place(), axis, *params), Expansion())
        if samples:
            expansion.see(rows, samples)
        if rows != samples:
            return False
        if samples == 1:
            # What is shared by one sample is that one's, in whichever way it is caught.
            return expansion.by_samples is True
        if expansion.by_samples is None and samples and not self._trying:
            raise NotImplementedError(
                f"a tensor of shape {tuple(tensor.shape)}, computed from parameters or constants, is expanded to {rows} rows, as "
                "many as there are samples. Whether they are samples cannot be told, since the model runs on no other number of "
                "them, or in another way when it is compiled. Let it take batches of any size, or leave the expanding to "
                "broadcasting, and call torch.compile(model) before make_private"
            )
        return expansion.by_samples is not False
