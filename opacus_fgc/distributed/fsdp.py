"""What this package knows of FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from opacus_fgc._compat.distributed import gradient_divisors, meshes_of, require_fsdp


class FSDP:
    """The FSDP2 modules of a model, and what there is no public way to: their mesh, and by what they divide gradients.

    Args:
        model: any model; without such modules this is false.

    Attributes:
        modules: the modules.

    Raises:
        NotImplementedError: if there are some, and this torch has not the FSDP2 that is known here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if self.modules:
            require_fsdp()

    def __bool__(self) -> bool:
        return bool(self.modules)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The one mesh of all of them.

        Raises:
            NotImplementedError: if there are several.
        """
        meshes = {mesh for module in self.modules for mesh in meshes_of(module)}
        if len(meshes) > 1:
            raise NotImplementedError("the model's layers are sharded over several meshes; use one for all")
        (mesh,) = meshes
        return mesh

    def over_gloo(self) -> list[Any]:
        """Those whose ranks tell each other sums over gloo."""
        return [module for module in self.modules if any(mesh.device_type == "cpu" for mesh in meshes_of(module))]

    @cached_property
    def owners(self) -> dict[nn.Module, Any]:
        """The FSDP module by which each module of the model has its parameters."""
        # Outer ones come first.
        return {inner: module for module in self.modules for inner in cast(nn.Module, module).modules()}

    def reshard(self) -> None:
        """Gives up what is left whole of the outermost module after a forward without a backward, as of an evaluation."""
        for module in self.modules:
            module.reshard()

    def gradients_of(
        self, loss: Tensor, params: Sequence[Any], seen: Callable[[Any], Tensor], retain_graph: bool, ranks: int
    ) -> list[Tensor]:
        """The gradients of a loss by some parameters, summed over ranks by FSDP's own reduction, layer by layer.

        Args:
            loss: a scalar.
            params: the parameters.
            seen: gives the tensor that layers see in the place of a parameter.
            retain_graph: as for `torch.autograd.backward`.
            ranks: by what FSDP divides, where it does not say so.
        """
        # The reduction ends in `grad`; it takes the mean over ranks.
        before = [param.grad for param in params]
        for param in params:
            param.grad = None
        try:
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=[seen(param) for param in params])
            scales = {divisor for module in self.modules for divisor in gradient_divisors(module, ranks)}
            if len(scales) != 1:
                raise NotImplementedError("FSDP modules with different gradient divide factors are not supported")
            (scale,) = scales
            missing = [param for param in params if param.grad is None]
            if missing:
                raise RuntimeError(
                    f"FSDP brought no gradient for {len(missing)} parameters, of shapes "
                    f"{', '.join(str(tuple(param.shape)) for param in missing[:5])}; leave set_requires_gradient_sync on, "
                    "and use all parameters on every rank"
                )
            return [param.grad * scale for param in params]
        finally:
            for param, gradient in zip(params, before, strict=True):
                param.grad = gradient
