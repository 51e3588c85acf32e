"""From the clipped sum to the step: noise, scale, step, and Opacus' accountant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping as OpacusOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _generate_noise, _mark_as_processed
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from opacus_fgc.argument_checks import check_loss_reduction, is_finite_number
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.distributed.agreement import check_agreement
from opacus_fgc.distributed.clipped_sums import noisy_total, privatized_gradients
from opacus_fgc.distributed.mesh import local
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.noise.gaussian import generator_of_rank
from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.sampling.draws import Batches
from opacus_fgc.step.clipped_sum import ClippedSum


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


class DPOptimizerFastGradientClipping(OpacusOptimizer):
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
        self._most_signals: int | None = (
            None  # how many parts of batches were drawn, and not stepped on, at the first of them
        )
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

    def accumulate(self) -> None:
        """Checks that there is a clipped sum to step with.

        Raises:
            ValueError: if there is none, or a part of it is missing; if there was no `zero_grad` since the last step; or if
                there is a gradient besides it, which the step would drop.
        """
        if self.module is None:
            raise PrivacyValueError(
                "this optimizer is attached to no wrapped model, so it cannot know what its gradients were clipped to: get "
                "both from make_private, give both to DPLossFastGradientClipping, or call optimizer.attach(module)"
            )
        if self.accumulated_iterations == 0:
            raise PrivacyValueError(
                "step() without a clipped gradient: call backward() on what the criterion from make_private returns. The "
                "gradients of a plain loss.backward() are not clipped and are not used. (In a loop with two passes by hand, "
                "call enable_hooks() after the second.)"
            )
        self.module.clipped_sum.check_norm(self.max_grad_norm)
        if not self.params:
            raise ValueError("none of the optimizer's parameters is trainable, so this step would train nothing")
        names = {param: name for name, param in self.module._module.named_parameters()}
        missing = [
            names.get(param, f"one of shape {tuple(param.shape)} that the model does not have")
            for param in self.params
            if getattr(param, "summed_grad", None) is None
        ]
        if missing:
            raise PrivacyValueError(
                f"parameters of the optimizer without a clipped gradient: {', '.join(missing)}. They came to it after the "
                "model was wrapped, or were cleared; wrap model and optimizer anew"
            )
        for param in self.params:
            _check_processed_flag(param.summed_grad)
        plain = [names[param] for param, found in zip(self.params, _not_zero(self.params), strict=True) if found]
        if plain:
            raise PrivacyValueError(
                f"not clipped is the gradient in p.grad of {', '.join(plain[:5])}{' and others' if len(plain) > 5 else ''}: "
                "it comes of a plain backward(), or was written there, and step() would drop it. Call optimizer.zero_grad() "
                "before backward() if it is not wanted. A gradient that is public (of public or generated data, or of a "
                "penalty on weights) is added after the noise: compute it by torch.autograd.grad, outside of the private "
                "step, and add it in a hook, optimizer.original_optimizer.register_step_pre_hook(lambda optimizer, args, "
                "kwargs: ...), to p.grad"
            )

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
        return values + _generate_noise(std=std, reference=values, generator=self.generator)

    def add_noise(self) -> None:
        """Writes the clipped sum plus noise to the gradients.

        Raises:
            ValueError: if ``noise_multiplier`` is now too large for the clipping rule, the step is not on a batch of the private
                loader, or ranks do not take the same step.
        """
        assert self.module is not None  # checked by `accumulate`
        clipped, refused = self.module.clipped_sum, None
        try:
            batch = self.batches.take(sum(map(len, clipped.norms)), clipped.passes)
        except PrivacyValueError as error:
            batch, refused = -1, error
        std = self.clipping.gradient_noise_multiplier(self.noise_multiplier) * self.max_grad_norm
        try:
            check_agreement(
                self.module.layout,
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
        for param, gradient in privatized_gradients(self.module.layout, self.params, partial(self.with_noise, std=std)):
            param.grad = gradient.to(param.dtype)
            _mark_as_processed(param.summed_grad)

    def scale_grad(self) -> None:
        """Divides the noisy sum by the number of samples that is expected on all ranks, with ``loss_reduction="mean"``."""
        super().scale_grad()
        assert self.module is not None  # checked by `accumulate`
        if self.loss_reduction == "mean" and self.module.layout.data_ranks > 1:
            for param in self.params:
                param.grad /= self.module.layout.data_ranks

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
        assert self.module is not None  # checked by `accumulate`
        layout = self.module.layout
        noisy = noisy_total(layout, total, partial(self.with_noise, std=std))
        return noisy / (self.expected_batch_size * layout.data_ranks * self.accumulated_iterations)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Makes the noisy gradient and moves the clipping norm, unless this step is to be skipped to go on summing.

        Args:
            closure: not used; `step` has called it.

        Returns:
            Whether the wrapped optimizer is to step.
        """
        self._check_signals()
        stepping = super().pre_step(closure)
        assert self.module is not None  # checked by `accumulate`
        if stepping:
            self.clipping.update(self.module.clipped_sum.norms, self.noisy_mean)
        else:
            # The physical batches of a skipped step are parts of one logical batch, and count as one pass.
            self.module.clipped_sum.passes = 0
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

    def _check_signals(self) -> None:
        """Raises a PrivacyValueError if a part of a split batch had no step: its signal would be taken for the next one's."""
        waiting = len(self._step_skip_queue)
        if not waiting or self._most_signals is None:
            # Workers, and some loops, draw so far ahead.
            self._most_signals = waiting or None
        elif waiting > self._most_signals:
            del self._step_skip_queue[: waiting - self._most_signals + 1]  # this part's as well
            self._drop_clipped_sum()
            raise PrivacyValueError(
                "a part of a batch that was split was drawn, and skipped, so that its other parts are not the batch that was "
                "drawn. Under BatchMemoryManager call backward() and step() on every part, also on one without samples"
            )

    def drop_unfinished(self) -> None:
        """Gives up what skipped steps have summed so far, as where a loop breaks off within a batch."""
        self._step_skip_queue.clear()
        self._most_signals = None
        if self._is_last_step_skipped:
            self._drop_clipped_sum()

    def _drop_clipped_sum(self) -> None:
        self._is_last_step_skipped = False
        if self.module is None:
            return
        # Of all that were clipped: a parameter may come to the optimizer later, and must not bring the sums of past steps.
        for param in self.module.trainable_parameters:
            param.summed_grad = None
        self.module.clipped_sum = ClippedSum()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clears gradients, and the clipped sum unless the last step was skipped to go on summing.

        Args:
            set_to_none: whether ``p.grad`` becomes None rather than 0.
        """
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._drop_clipped_sum()
        elif self.module is not None:
            self.module.clipped_sum.passes = 0

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


def _not_zero(params: Iterable[Any]) -> list[bool]:
    """For each parameter whether it has a gradient that is not zero."""
    flags = [torch.tensor(False, device="cpu") if param.grad is None else _any(local(param.grad)) for param in params]
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([flag.to(device) for flag in flags]).tolist()


def _any(gradient: Tensor) -> Tensor:
    return (gradient if gradient.layout == torch.strided else gradient.coalesce().values()).any()
