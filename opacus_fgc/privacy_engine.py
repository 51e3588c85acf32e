"""``make_private``: reads the mode and wires the rooms; every other argument goes on untouched."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from opacus.grad_sample.utils import get_gsm_class
from torch.utils.data import DataLoader

from opacus_fgc.argument_checks import check_nonfinite, is_finite_number
from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.clipping import RULES
from opacus_fgc.distributed.agreement import check_agreement, check_copies
from opacus_fgc.distributed.sampling import common_generator, shared
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.loss import MODES, NAMES
from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.preparation import Preparation
from opacus_fgc.private_arguments import check_arguments
from opacus_fgc.sampling.loaders import batches_of, check_length, checked, with_own_draws
from opacus_fgc.sampling.secure import secured


class PrivacyEngine(Preparation):
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
        check_arguments(**kwargs)
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
