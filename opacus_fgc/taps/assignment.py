"""Which modules of a model are tapped, and in which way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opacus.grad_sample import GradSampleHooksFastGradientClipping as OpacusHooks
from opacus.layers.dp_rnn import DPRNNBase
from opacus.utils.module_utils import has_trainable_params
from torch import Tensor, nn

from opacus_fgc.argument_checks import refuse_overlap
from opacus_fgc.certificates.buffers import Buffers
from opacus_fgc.distributed.shards import Unsharded
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.taps.expansion import Expansion
from opacus_fgc.taps.functorch import Functorch
from opacus_fgc.taps.lookup import (
    ByOperation,
    Registered,
    Sampler,
    find_sampler,
)


@dataclass
class Facts:
    """What is known of a model, by its modules and by the forwards that it ran.

    Attributes:
        layout: how it lies over processes.
        unsharded: what layers see of its parameters.
        constants: tensors in plain attributes, with the version in which they are no data.
        batch_second: the modules whose batch is the second axis, whatever that of the model is.
        buffers_before: its buffers, as they were before a forward.
        anchor: the leaf that all taps hang on.
        overruled: ways that take the place of what a table says, where that does not catch all uses of a parameter.
        operations: what was tapped of operations, by operation and parameters.
        expansions: what is known of the places where something shared is expanded.
        verified: the modules whose forward was tried.
        shares_row: the layers that are called on a row that all samples share, and do the same on a copy for each.
        has_own_rows: those that were called on a row that they do not share.
        shared_inputs: the paths of inputs that have no samples in them, by the module that is called.
        heads: the layers of a sharded model that were called on `HeadRows`, or where FSDP sees nothing of it, with the FSDP
            modules that have their weights.
    """

    layout: Layout
    unsharded: Unsharded
    constants: Mapping[Tensor, int]
    batch_second: Any
    buffers_before: Buffers
    anchor: Tensor
    overruled: dict[nn.Module, Sampler | ByOperation] = field(default_factory=dict)
    operations: dict[Any, Any] = field(default_factory=dict)
    expansions: dict[Any, Expansion] = field(default_factory=dict)
    verified: set[nn.Module] = field(default_factory=set)
    shares_row: set[nn.Module] = field(default_factory=set)
    has_own_rows: set[nn.Module] = field(default_factory=set)
    shared_inputs: dict[nn.Module, set[str]] = field(default_factory=dict)
    heads: dict[nn.Module, Any] = field(default_factory=dict)


class Assignment(OpacusHooks):
    """Assigns a sampler to each module with trainable parameters of its own."""

    _facts: Facts

    @property
    def layout(self) -> Layout:
        """How the model lies over processes."""
        return self._facts.layout

    def _gather_heads(self) -> None:
        """Has the weights of heads whole, which are needed where FSDP knows of no use of them."""
        for owner in dict.fromkeys(self._facts.heads.values()):
            owner.unshard()

    def _reshard_heads(self) -> None:
        """Undoes `_gather_heads`."""
        for owner in dict.fromkeys(self._facts.heads.values()):
            owner.reshard()

    def iterate_submodules(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that are tapped: all with trainable parameters of their own, but for those inside a functorch layer."""
        seen, todo = set(), [module]
        while todo:
            layer = todo.pop()
            if layer in seen:
                continue
            seen.add(layer)
            # Opacus' recurrent layers show their cells' parameters as their own.
            if has_trainable_params(layer) and not isinstance(layer, DPRNNBase):
                yield layer
                if self._sampler(layer).covers_children:
                    continue
            todo.extend(layer.children())

    def _sampler(self, layer: nn.Module) -> Sampler | ByOperation:
        return Functorch() if self.force_functorch else self._facts.overruled.get(layer) or find_sampler(layer)

    def _agree(self, model: nn.Module) -> None:
        """Has all layers of a parameter tapped in ways that do not see each other's uses."""
        before = None
        while before != len(self._facts.overruled):
            before = len(self._facts.overruled)
            layers = list(self.iterate_submodules(model))
            by_operation = _params_of(layer for layer in layers if isinstance(self._sampler(layer), ByOperation))
            as_a_whole = _params_of(layer for layer in layers if isinstance(self._sampler(layer), Functorch))
            for layer in layers:
                own, sampler = _params_of([layer]), self._sampler(layer)
                if isinstance(sampler, ByOperation) and own & as_a_whole:
                    self._facts.overruled[layer] = Functorch()
                elif isinstance(sampler, Registered) and own & by_operation and not own & as_a_whole:
                    self._facts.overruled[layer] = ByOperation()
        refuse_overlap(model, set(layers), {layer for layer in layers if self._sampler(layer).covers_children})


def _params_of(layers: Iterable[nn.Module]) -> set[Tensor]:
    return {param for layer in layers for param in layer.parameters(recurse=False) if param.requires_grad}
