"""What a step's forward left in memory for backward, as its taps see it, and how much memory ways to go back will take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from opacus_fgc.distributed.mesh import local
from opacus_fgc.planner import Freed


class Peaks(NamedTuple):
    """Estimates of the most bytes that are held at a time.

    Attributes:
        plain: in the step without privacy.
        one_pass: where one backward pass keeps all that the clipped sum needs, as memory is given up from the last layer to the
            first: of a layer its activations and backprops, or the gradients of its samples where they take less.
        two_passes: where the graph is kept for a second pass, and the uses of a layer until all of them came.
    """

    plain: int
    one_pass: int
    two_passes: int


class _Piece(NamedTuple):
    place: int  # in memory
    size: int
    storage: StorageWeakRef | None  # None of small ones, which count as held whatever becomes of them


class _Call(NamedTuple):
    layer: Any
    params: Sequence[Tensor]
    activations: list[_Piece]
    outputs: list[_Piece]
    taken: int  # bytes of its activations
    given: int  # bytes of its outputs


class _Moment(NamedTuple):
    """When backward is at a call.

    Attributes:
        layer: what was called.
        held: what is held then.
        is_last: whether all calls of the layer have come by then.
        kept: what one pass keeps of the layer's calls until then.
    """

    layer: Any
    held: Peaks
    is_last: bool
    kept: int


class _Layer:
    """What came of a layer's calls so far, on the way back."""

    def __init__(self) -> None:
        self.calls = 0
        self.backprops = 0
        self.kept = 0


# Bytes of what takes longer to be watched than it is worth: recurrent cells leave hundreds of them.
_SMALL = 2**16


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pieces(tensors: Iterable[Tensor]) -> tuple[list[_Piece], int]:
    """The memory of tensors, and its bytes. Called for every call of every layer, so it is kept light."""
    pieces, total = [], 0
    for tensor in tensors:
        tensor = local(tensor)
        if tensor.layout is not torch.strided:
            continue
        size = _size(tensor)
        if size < _SMALL:
            pieces.append(_Piece(tensor.data_ptr(), size, None))
        else:
            storage = tensor.untyped_storage()
            size = min(storage.nbytes(), size)
            reference = StorageWeakRef(storage)
            pieces.append(_Piece(reference.cdata, size, reference))
        total += size
    return pieces, total


class Held:
    """What autograd holds at the end of a forward: the activations of its taps, and those outputs that other operations keep.

    What else an operation keeps, such as the results of a softmax, is not seen, so that the whole is a lower bound. What a
    checkpoint or an offload has let go of does not count, but for what is small.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def copy(self) -> Held:
        """The same, to which other calls are added."""
        other = Held()
        other._calls = list(self._calls)
        return other

    def note(
        self, layer: Any, activations: Iterable[Tensor], outputs: Iterable[Tensor], params: Sequence[Tensor]
    ) -> None:
        """Notes a call, in the order of forward.

        Args:
            layer: what was called.
            activations: what it was called on.
            outputs: what came of it.
            params: its parameters.
        """
        (taken, bytes_taken), (given, bytes_given) = _pieces(activations), _pieces(outputs)
        self._calls.append(_Call(layer, params, taken, given, bytes_taken, bytes_given))

    def peaks(self, samples: int) -> Peaks:
        """Estimates what ways to go back will take.

        Args:
            samples: number of samples.
        """
        return Peaks(*map(max, zip(*(moment.held for moment in self._way_back(samples)), strict=True)))

    def freed(self, samples: int) -> dict[Any, Freed]:
        """What layers may keep within the peak of the step without privacy, where one pass keeps what it needs.

        Args:
            samples: number of samples.
        """
        moments = list(self._way_back(samples))
        most = max(moment.held.plain for moment in moments)
        freed: dict[Any, Freed] = {}
        later = 0  # the most that is held after a moment
        for moment in reversed(moments):
            if moment.is_last:
                room = min(moment.kept + most - later, most - moment.held.one_pass)
                freed[moment.layer] = Freed(moment.kept, room)
            later = max(later, moment.held.one_pass)
        return freed

    def _way_back(self, samples: int) -> Iterator[_Moment]:
        """The calls from the last one to the first, and the end."""
        layers: dict[Any, _Layer] = {}
        given_up = self._given_up(layers)
        plain = one_pass = two_passes = sum(given_up)
        kept: set[Any] = set()
        for call, freed in zip(reversed(self._calls), reversed(given_up), strict=True):
            layer, passing, own = layers[call.layer], call.taken + call.given, call.given
            held = Peaks(plain + passing, one_pass + passing, two_passes + passing)
            for piece in call.activations:
                if piece.place not in kept:
                    kept.add(piece.place)
                    own += piece.size
            layer.calls -= 1
            layer.backprops += call.given
            layer.kept += own
            plain -= freed
            one_pass += own - freed
            two_passes += call.given
            if not layer.calls:
                plain += sum(map(_size, map(local, call.params)))
                less = max(0, layer.kept - samples * sum(map(_size, call.params)))
                layer.kept -= less
                one_pass -= less
                two_passes -= layer.backprops
            yield _Moment(call.layer, held, not layer.calls, layer.kept)
        yield _Moment(None, Peaks(plain, one_pass, two_passes), False, 0)

    def _given_up(self, layers: dict[Any, _Layer]) -> list[int]:
        """The bytes that are given up with each call; counts the calls of each layer."""
        first: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for number, call in enumerate(self._calls):
            layers.setdefault(call.layer, _Layer()).calls += 1
            for place, size, storage in (*call.activations, *call.outputs):
                if storage is None or not storage.expired():
                    first.setdefault(place, number)
                    sizes[place] = max(sizes.get(place, 0), size)
        given_up = [0] * len(self._calls)
        for place, number in first.items():
            given_up[number] += sizes[place]
        return given_up
