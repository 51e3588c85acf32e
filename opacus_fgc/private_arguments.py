"""The arguments of ``make_private``, checked before anything is changed."""

from __future__ import annotations

from itertools import chain
from typing import Any

from opacus.utils.module_utils import trainable_modules
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import nn, optim
from torch.utils.data import DataLoader

from opacus_fgc.argument_checks import check_loss_reduction, describe
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.criterion.reduction import check_criterion
from opacus_fgc.distributed.sampling import check_parts
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.optimizer import check_noise_multiplier, check_step
from opacus_fgc.sampling.loaders import check_loader


def _check_layers(module: nn.Module) -> None:
    """What Opacus' validators check, but for layers that only its own samplers cannot serve."""
    if not module.training:
        raise UnsupportedModuleError("Model needs to be in training mode; call model.train()")
    for name, layer in trainable_modules(module):
        # Here torch's own attention and recurrent layers are right as they are.
        if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
            continue
        for error in ModuleValidator.VALIDATORS.get(type(layer), lambda layer: [])(layer):
            raise UnsupportedModuleError(
                f"{describe(name, layer)}: {error} Call opacus.validators.ModuleValidator.fix(model) before the optimizer is "
                "made"
            )


def check_arguments(
    *,
    module: nn.Module,
    optimizer: optim.Optimizer,
    data_loader: DataLoader,
    noise_multiplier: float,
    clipping: FlatClipping,
    criterion: Any = None,
    loss_reduction: str = "mean",
    poisson_sampling: bool = True,
    **_: Any,
) -> None:
    """Raises an error if no private pipeline can be made of arguments of `PrivacyEngine.make_private`; see there."""
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
