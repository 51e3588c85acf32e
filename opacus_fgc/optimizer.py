"""From the clipped sum to the step: noise, scale, step, and Opacus' accountant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from opacus_fgc.argument_checks import check_loss_reduction, is_finite_number
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.noise.gaussian import generator_of_rank
from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.sampling.draws import Batches
from opacus_fgc.step.ready import check_ready
from opacus_fgc.step.split_batches import SplitBatches


def check_noise_multiplier(value: object) -> None:
    """Raises a ValueError if a noise multiplier is not one finite number from 0 on."""
    if not is_finite_number(value) or value < 0:
        raise ValueError(
            f"noise_multiplier is {value!r}; it is one finite number from 0 (no noise, no privacy) on: the standard deviation "
            "of the noise as a multiple of max_grad_norm"
        )


def check_step(optimizer: Optimizer) -> None:
    """Raises a PrivacyNotImplementedError if an optimizer evaluates the loss several times a step, as LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, LBFGS) or (closure is not None and closure.default is closure.empty):
        raise PrivacyNotImplementedError(
            f"{type(optimizer).__name__} evaluates the loss several times in one step, and goes by its values and gradients "
            "as they are; each of them would have to be made private, and accounted. Use an optimizer of one gradient a "
            "step, such as SGD or Adam"
        )


class DPOptimizerFastGradientClipping(SplitBatches):
    """Adds noise to the clipped sum that ``backward()`` left in ``summed_grad``, and steps.

    Noise has standard deviation ``noise_multiplier * max_grad_norm`` and is drawn once a step, for every parameter. It is more
    under a clipping rule that releases more than the gradient; see `clipping.AdaptiveClipping`. What the accountant counts is
    ``noise_multiplier``, under any rule.

    Args:
        optimizer: the optimizer that makes the step; any of ``torch.optim``.
        noise_multiplier: standard deviation of the noise as a multiple of ``max_grad_norm``.
        max_grad_norm: the clipping norm ``C``. It has to be the module's; see `attach`.
        expected_batch_size: what the sum is divided by with ``loss_reduction="mean"``; that of one rank, where ranks have
            shares of a batch.
        loss_reduction: "mean" or "sum".
        generator: source of the noise. If None, torch's default; with ``secure_mode`` a new `SecureGenerator`.
        secure_mode: noise that nobody can predict and that withstands floating-point attacks; see `SecureGenerator`.
        clipping: the clipping rule, flat if None.
        **kwargs: handed on to Opacus' optimizer.

    Raises:
        ValueError: if an argument has no meaning.
        ImportError: if what ``secure_mode`` needs is not installed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | SecureGenerator | None = None,
        secure_mode: bool = False,
        clipping: FlatClipping | None = None,
        **kwargs: Any,
    ) -> None:
        check_noise_multiplier(noise_multiplier)
        check_loss_reduction(loss_reduction)
        check_step(optimizer)
        if secure_mode and generator is None:
            generator = SecureGenerator()
        if secure_mode != isinstance(generator, SecureGenerator):
            raise ValueError(
                f"secure_mode is {secure_mode} and the generator a {type(generator).__name__}; pass secure_mode=True with no "
                "generator or a SecureGenerator, or secure_mode=False with any other"
            )
        self.clipping = FlatClipping(max_grad_norm) if clipping is None else clipping
        self.clipping.gradient_noise_multiplier(noise_multiplier)  # refuses what it cannot serve
        self.module: GradSampleHooksFastGradientClipping | None = None
        self.batches = Batches()  # make_private has others
        self.generator: torch.Generator | SecureGenerator | None
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
            **kwargs,
        )

    @property
    def max_grad_norm(self) -> float:
        """The clipping norm ``C`` of optimizer and module: Opacus' schedulers set it here, and it holds for both."""
        return self.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.max_grad_norm = value

    def attach(self, module: GradSampleHooksFastGradientClipping) -> None:
        """Gives a module this optimizer's clipping rule, so that both go by one norm.

        Args:
            module: the wrapped model, or the hooks on it, whose parameters are optimized.

        Raises:
            ValueError: if its clipping norm is another than the optimizer's.
        """
        if module.max_grad_norm != self.max_grad_norm:
            raise ValueError(
                f"the optimizer's max_grad_norm is {self.max_grad_norm}, the module's {module.max_grad_norm}; the noise has to "
                "go by the norm that gradients are clipped to"
            )
        self.module = module
        module.clipping = self.clipping
        if not isinstance(self.generator, SecureGenerator):
            self.generator = generator_of_rank(module.layout, self.generator)

    @property
    def accumulated_iterations(self) -> int:
        """How many clipped backward passes are in the sum that the next step takes; the accountant multiplies by it."""
        return self.module.clipped_sum.passes if self.module is not None else 0

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Makes the noisy gradient and moves the clipping norm, unless this step is to be skipped to go on summing.

        Args:
            closure: not used; `step` has called it.

        Returns:
            Whether the wrapped optimizer is to step.
        """
        self._check_signals()
        stepping = super().pre_step(closure)
        if stepping:
            self.clipping.update(self.attached.clipped_sum.norms, self.noisy_mean)
        else:
            # The physical batches of a skipped step are parts of one logical batch, and count as one pass.
            self.attached.clipped_sum.passes = 0
        return stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step, or goes on summing where Opacus' `BatchMemoryManager` has split a batch.

        Args:
            closure: computes the loss, and calls ``backward()`` on it.

        Returns:
            What the closure returned; None without one.
        """
        if closure is None:
            return super().step()
        losses: list[Any] = []
        super().step(lambda: losses.append(closure()))
        return losses[0]

    def accumulate(self) -> None:
        """Checks that there is a clipped sum to step with.

        Raises:
            ValueError: if there is none, or a part of it is missing; if there was no `zero_grad` since the last step; or if
                there is a gradient besides it, which the step would drop.
        """
        module = self.attached
        if self.accumulated_iterations == 0:
            raise PrivacyValueError(
                "step() without a clipped gradient: call backward() on what the criterion from make_private returns. The "
                "gradients of a plain loss.backward() are not clipped and are not used. (In a loop with two passes by hand, "
                "call enable_hooks() after the second.)"
            )
        check_ready(module, self.params, self.max_grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with that of the clipping rule as ``clipping`` where it has any."""
        clipping = self.clipping.state_dict()
        return {**super().state_dict(), **({"clipping": clipping} if clipping else {})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; a state of another clipping rule leaves this one as it is.

        Args:
            state_dict: the state of this optimizer, of Opacus' or of the wrapped one.

        Raises:
            ValueError: if it is not that of such an optimizer, or its clipping norm lies outside of this one's bounds.
        """
        inner = dict(state_dict)
        clipping = inner.pop("clipping", {})
        super().load_state_dict(inner)
        if clipping:
            self.clipping.load_state_dict(clipping)
