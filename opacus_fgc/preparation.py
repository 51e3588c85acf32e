"""Model, data loader, optimizer and criterion, each made private by itself."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn, optim
from torch.utils.data import DataLoader

from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.checkpoints import Checkpoints
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.distributed.agreement import check_agreement, check_copies
from opacus_fgc.distributed.sampling import common_generator, shared
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.grad_sample_module import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.loss import MODES, DPLossFastGradientClipping
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.sampling.loaders import batches_of, checked, with_own_draws
from opacus_fgc.sampling.secure import secured


class Preparation(Checkpoints):
    """An engine that makes the parts of a private pipeline in the modes of this package, and leaves others to Opacus."""

    secure_rng: Any

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        max_grad_norm: Any = 1.0,
        loss_reduction: str = "mean",
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
    ) -> AbstractGradSampleModule | GradSampleHooks:
        ours = isinstance(module, GradSampleModuleFastGradientClipping)
        if grad_sample_mode not in MODES or (isinstance(module, AbstractGradSampleModule) and not ours):
            return super()._prepare_model(
                module,
                batch_first=batch_first,
                max_grad_norm=max_grad_norm,
                loss_reduction=loss_reduction,
                grad_sample_mode=grad_sample_mode,
                wrap_model=wrap_model,
            )
        if isinstance(module, GradSampleModuleFastGradientClipping):
            if (module.batch_first, module.loss_reduction) != (batch_first, loss_reduction):
                raise ValueError(
                    f"the model is wrapped already, with batch_first={module.batch_first} and loss_reduction="
                    f"{module.loss_reduction!r}; pass these, or the model itself (module.to_standard_module())"
                )
            module.clipping = FlatClipping(max_grad_norm)  # until the optimizer brings its own
            return module
        wrapper = GradSampleModuleFastGradientClipping if wrap_model else GradSampleHooksFastGradientClipping
        return wrapper(module, batch_first=batch_first, loss_reduction=loss_reduction, max_grad_norm=max_grad_norm)

    def _prepare_data_loader(self, data_loader: DataLoader, *, poisson_sampling: bool, **kwargs: Any) -> DataLoader:
        # Opacus' secure mode without Poisson sampling would give the caller's sampler another generator.
        poisson = super()._prepare_data_loader(
            data_loader, poisson_sampling=poisson_sampling or self.secure_mode, **kwargs
        )
        return secured(poisson if poisson_sampling else data_loader, self.secure_rng) if self.secure_mode else poisson

    def _prepare_optimizer(
        self,
        *,
        optimizer: optim.Optimizer,
        noise_generator: torch.Generator | None = None,
        distributed: bool = False,
        clipping: Any = "flat",
        grad_sample_mode: str = "hooks",
        expected_batch_size: float,
        **kwargs: Any,
    ) -> DPOptimizer:
        if grad_sample_mode not in MODES:
            return super()._prepare_optimizer(
                optimizer=optimizer,
                expected_batch_size=expected_batch_size,
                noise_generator=noise_generator,
                distributed=distributed,
                clipping=clipping,
                grad_sample_mode=grad_sample_mode,
                **kwargs,
            )
        if distributed:
            # Opacus has divided by the number of processes; how many shares a batch has the layout says.
            expected_batch_size *= dist.get_world_size()
        return DPOptimizerFastGradientClipping(
            optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer,
            generator=self.secure_rng if self.secure_mode else noise_generator,
            secure_mode=self.secure_mode,
            clipping=clipping,
            expected_batch_size=expected_batch_size,
            **kwargs,
        )

    def _prepare_criterion(
        self, *, module: Any, optimizer: DPOptimizer, criterion: Any, loss_reduction: str = "mean", **kwargs: Any
    ) -> Any:
        if isinstance(module, GradSampleHooksFastGradientClipping):
            return DPLossFastGradientClipping(module, optimizer, criterion, loss_reduction)
        return super()._prepare_criterion(
            module=module, optimizer=optimizer, criterion=criterion, loss_reduction=loss_reduction, **kwargs
        )

    def _private(
        self, given: dict[str, Any], nonfinite: str, schedule: Schedule
    ) -> tuple[Any, DPOptimizerFastGradientClipping, DPLossFastGradientClipping, DataLoader]:
        """Opacus' `make_private`, and what it does not know of: the mode, certificates, ranks, whose batches are stepped on."""
        module: Any
        optimizer: Any
        criterion: Any
        module, optimizer, criterion, data_loader = super().make_private(**given)
        criterion.clipped_backward = MODES[given["grad_sample_mode"]]
        criterion.module.nonfinite = nonfinite
        criterion.module.certification.schedule = schedule
        layout, poisson = criterion.module.layout, given["poisson_sampling"]
        if layout.axes:
            check_copies(layout)
            data_loader = self._distributed(layout, optimizer, data_loader, poisson)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"each of the {dist.get_world_size()} processes trains a model of its own, with batches and a budget of its "
                "own. "
                "For one model of all wrap it in opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or call "
                "fully_shard on it, before make_private",
                stacklevel=3,
            )
        if not (layout.axes and poisson):
            data_loader = with_own_draws(data_loader)
        if not (poisson or self.secure_mode):
            data_loader = checked(data_loader)
        optimizer.batches = batches_of(data_loader, optimizer.drop_unfinished)
        return module, optimizer, criterion, data_loader

    def _distributed(
        self, layout: Layout, optimizer: DPOptimizerFastGradientClipping, data_loader: DataLoader, poisson: bool
    ) -> DataLoader:
        optimizer.expected_batch_size /= layout.data_ranks
        check_agreement(
            layout,
            {
                "noise_multiplier": optimizer.noise_multiplier,
                "max_grad_norm": optimizer.max_grad_norm,
                "the size of the data set": optimizer.expected_batch_size,
                "the number of batches": len(data_loader),
            },
        )
        if not poisson:
            return data_loader
        generator = common_generator(layout, self.secure_rng if self.secure_mode else data_loader.generator)
        if isinstance(generator, torch.Generator):
            self._batches.append(generator)
        return shared(data_loader, layout, generator)
