"""Layers that no table knows: their per-sample gradients by `torch.func`, from one more forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, add, at_least_float32
from opacus_fgc.taps import Call, Interleave, Use


def _norms_by_sample(outputs: list[Tensor], axis: int) -> Tensor:
    rows = [at_least_float32(output.detach()).movedim(axis, 0) for output in outputs]
    return torch.stack([torch.linalg.vector_norm(row.reshape(len(row), row[:1].numel()), dim=1) for row in rows])


class Functorch:
    """Repeats the layer's forward on each sample by itself (``vmap`` over ``grad``).

    Serves the layer and everything in it. The repeated forward has to give the output that the real one gave, which it does
    not if the layer mixes samples, draws random numbers or changes a state.
    """

    name = "torch.func"
    covers_children = True

    def fingerprint(self, outputs: list[Tensor], axis: int) -> Tensor:
        """The norm of each output and sample, to be compared with the repeated forward's."""
        if any(output.dim() <= axis for output in outputs):
            raise NotImplementedError("it has no norm sampler, and an output without a batch axis")
        return _norms_by_sample(outputs, axis)

    def __call__(self, layer: nn.Module, uses: Sequence[Use], interleave: Interleave) -> Forms:
        """The forms of all trainable parameters in the layer, added up over its uses.

        Raises:
            NotImplementedError: if the layer cannot be repeated on one sample at a time.
        """
        several = [self._forms(layer, *use) for use in uses]
        return {param: add([forms[param] for forms in several]) for param in several[0]}

    def _forms(self, layer: nn.Module, call: Call, backprops: tuple[Tensor, ...]) -> Forms:
        params = {name: param.detach() for name, param in layer.named_parameters() if param.requires_grad}
        batch_size = backprops[0].shape[call.batch_axis]
        if batch_size == 0:
            gradients = {name: param.new_zeros(0, *param.shape) for name, param in params.items()}
        else:
            gradients = self._gradients(layer, call, backprops, params, batch_size)
        return {layer.get_parameter(name): Dense(gradient) for name, gradient in gradients.items()}

    def _gradients(
        self,
        layer: nn.Module,
        call: Call,
        backprops: tuple[Tensor, ...],
        params: dict[str, Tensor],
        batch_size: int,
    ) -> dict[str, Tensor]:
        axis = call.batch_axis
        leaves, spec = tree_flatten(call.arguments())
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        in_dims = [axis if tensor.dim() > axis and tensor.shape[axis] == batch_size else None for tensor in tensors]
        device, (autocast, dtype) = backprops[0].device.type, call.autocast

        def loss(
            params: dict[str, Tensor], tensors: list[Tensor], backprops: list[Tensor]
        ) -> tuple[Tensor, list[Tensor]]:
            one = iter(
                tensor if dim is None else tensor.unsqueeze(axis) for tensor, dim in zip(tensors, in_dims, strict=True)
            )
            args, kwargs = tree_unflatten(
                [next(one) if is_one else leaf for is_one, leaf in zip(is_tensor, leaves, strict=True)], spec
            )
            with torch.autocast(device, dtype, enabled=autocast):
                outputs = tree_flatten(functional_call(layer, params, args, kwargs))[0]
            outputs = [outputs[i].squeeze(axis) for i in call.outputs]
            total = sum((output * backprop).sum() for output, backprop in zip(outputs, backprops, strict=True))
            return total, outputs

        in_dims_of_all = (None, in_dims, [axis] * len(backprops))
        try:
            gradients, outputs = vmap(grad(loss, has_aux=True), in_dims_of_all)(params, tensors, list(backprops))
        except RuntimeError as error:
            raise NotImplementedError(
                "it has no norm sampler, and torch.func cannot repeat it on one sample at a time: "
                f"{error}. Register a norm sampler for it (opacus_fgc.register_norm_sampler)"
            ) from error
        if call.fingerprint is None:
            return gradients
        tolerance = max(torch.finfo(output.dtype).eps for output in outputs) ** 0.5
        if not torch.allclose(_norms_by_sample(outputs, 0), call.fingerprint, rtol=tolerance, equal_nan=True):
            raise NotImplementedError(
                "it has no norm sampler, and repeating it on one sample at a time gives another output than the batch did, so "
                "it mixes samples, shares an input between them, or changes a state in forward. Register a norm sampler for "
                "it (opacus_fgc.register_norm_sampler)"
            )
        return gradients
