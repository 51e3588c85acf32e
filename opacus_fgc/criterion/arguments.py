"""The arguments of a criterion, and which of them have rows of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc._compat.pytree import TreeSpec, tree_flatten, tree_unflatten
from opacus_fgc.taps.tap import tensors_in


class Place(NamedTuple):
    """Where samples are in an argument.

    Attributes:
        leaf: which of the flattened arguments.
        axis: its axis that counts samples.
        block: how many rows each sample has.
    """

    leaf: int
    axis: int = 0
    block: int = 1


class Arguments(NamedTuple):
    """Arguments of a criterion.

    Attributes:
        leaves: all of them, flattened.
        spec: how they are nested.
        places: those with rows of samples.
        size: number of samples.
        kind: what is the same for arguments that are nested alike, and whose rows are in the same places.
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec
    places: tuple[Place, ...]
    size: int
    kind: Any

    @staticmethod
    def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The number of rows of the first tensor with rows."""
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.dim() > 0]
        if not tensors:
            raise ValueError(
                "the criterion was called without a tensor that has a batch axis, so there is no loss for each sample. Give it "
                "the logits and the target, or losses without reduction (reduction='none')"
            )
        return len(tensors[0])

    @staticmethod
    def of(
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        size: int,
        shape: Sequence[int] | None,
        batch_first: bool,
        shared: dict[Any, set[int]],
    ) -> Arguments:
        """Finds the rows: what has as many as there are samples, unless it had another number of them before.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            size: number of samples.
            shape: for flattened tokens the shape before flattening.
            batch_first: whether the samples are along the first axis; else they may be along the second.
            shared: the leaves that all samples share, by how arguments are nested; it grows with what is seen.
        """
        leaves, spec = tree_flatten((args, kwargs))
        nested = (len(args), tuple(kwargs), len(leaves))
        of_all = shared.setdefault(nested, set())
        places = []
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or place in of_all:
                continue
            tokens = size * shape[1] if shape is not None and len(shape) > 1 else None
            second = not batch_first and leaf.dim() > 1 and leaf.shape[1] == size
            if second and (leaf.requires_grad or leaf.dim() > 2 or len(leaf) != size):
                places.append(Place(place, 1))
            elif len(leaf) == size:
                places.append(Place(place))
            elif len(leaf) == tokens and shape is not None:
                places.append(Place(place, 0, shape[1]))
            elif size > 1:
                of_all.add(place)
        return Arguments(tuple(leaves), spec, tuple(places), size, (nested, tuple(places)))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.leaves[self.places[0].leaf].device if self.places else torch.device("cpu")

    def whole(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for all samples."""
        return tree_unflatten(list(self.leaves), self.spec)

    def rows(self) -> list[Tensor]:
        """What has rows, as tensors of their own, so that what a result depends on by them can be told from all else."""
        leaves = [self.leaves[place.leaf] for place in self.places]
        return [leaf.view_as(leaf) if leaf.requires_grad else leaf for leaf in leaves]

    def of_one(self, rows: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for one sample, of which ``rows`` are the rows."""
        one = list(self.leaves)
        for place, row in zip(self.places, rows, strict=True):
            one[place.leaf] = row.unsqueeze(0)
        return tree_unflatten(one, self.spec)

    def taken(self, source: Tensor, only_with_gradient: bool = False, dtype: torch.dtype | None = None) -> Arguments:
        """Other arguments, without the graph of these; of the same shapes and memory formats whatever samples are taken.

        Args:
            source: the samples whose rows are taken, any number of them.
            only_with_gradient: leave alone what does not require a gradient.
            dtype: what floating-point tensors are cast to.
        """
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for leaf, axis, block in self.places:
            if not only_with_gradient or self.leaves[leaf].requires_grad:
                rows = source.to(leaves[leaf].device)[:, None] * block
                rows = (rows + torch.arange(block, device=rows.device)).flatten()
                leaves[leaf] = leaves[leaf].index_select(axis, rows)
        for place, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                cast = dtype is not None and leaf.is_floating_point()
                leaves[place] = (leaves[place].to(dtype) if cast else leaves[place]).requires_grad_(leaf.requires_grad)
        return self._replace(leaves=tuple(leaves), size=len(source))

    def with_gradient(self) -> list[Tensor]:
        """What has rows and requires a gradient."""
        return [self.leaves[place.leaf] for place in self.places if self.leaves[place.leaf].requires_grad]
