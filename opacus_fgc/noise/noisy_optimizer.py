"""From the clipped sum to the gradient that a step may use: noise, and the scale of the loss."""

from __future__ import annotations

from functools import partial

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping as OpacusOptimizer
from torch import Tensor

from opacus_fgc._compat.foreach import foreach_div_
from opacus_fgc._compat.opacus import generate_noise, mark_as_processed
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.distributed.agreement import check_agreement
from opacus_fgc.distributed.clipped_sums import noisy_total, privatized_gradients
from opacus_fgc.distributed.mesh import local
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.sampling.draws import Batches


class NoisyOptimizer(OpacusOptimizer):
    """An optimizer that writes the clipped sum plus noise to the gradients."""

    clipping: FlatClipping
    module: GradSampleHooksFastGradientClipping | None
    batches: Batches
    generator: torch.Generator | SecureGenerator | None

    def _drop_clipped_sum(self) -> None:
        raise NotImplementedError

    @property
    def attached(self) -> GradSampleHooksFastGradientClipping:
        """The wrapped model that the optimizer is attached to.

        Raises:
            ValueError: if there is none.
        """
        if self.module is None:
            raise PrivacyValueError(
                "this optimizer is attached to no wrapped model, so it cannot know what its gradients were clipped to: get "
                "both from make_private, give both to DPLossFastGradientClipping, or call optimizer.attach(module)"
            )
        return self.module

    def with_noise(self, values: Tensor, std: float) -> Tensor:
        """Values plus Gaussian noise; all noise of a step comes from here.

        Args:
            values: what is to be released, of any shape.
            std: standard deviation of the noise, on each of the two parts of a complex number.
        """
        if values.is_complex():
            return torch.view_as_complex(self.with_noise(torch.view_as_real(values.resolve_conj()), std))
        if isinstance(self.generator, SecureGenerator):
            return self.generator.add_normal(values, std)
        return values + generate_noise(std=std, reference=values, generator=self.generator)

    def add_noise(self) -> None:
        """Writes the clipped sum plus noise to the gradients.

        Raises:
            ValueError: if ``noise_multiplier`` is now too large for the clipping rule, the step is not on a batch of the private
                loader, or ranks do not take the same step.
        """
        layout, clipped, refused = self.attached.layout, self.attached.clipped_sum, None
        try:
            batch = self.batches.take(sum(map(len, clipped.norms)), clipped.passes)
        except PrivacyValueError as error:
            batch, refused = -1, error
        std = self.clipping.gradient_noise_multiplier(self.noise_multiplier) * self.max_grad_norm
        try:
            check_agreement(
                layout,
                {
                    "backward passes of a step": self.accumulated_iterations,
                    "max_grad_norm": self.max_grad_norm,
                    "noise_multiplier": self.noise_multiplier,
                    "parameters to train": len(self.params),
                    "the number of the batch": batch,
                },
            )
        except ValueError as error:
            if refused is None:
                raise
            refused = PrivacyValueError(f"{error}. On this rank: {refused}")
        # Once the others know of it, or they would wait.
        if refused is not None:
            self._drop_clipped_sum()
            raise refused
        for param, gradient in privatized_gradients(layout, self.params, partial(self.with_noise, std=std)):
            param.grad = gradient.to(param.dtype)
            mark_as_processed(param.summed_grad)

    def scale_grad(self) -> None:
        """Divides the noisy sum by the number of samples that is expected on all ranks, with ``loss_reduction="mean"``."""
        if self.loss_reduction != "mean":
            return
        gradients = [local(param.grad) for param in self.params]
        foreach_div_(gradients, self.expected_batch_size * self.accumulated_iterations)
        shares = self.attached.layout.data_ranks
        if shares > 1:
            # `expected_batch_size` is that of one rank.
            foreach_div_(gradients, shares)

    def noisy_mean(self, total: Tensor, std: float) -> Tensor:
        """The mean of something over the samples of this step, as it may be released.

        Args:
            total: its sum over this rank's samples, a scalar.
            std: standard deviation of the noise on that sum.

        Returns:
            The noisy sum over the number of samples that is expected; the true one is private.

        Raises:
            ValueError: if no batch size is expected.
        """
        if self.expected_batch_size is None:
            raise ValueError("expected_batch_size is None; the optimizer's clipping rule needs it")
        layout = self.attached.layout
        noisy = noisy_total(layout, total, partial(self.with_noise, std=std))
        return noisy / (self.expected_batch_size * layout.data_ranks * self.accumulated_iterations)
