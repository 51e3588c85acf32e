"""``make_private``: reads the mode and wires the rooms; every other argument goes on untouched."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample.utils import get_gsm_class
from torch import nn, optim
from torch.utils.data import DataLoader

from opacus_fgc.argument_checks import check_nonfinite, is_finite_number
from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.clipping import RULES
from opacus_fgc.loss import MODES, NAMES
from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.preparation import Preparation
from opacus_fgc.private_arguments import check_arguments
from opacus_fgc.sampling.loaders import check_length
from opacus_fgc.sampling.secure import secured
from opacus_fgc.sampling.units import check_units, of_units

_CROSS_ENTROPY = nn.CrossEntropyLoss()  # Opacus' default


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

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: optim.Optimizer,
        criterion: Callable[..., Any] = _CROSS_ENTROPY,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: Any,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        nonfinite: str = "error",
        certify: str = "thinning",
        unit: Any = None,
        records_per_unit: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes model, optimizer, criterion and data loader private; see `opacus.PrivacyEngine.make_private`.

        With a mode of this package all arguments are checked before anything is wrapped or changed. With another mode all but
        ``nonfinite``, ``certify``, ``unit`` and ``records_per_unit`` go to Opacus, which has no units.

        Args:
            module: the model.
            optimizer: any of ``torch.optim`` over the model's parameters.
            criterion: any of torch's, or any callable, batch first; see `DPLossFastGradientClipping`.
            data_loader: gives the data set, the batch size that is expected, and how samples are collated.
            noise_multiplier: standard deviation of the noise as a multiple of ``max_grad_norm``.
            max_grad_norm: the norm ``C`` that each sample's gradient is clipped to.
            batch_first: whether the batch is the first axis of what the model is called on, or the second.
            loss_reduction: "mean" or "sum", as the criterion reduces.
            poisson_sampling: whether batches are drawn as the account takes them to be; without, the loader stays as it is.
            clipping: "flat", or "adaptive" with the arguments of `clipping.AdaptiveClipping` by keyword.
            noise_generator: the source of noise; torch's default if None.
            grad_sample_mode: "ghost" or "ghost_bk"; or one of Opacus' modes.
            wrap_model: whether the model is wrapped, or gets hooks and is used as it is.
            nonfinite: what is done about samples whose gradient has inf or NaN in it, "error" or "drop".
            certify: how often it is proven that samples have gradients of their own: "thinning", "always" or "never"; see
                `certificates.schedule.Schedule`.
            unit: the unit of each record of the data set, such as its user: ``len(dataset)`` hashable values. Units are then
                what is drawn, clipped, and hidden by the budget, whatever number of records each has: a batch has each unit
                with the probability that a record would have without, and the criterion is called with ``unit=...``. None if
                each record is a unit.
            records_per_unit: how many records of a unit a batch has at most, drawn anew each time; all if None.
            **kwargs: the clipping rule's arguments; with another mode, Opacus' own.

        Returns:
            ``(module, optimizer, criterion, data_loader)`` with a mode of this package: the wrapped model (with
            ``wrap_model=False`` the hooks on it, which have ``cleanup()``), the private optimizer, a criterion whose loss
            has to be the one to call ``backward()`` on, and a loader with Poisson sampling.

        Raises:
            TypeError: if an argument is missing, or is none of the clipping rule's.
            ValueError: if an argument has no meaning.
            NotImplementedError: if the model, or what is asked for, is not supported.
        """
        given: dict[str, Any] = {
            "module": module,
            "optimizer": optimizer,
            "criterion": criterion,
            "data_loader": data_loader,
            "noise_multiplier": noise_multiplier,
            "max_grad_norm": max_grad_norm,
            "batch_first": batch_first,
            "loss_reduction": loss_reduction,
            "poisson_sampling": poisson_sampling,
            "clipping": clipping,
            "noise_generator": noise_generator,
            "grad_sample_mode": _known(grad_sample_mode),
            "wrap_model": wrap_model,
            **kwargs,
        }
        if given["grad_sample_mode"] not in MODES:
            if self.secure_mode:
                raise NotImplementedError(
                    f"secure_mode=True serves grad_sample_mode {' and '.join(map(repr, MODES))}; this is "
                    f"{grad_sample_mode!r}. Pass one of the two, or use Opacus' own "
                    "PrivacyEngine, which needs torchcsprng for it"
                )
            if unit is not None:
                raise NotImplementedError(
                    f"unit=... serves grad_sample_mode {' and '.join(map(repr, MODES))}; this is {grad_sample_mode!r}, in which "
                    "each record is a unit. Pass one of the two"
                )
            return super().make_private(**given)
        check_nonfinite(nonfinite)
        schedule = Schedule(certify)
        given = _with_clipping_rule(**given)
        if self.secure_mode and noise_generator is not None:
            raise ValueError(
                "noise_generator and secure_mode=True: noise that withstands attacks comes from a generator of its own. Leave "
                "noise_generator out"
            )
        if self.secure_mode and not poisson_sampling:
            secured(data_loader, self.secure_rng)  # for its error, before anything is wrapped
        check_arguments(**given)
        check_units(data_loader, unit, records_per_unit, poisson_sampling, bool(kwargs.get("rand_on_empty")))
        if unit is not None:
            given["data_loader"] = of_units(data_loader, unit, records_per_unit)
        return self._private(**given, nonfinite=nonfinite, certify=schedule)

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
    """The arguments of `make_private`, with the clipping rule in the place of its name, norm and arguments."""
    if clipping not in RULES:
        raise NotImplementedError(
            f"clipping is {clipping!r}; ghost clipping clips by one norm over all parameters. Pass one of "
            f"{', '.join(map(repr, RULES))}, or grad_sample_mode='hooks' for Opacus' other ways"
        )
    names = {name for rule in RULES.values() for name in inspect.signature(rule).parameters}
    options = {name: kwargs.pop(name) for name in names.intersection(kwargs)}
    return {"clipping": RULES[clipping](max_grad_norm, **options), **kwargs}
