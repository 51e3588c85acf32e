"""Which uses of which layers a step has seen in forward, and which of them came by in backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from opacus_fgc.step.held import Held
from opacus_fgc.taps.tap import Use


class Step:
    """A private loss on its way back, which marks the calls that it comes by.

    Attributes:
        graph_is_retained: whether plain losses may come by after it.
    """

    def __init__(self, graph_is_retained: bool) -> None:
        self.graph_is_retained = graph_is_retained

    def check_plain_pass(self) -> None:
        """Raises a RuntimeError if a plain loss may not come by, as torch does; whether there is memory left does not matter."""
        if not self.graph_is_retained:
            raise RuntimeError(
                "Trying to backward through the graph a second time: backward() of a private loss came through it, which "
                "used it "
                "up. Call the model again, or Specify retain_graph=True when calling backward() on the private loss"
            )


class Uses:
    """The uses of layers in a step's forward, held until all of a layer's came back in backward.

    Attributes:
        held: what that forward left in memory.
    """

    def __init__(self) -> None:
        self.held = Held()
        self._expected: dict[Any, int] = {}
        self._owners: dict[Any, int] = {}
        self._came: dict[Any, list[Use]] = {}

    def owners(self, param: Any) -> int | None:
        """How many layers use a parameter."""
        return self._owners.get(param)

    @property
    def expected(self) -> tuple[dict[Any, int], dict[Any, int], Held]:
        """A copy of what `expect` noted; set it to forget what came since."""
        return dict(self._expected), dict(self._owners), self.held.copy()

    @expected.setter
    def expected(self, value: tuple[dict[Any, int], dict[Any, int], Held]) -> None:
        expected, owners, held = value
        self._expected, self._owners, self.held = dict(expected), dict(owners), held.copy()

    def expect(
        self, layer: Any, params: Sequence[Tensor], activations: Iterable[Tensor], outputs: Iterable[Tensor]
    ) -> None:
        """Notes one more use of a layer, and of its parameters, in forward.

        Args:
            layer: the layer, or what stands for a tapped operation.
            params: its parameters.
            activations: what it was called on.
            outputs: what came of it.
        """
        calls = self._expected.get(layer, 0)
        if not calls:
            for param in params:
                self._owners[param] = self._owners.get(param, 0) + 1
        self._expected[layer] = calls + 1
        self.held.note(layer, activations, outputs, params)

    def take(self, layer: Any, use: Use) -> Sequence[Use]:
        """Takes in one use of a layer.

        Returns:
            All uses of the layer if they are complete with this one; else nothing.
        """
        expected = self._expected.get(layer, 0)
        if expected == 1:
            return [use]
        uses = self._came.setdefault(layer, [])
        uses.append(use)
        return self._came.pop(layer) if len(uses) == expected else []

    def unfinished(self) -> Iterator[tuple[Any, Sequence[Use]]]:
        """The layers of which some uses came, and others did not; they are given up."""
        while self._came:
            yield self._came.popitem()
