"""The parts of a private pipeline: model, data loader, optimizer and criterion."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from opacus.grad_sample import AbstractGradSampleModule
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
from opacus_fgc.sampling.units import is_of_units


class Preparation(Checkpoints):
    """An engine that makes the parts of a private pipeline in the modes of this package."""

    secure_rng: Any

    def _prepare_data_loader(self, data_loader: DataLoader, *, poisson_sampling: bool, **kwargs: Any) -> DataLoader:
        # Opacus' secure mode without Poisson sampling would give the caller's sampler another generator.
        poisson = super()._prepare_data_loader(
            data_loader, poisson_sampling=poisson_sampling or self.secure_mode, **kwargs
        )
        return secured(poisson if poisson_sampling else data_loader, self.secure_rng) if self.secure_mode else poisson

    def _private(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: Any,
        data_loader: DataLoader,
        noise_multiplier: float,
        clipping: FlatClipping,
        batch_first: bool,
        loss_reduction: str,
        poisson_sampling: bool,
        noise_generator: torch.Generator | None,
        grad_sample_mode: str,
        wrap_model: bool,
        nonfinite: str,
        certify: Schedule,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, DPOptimizerFastGradientClipping, DPLossFastGradientClipping, DataLoader]:
        """Makes the parts of a private pipeline, from arguments that were checked; see `PrivacyEngine.make_private`."""
        settings: dict[str, Any] = {"batch_first": batch_first, "loss_reduction": loss_reduction}
        private_module = _wrapped(module, wrap_model, settings)
        private_module.configure(clipping, nonfinite, certify)
        if poisson_sampling:
            private_module.forbid_grad_accumulation()
        private_loader = self._prepare_data_loader(
            data_loader,
            distributed=False,  # ranks share what is drawn; see `_distributed`
            poisson_sampling=poisson_sampling,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
        )
        layout, sample_rate = private_module.layout, 1 / len(private_loader)
        samples = len(private_loader.dataset) * sample_rate  # type: ignore[arg-type]
        private_optimizer = DPOptimizerFastGradientClipping(
            optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping.max_grad_norm,
            # As Opacus rounds it; of a few units less than one may be expected.
            expected_batch_size=(int(samples) or samples) / layout.data_ranks,
            loss_reduction=loss_reduction,
            generator=self.secure_rng if self.secure_mode else noise_generator,
            secure_mode=self.secure_mode,
            clipping=clipping,
            **kwargs,
        )
        private_optimizer.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate=sample_rate))
        private_criterion = DPLossFastGradientClipping(
            private_module,
            private_optimizer,
            criterion,
            loss_reduction,
            MODES[grad_sample_mode],
            of_units=is_of_units(private_loader),
        )
        if layout.axes:
            check_copies(layout)
            private_loader = self._distributed(layout, private_optimizer, private_loader, poisson_sampling)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"each of the {dist.get_world_size()} processes trains a model of its own, with batches and a budget of its "
                "own. For one model of all wrap it in opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or "
                "call fully_shard on it, before make_private",
                stacklevel=3,
            )
        if not (layout.axes and poisson_sampling):
            private_loader = with_own_draws(private_loader)
        if not (poisson_sampling or self.secure_mode):
            private_loader = checked(private_loader)
        private_optimizer.batches = batches_of(private_loader, private_optimizer.drop_unfinished)
        return private_module, private_optimizer, private_criterion, private_loader

    def _distributed(
        self, layout: Layout, optimizer: DPOptimizerFastGradientClipping, data_loader: DataLoader, poisson: bool
    ) -> DataLoader:
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


def _wrapped(module: nn.Module, wrap_model: bool, settings: dict[str, Any]) -> GradSampleHooksFastGradientClipping:
    """The wrapped model, or the hooks on it; a model that is wrapped already stays as it is."""
    if isinstance(module, GradSampleModuleFastGradientClipping):
        given = {name: getattr(module, name) for name in settings}
        if given != settings:
            raise ValueError(
                f"the model is wrapped already, with {', '.join(f'{name}={value!r}' for name, value in given.items())}; pass "
                "these, or the model itself (module.to_standard_module())"
            )
        return module
    if isinstance(module, AbstractGradSampleModule):
        raise ValueError(
            f"the model is wrapped already, in Opacus' {type(module).__name__}; pass the model itself "
            "(module.to_standard_module())"
        )
    wrapper = GradSampleModuleFastGradientClipping if wrap_model else GradSampleHooksFastGradientClipping
    return wrapper(module, **settings)
