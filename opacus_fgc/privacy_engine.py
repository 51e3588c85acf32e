"""``make_private``: reads the mode and wires the rooms; every other argument goes on untouched."""

from __future__ import annotations

import inspect
import math
import os
import secrets
import warnings
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from opacus import PrivacyEngine as OpacusPrivacyEngine
from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from opacus.grad_sample.utils import get_gsm_class
from opacus.optimizers import DPOptimizer
from opacus.utils.module_utils import trainable_modules
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import nn, optim
from torch.utils.data import DataLoader

from opacus_fgc.argument_checks import check_loss_reduction, check_nonfinite, describe, is_finite_number
from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.clipping import RULES, FlatClipping
from opacus_fgc.criterion.reduction import check_criterion
from opacus_fgc.distributed.agreement import check_agreement, check_copies
from opacus_fgc.distributed.checkpoint import WholeState
from opacus_fgc.distributed.sampling import check_parts, common_generator, shared
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.grad_sample_module import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.loss import DPLossFastGradientClipping, book_keeping, double_backward
from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping, check_noise_multiplier, check_step
from opacus_fgc.sampling.loaders import batches_of, check_length, check_loader, checked, with_own_draws
from opacus_fgc.sampling.secure import secured

MODES = {"ghost": double_backward, "ghost_bk": book_keeping}
"""How each ``grad_sample_mode`` that this package serves gets the clipped sum; all others are Opacus' own."""

NAMES = {"ghost_fsdp": "ghost", "ghost_tp": "ghost"}
"""Opacus' names for "ghost" by the way a model is laid out over processes, which shows from the model."""


class PrivacyEngine(OpacusPrivacyEngine):
    """Opacus' `PrivacyEngine` with this package's ``grad_sample_mode="ghost"`` and ``"ghost_bk"``.

    Both give the same numbers: "ghost" by two backward passes, with the memory of ordinary training, "ghost_bk" (book-keeping)
    by one, nearly as fast as ordinary training. Everything else, and every other mode, is Opacus' own.

    Args:
        accountant: "prv", "rdp" or "gdp"; see Opacus.
        secure_mode: noise and batches come from a generator that nobody can predict, and the noise withstands floating-point
            attacks; see `SecureGenerator`. For this package's modes only.

    Attributes:
        secure_mode: the argument.
        secure_rng: the generator of the secure mode, else None. It has neither state nor seed.

    Raises:
        ImportError: if what ``secure_mode`` needs is not installed.

    Example:
        >>> model, optimizer, criterion, loader = PrivacyEngine().make_private(
        ...     module=model, optimizer=optimizer, criterion=criterion, data_loader=loader,
        ...     noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="ghost")
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        self._batches: list[torch.Generator] = []  # what draws the batches of several ranks
        if not secure_mode:
            super().__init__(accountant=accountant)
            return
        generator = SecureGenerator()
        with warnings.catch_warnings():
            # Opacus' own secure mode needs torchcsprng, and without it Opacus warns that it is off.
            warnings.filterwarnings("ignore", message="Secure RNG turned off")
            super().__init__(accountant=accountant)
        self.secure_mode = True
        self.secure_rng = generator

    def make_private(self, **kwargs: Any) -> Any:
        """Makes model, optimizer, criterion and data loader private; see `opacus.PrivacyEngine.make_private`.

        Args:
            **kwargs: the arguments of Opacus' method. With a mode of this package all are checked before anything is wrapped or
                changed; ``clipping`` is "flat", or "adaptive" with the arguments of `clipping.AdaptiveClipping`;
                ``nonfinite="error"`` or ``"drop"`` says what is done about samples whose gradient has inf or NaN in it; and
                ``certify="thinning"``, ``"always"`` or ``"never"`` how often it is proven that samples have gradients of their
                own; see `certificates.schedule.Schedule`.

        Returns:
            ``(module, optimizer, criterion, data_loader)`` with a mode of this package: the wrapped model (with
            ``wrap_model=False`` the hooks on it, which have ``cleanup()``), the private optimizer, a criterion whose loss
            has to be the one to call ``backward()`` on, and a loader with Poisson sampling.

        Raises:
            TypeError: if an argument is missing, or is none of the clipping rule's.
            ValueError: if an argument has no meaning.
            NotImplementedError: if the model, or what is asked for, is not supported.
        """
        mode = _known(kwargs.get("grad_sample_mode", "hooks"))
        if mode not in MODES:
            if self.secure_mode:
                raise NotImplementedError(
                    f"secure_mode=True serves grad_sample_mode {' and '.join(map(repr, MODES))}; this is "
                    f"{kwargs.get('grad_sample_mode', 'hooks')!r}. Pass one of the two, or use Opacus' own "
                    "PrivacyEngine, which needs torchcsprng for it"
                )
            return super().make_private(**kwargs)
        kwargs["grad_sample_mode"] = mode
        nonfinite = kwargs.pop("nonfinite", "error")
        check_nonfinite(nonfinite)
        schedule = Schedule(kwargs.pop("certify", "thinning"))
        kwargs = _with_clipping_rule(**kwargs)
        poisson = kwargs.get("poisson_sampling", True)
        if self.secure_mode and not poisson:
            secured(kwargs["data_loader"], self.secure_rng)  # for its error, before anything is wrapped
        _check_arguments(**kwargs)
        module, optimizer, criterion, data_loader = super().make_private(**kwargs)
        criterion.clipped_backward = MODES[mode]
        criterion.module.nonfinite = nonfinite
        criterion.module.schedule = schedule
        layout = criterion.module.layout
        if layout.axes:
            check_copies(layout)
            data_loader = self._distributed(layout, optimizer, data_loader, poisson)
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"each of the {dist.get_world_size()} processes trains a model of its own, with batches and a budget of its "
                "own. "
                "For one model of all wrap it in opacus.distributed.DifferentiallyPrivateDistributedDataParallel, or call "
                "fully_shard on it, before make_private",
                stacklevel=2,
            )
        if not (layout.axes and poisson):
            data_loader = with_own_draws(data_loader)
        if not (poisson or self.secure_mode):
            data_loader = checked(data_loader)
        optimizer.batches = batches_of(data_loader, optimizer.drop_unfinished)
        return module, optimizer, criterion, data_loader

    def make_private_with_epsilon(
        self, *, target_epsilon: float, target_delta: float, epochs: float, data_loader: DataLoader, **kwargs: Any
    ) -> Any:
        """`make_private` with the noise for a budget; see `opacus.PrivacyEngine.make_private_with_epsilon`.

        Args:
            target_epsilon: what epsilon is to be at the end, a finite number above 0.
            target_delta: the delta of it, between 0 and 1.
            epochs: how many epochs there will be, with one step at least.
            data_loader: as for `make_private`.
            **kwargs: the other arguments of Opacus' method.

        Raises:
            ValueError: if a target has no meaning; and what `make_private` raises.
        """
        if not (is_finite_number(target_epsilon) and target_epsilon > 0):
            raise ValueError(
                f"target_epsilon is {target_epsilon!r}; it is one finite number above 0. (Training without privacy is "
                "make_private with noise_multiplier=0)"
            )
        if not (is_finite_number(target_delta) and 0 < target_delta < 1):
            raise ValueError(
                f"target_delta is {target_delta!r}; it is one number between 0 and 1, well below 1 / (number of samples)"
            )
        check_length(data_loader)
        if not (is_finite_number(epochs) and int(epochs / (1 / len(data_loader))) >= 1):
            raise ValueError(
                f"epochs is {epochs!r}; it is one number, of which {len(data_loader)} batches each make one step at least"
            )
        return super().make_private_with_epsilon(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            epochs=epochs,
            data_loader=data_loader,
            **kwargs,
        )

    def get_epsilon(self, delta: float) -> float:
        """The budget spent so far; see `opacus.PrivacyEngine.get_epsilon`.

        Args:
            delta: the delta of it.

        Returns:
            Epsilon: 0 before the first step, and inf if a step was without noise.
        """
        history = self.accountant.history
        if not history:
            return 0.0
        if any(noise_multiplier == 0 for noise_multiplier, _, _ in history):
            return math.inf
        return super().get_epsilon(delta)

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

    def save_checkpoint(self, *, path: Any, module: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Saves model, optimizer and budget; see `opacus.PrivacyEngine.save_checkpoint`.

        A file is replaced as a whole, so that a run that is killed while it saves leaves the checkpoint before. With several
        ranks the first one writes, and what it writes is what one process would: another number of ranks can go on from it.
        Under FSDP and tensor parallel each rank has to call this.

        Args:
            path: a path, or a file that is open for writing.
            module: the wrapped model.
            optimizer: the private optimizer.
            **kwargs: the other arguments of Opacus' method.
        """
        layout = _layout(module, optimizer)
        cut = layout is not None and layout.forward_communicates
        if cut:
            state = WholeState(module).state_dict(**(kwargs.pop("module_state_dict_kwargs", None) or {}))
            module = SimpleNamespace(state_dict=lambda: state)
            if optimizer is not None:
                optimizer_state = WholeState(optimizer).state_dict()
                optimizer = SimpleNamespace(state_dict=lambda: optimizer_state)
        if layout is None or dist.get_rank() == 0:
            self._write_checkpoint(path, module=module, optimizer=optimizer, **kwargs)
        if cut:
            dist.barrier()

    def _write_checkpoint(self, path: Any, **kwargs: Any) -> None:
        if not isinstance(path, (str, os.PathLike)):
            super().save_checkpoint(path=path, **kwargs)
            return
        unfinished = f"{os.fspath(path)}.unfinished"
        with open(unfinished, "wb") as file:
            super().save_checkpoint(path=file, **kwargs)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def load_checkpoint(self, *, module: Any, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Restores model, optimizer and budget; see `opacus.PrivacyEngine.load_checkpoint`.

        Torch's generators, and the optimizer's own, are seeded anew by the system. A script that sets a seed when it starts
        would draw for the next steps the noise of its first ones, and noise that is used twice hides nothing.

        Args:
            module: the model to restore. With several ranks each has to call this, on whatever number of ranks wrote the file.
            optimizer: the optimizer to restore.
            **kwargs: the other arguments of Opacus' method.

        Returns:
            The checkpoint.
        """
        distributed = _layout(module, optimizer) is not None
        checkpoint = super().load_checkpoint(
            module=WholeState(module) if distributed else module,
            optimizer=WholeState(optimizer) if distributed and optimizer is not None else optimizer,
            **kwargs,
        )
        if isinstance(optimizer, DPOptimizerFastGradientClipping):
            if distributed and optimizer.module is not None:
                # What is not noise has to be the same on ranks that work on the same samples.
                seeds = optimizer.module.layout.common(secrets.token_bytes(16))
                torch.manual_seed(int.from_bytes(seeds[:7], "big"))
                for generator in self._batches:
                    generator.manual_seed(int.from_bytes(seeds[8:15], "big"))
            else:
                torch.seed()
            if isinstance(optimizer.generator, torch.Generator):
                optimizer.generator.seed()
        return checkpoint

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


def _layout(module: Any, optimizer: Any) -> Layout | None:
    """How a private model lies over several processes; None in one."""
    layout = getattr(getattr(optimizer, "module", None) or module, "layout", None)
    return layout if layout is not None and layout.axes else None


def _known(mode: Any) -> str:
    """A ``grad_sample_mode`` by the name that this package has for it; a ValueError if nobody knows it."""
    mode = NAMES.get(mode, mode)
    if mode not in MODES:
        try:
            get_gsm_class(mode)
        except ValueError as error:
            own = ", ".join(map(repr, (*MODES, *NAMES)))
            raise ValueError(
                f"grad_sample_mode is {mode!r}; this package has {own}. The others are those of Opacus: {error}"
            ) from error
    return mode


def _with_clipping_rule(*, max_grad_norm: float, clipping: str = "flat", **kwargs: Any) -> dict[str, Any]:
    """The arguments of `make_private`, with the clipping rule itself in the place of its name and arguments."""
    if clipping not in RULES:
        raise NotImplementedError(
            f"clipping is {clipping!r}; ghost clipping clips by one norm over all parameters. Pass one of "
            f"{', '.join(map(repr, RULES))}, or grad_sample_mode='hooks' for Opacus' other ways"
        )
    names = {name for rule in RULES.values() for name in inspect.signature(rule).parameters}
    options = {name: kwargs.pop(name) for name in names.intersection(kwargs)}
    return {"max_grad_norm": max_grad_norm, "clipping": RULES[clipping](max_grad_norm, **options), **kwargs}


def _check_layers(module: nn.Module) -> None:
    """What Opacus' validators check, but for layers that only its own samplers cannot serve."""
    if not module.training:
        raise UnsupportedModuleError("Model needs to be in training mode; call model.train()")
    for name, layer in trainable_modules(module):
        if isinstance(layer, nn.MultiheadAttention):
            continue
        for error in ModuleValidator.VALIDATORS.get(type(layer), lambda layer: [])(layer):
            raise UnsupportedModuleError(
                f"{describe(name, layer)}: {error} Call opacus.validators.ModuleValidator.fix(model) before the optimizer is "
                "made"
            )


def _check_arguments(
    *,
    module: nn.Module,
    optimizer: optim.Optimizer,
    data_loader: DataLoader,
    noise_multiplier: float,
    max_grad_norm: float,
    clipping: FlatClipping,
    criterion: Any = None,
    loss_reduction: str = "mean",
    poisson_sampling: bool = True,
    **_: Any,
) -> None:
    check_noise_multiplier(noise_multiplier)
    clipping.gradient_noise_multiplier(noise_multiplier)
    check_loss_reduction(loss_reduction)
    # It gives up what FSDP left whole after an evaluation, which stands in the place of parameters, and changes no value.
    layout = Layout(module)
    if criterion is not None:
        check_criterion(criterion, loss_reduction, list(module.parameters()))
    check_step(optimizer)
    check_loader(data_loader, poisson_sampling)
    _check_layers(module)
    params, optimized = set(module.parameters()), list(chain(*(group["params"] for group in optimizer.param_groups)))
    strangers = [param for param in optimized if param not in params]
    if not any(param.requires_grad for param in optimized):
        raise ValueError(
            "the optimizer has no trainable parameter, so it would train nothing. If the model was changed after the optimizer "
            "was made (peft.get_peft_model), make the optimizer from the parameters of the model as it is now"
        )
    if strangers:
        shapes = ", ".join(str(tuple(param.shape)) for param in strangers[:5])
        raise ValueError(
            f"Module parameters are different than optimizer Parameters: {len(strangers)} of the optimizer's are not the "
            f"model's (shapes {shapes}). Make the optimizer from the parameters of the model as it is now"
        )
    if not poisson_sampling:
        check_parts(data_loader, layout)
