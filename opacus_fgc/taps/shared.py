"""What a batch shares: tensors that are computed from parameters and constants alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opacus_fgc._compat.autograd import version_of
from opacus_fgc.taps.tap import tensors_in


@dataclass
class NoData:
    """The tensors of a model that are no data.

    Attributes:
        params: the parameters whose operations are caught.
        others: the other parameters of the model, and its buffers.
        covered: those of the others whose tap is on a module around their layer. What is computed from them stays in there.
        constants: tensors that are no data for as long as they have the version that goes with them here.
    """

    params: set[Tensor]
    others: set[Tensor]
    covered: set[Tensor]
    constants: Mapping[Tensor, int]


class SharedTensors(TorchFunctionMode):
    """Knows of tensors in a forward whether they are computed from parameters and constants alone.

    Args:
        no_data: the tensors that are.
        batch_first: whether the batch is the first axis of activations, or the second of those with three and more.
    """

    def __init__(self, no_data: NoData, batch_first: bool) -> None:
        super().__init__()
        self.params = no_data.params
        self._others = no_data.others
        self._covered = no_data.covered
        self._constants = no_data.constants
        self._batch_first = batch_first
        # How many samples the forwards that run are of, the innermost last; none if no operations are caught.
        self._batch_sizes: list[int | None] = []

    def add(self, param: Tensor, seen: Tensor) -> None:
        """Treats a tensor as it treats a parameter, in whose place it is."""
        for known in (self.params, self._others, self._covered):
            if param in known:
                known.add(seen)

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to be computed from parameters and constants alone."""
        # Whatever is written into a tensor, also through a view of it, changes its version.
        marked = getattr(tensor, "_shared_version", None)
        marked = self._constants.get(tensor) if marked is None else marked
        return (marked is not None and marked == version_of(tensor)) or tensor in self.params or tensor in self._others

    def leave_covered(self, inputs: Any, output: Any) -> None:
        """Told of a module with a tap of its own and all that is in it: on nothing but shared inputs, its output is shared."""
        if all(map(self.is_shared, tensors_in(inputs))):
            self._mark(output)

    def _is_caught(self, tensor: Any) -> bool:
        """Whether a tensor is shared, and its gradient has to come by sample."""
        # Parameters with a layer of their own are caught by the layer's tap, unless the layer's output is shared itself.
        caught = isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        return caught and tensor not in self._others and self.is_shared(tensor)

    def _axis(self, dims: int) -> int:
        return 0 if self._batch_first or dims < 3 else 1

    def _mark(self, output: Any) -> Any:
        for tensor in tensors_in(output):
            tensor._shared_version = version_of(tensor)  # type: ignore[attr-defined]
        return output

    def _mark_constant(self, output: Any) -> Any:
        """Marks what comes of constants, of which some were copied for each sample: as copied too, or as shared by them."""
        size = self._batch_sizes[-1]
        for tensor in tensors_in(output):
            axis = self._axis(tensor.dim())
            if size != 1 and tensor.dim() > axis and tensor.shape[axis] == size:
                tensor._copied_version = version_of(tensor)  # type: ignore[attr-defined]
            else:
                self._mark(tensor)
        return output


def is_copied(tensor: Tensor) -> bool:
    """Whether a tensor is known to hold no data, though it has one row a sample."""
    marked = getattr(tensor, "_copied_version", None)
    return marked is not None and marked == version_of(tensor) and not tensor.requires_grad


def is_one(tensors: list[Tensor]) -> bool:
    """Whether several tensors are one and the same."""
    return len(tensors) > 1 and all(tensor is tensors[0] for tensor in tensors)


def tensors_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation, also in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (item for item in value if isinstance(item, Tensor))


def size_of(tensor: Tensor, axis: int) -> int | None:
    """The size of an axis, counted from the first or (below 0) from the last; None if there is none."""
    return tensor.shape[axis] if -tensor.dim() <= axis < tensor.dim() else None
