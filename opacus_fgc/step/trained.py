"""The parameters that a private loss trains, and all else that it may depend on."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from operator import is_not
from typing import Any

from opacus.utils.module_utils import trainable_parameters
from torch import Tensor, nn

from opacus_fgc._compat.autograd import gradient_hooks, post_accumulate_grad_hooks
from opacus_fgc.distributed.shards import Unsharded
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.taps.graph import Reached, reached_by
from opacus_fgc.taps.hooks import GradientHook


class TrainedParameters:
    """The parameters of a model that required gradients when it was wrapped, and still have to.

    Args:
        model: the model.
        unsharded: gives what layers see of a parameter.

    Attributes:
        names: the name of each.
    """

    def __init__(self, model: nn.Module, unsharded: Unsharded) -> None:
        self._model, self._unsharded = model, unsharded
        self.names = {param: name for name, param in trainable_parameters(model)}  # as they are between two forwards
        self._in_order = tuple(self.names)

    def check(
        self, loss_per_sample: Tensor, anchor: Tensor, brought: Mapping[Tensor, bool], made: Collection[Tensor]
    ) -> Reached:
        """What losses depend on.

        Args:
            loss_per_sample: shape ``(N,)``.
            anchor: see `taps.tap.tap`.
            brought: see `Record.brought`.
            made: see `Record.made`.

        Raises:
            RuntimeError: if they depend on no trainable layer.
            ValueError: if a parameter was added, replaced, or has a gradient hook; or if they depend on a parameter past its
                layer, or on something outside of the model that they would give no gradient.
        """
        if not loss_per_sample.requires_grad:
            raise RuntimeError("the loss does not depend on any trainable layer of the wrapped model")
        trained = [param for param in self._unsharded.parameters(self._model) if param.requires_grad]
        # One by one takes a fraction of the time of sets: to look a tensor up is a call of Python's.
        if len(trained) != len(self._in_order) or any(map(is_not, trained, self._in_order)):
            self._check_same(self._unsharded.named_parameters(self._model))
        hooked = [self.names[param] for param in trained if _has_hooks(param)]
        if hooked:
            raise PrivacyValueError(
                f"{', '.join(sorted(hooked))} has a gradient hook (register_hook), which would change the clipped sum "
                "after clipping, or not see it at all. Remove it; what it does can be done to the noisy gradient, "
                "before the step: optimizer.original_optimizer.register_step_pre_hook(lambda *_: ...)"
            )
        reached = reached_by([loss_per_sample], self._unsharded.of_each(self.names.keys()), anchor=anchor)
        if reached.past:
            past = map(self._unsharded.parameter, reached.past)
            raise PrivacyValueError(
                f"the loss depends on {', '.join(sorted(self.names[param] for param in past))} past the layer that has it, so "
                "the per-sample norms would miss a part of the gradient. Call the layer instead of using its parameter, and "
                "put penalties on weights into the optimizer (weight_decay)"
            )
        _check_outside(reached, brought, made)
        return reached

    def _check_same(self, every: Mapping[str, Any]) -> None:
        """Raises a ValueError if other parameters are there, or require gradients, than when the model was wrapped."""
        names = {param: name for name, param in every.items() if param.requires_grad}
        late = names.keys() - self.names.keys()
        if late:
            raise ValueError(
                f"{', '.join(sorted(names[param] for param in late))} did not require gradients, or was not there, when the "
                "model was wrapped; wrap it anew with all parameters that are to be trained"
            )
        gone = self.names.keys() - set(every.values())
        if gone:
            raise ValueError(
                f"{', '.join(sorted(self.names[param] for param in gone))} was replaced or removed since the model was "
                "wrapped, "
                "so that the optimizer would train what the model does not use; wrap model and optimizer anew"
            )


def _check_outside(reached: Reached, brought: Mapping[Tensor, bool], made: Collection[Tensor]) -> None:
    """Raises a ValueError if something outside of the model would get no gradient from a private loss of this model."""
    if not reached.model:
        return  # there is nothing to clip, and the pass to the taps says so
    if reached.other_models:
        raise ValueError(
            "the loss depends on another private model, whose output this one is called on, and would give it no gradient. "
            "If it is not to be trained by this loss, detach its output (output.detach()); if it is, as a generator by its "
            "discriminator, compute that loss with the criterion of the other model's own make_private"
        )
    outside = [
        leaf
        for leaf in dict.fromkeys([*reached.before_model, *reached.in_model])
        # What a model makes itself, as checkpointing of adapters does, is nobody's to train.
        if isinstance(leaf, nn.Parameter) or leaf in brought or (leaf in reached.before_model and leaf not in made)
    ]
    given = [leaf for leaf in outside if brought.get(leaf) and not isinstance(leaf, nn.Parameter)]
    if len(given) < len(outside):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in outside[:5] if leaf not in given)
        raise PrivacyValueError(
            "the loss depends on tensors that require a gradient and are outside of the wrapped model, of shapes "
            f"{shapes}; "
            "a private loss would give them none, since they would be neither clipped nor noised. Make what learns from "
            "the data (a prompt, a criterion's own) a part of the module that make_private gets; train what is "
            "public and learns through the model (a generator through its discriminator) by the plain criterion on "
            "model(...); detach what this loss is not to train (x.detach()), or freeze it (requires_grad_(False))"
        )
    if given:
        warnings.warn(
            f"inputs of shapes {', '.join(str(tuple(leaf.shape)) for leaf in given)} require a gradient, and a private "
            "loss "
            "gives them none; for that take the plain criterion: torch.autograd.grad(plain(model(x), y), x)",
            stacklevel=2,
        )


def _has_hooks(param: Any) -> bool:
    """Whether a parameter has gradient hooks besides those of wrapped models."""
    others = [hook for hook in gradient_hooks(param) if not isinstance(hook, GradientHook)]
    return bool(others) or bool(post_accumulate_grad_hooks(param))
