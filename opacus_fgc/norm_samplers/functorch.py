"""What no table knows: per-sample gradients by `torch.func`, from one more forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, add
from opacus_fgc.precision import at_least_float32
from opacus_fgc.taps import Call, Interleave, Use


def norms_by_sample(outputs: Sequence[Tensor], axis: int) -> Tensor:
    """The norm of each output and sample, by which a repeated forward is compared with the real one.

    Raises:
        NotImplementedError: if an output has no batch axis.
    """
    if any(output.dim() <= axis for output in outputs):
        raise NotImplementedError("it has no norm sampler, and an output without a batch axis")
    rows = [at_least_float32(output.detach()).movedim(axis, 0) for output in outputs]
    return torch.stack([torch.linalg.vector_norm(row.reshape(len(row), row[:1].numel()), dim=1) for row in rows])


def gradients_by_sample(
    function: Callable[[Mapping[Any, Tensor], list[Any]], Any],
    params: Mapping[Any, Tensor],
    leaves: list[Any],
    call: Call,
    backprops: tuple[Tensor, ...],
    norms: Tensor | None,
    constants: Collection[int] = (),
) -> dict[Any, Tensor]:
    """Repeats a forward on each sample by itself (``vmap`` over ``grad``).

    Args:
        function: the forward, called with the parameters and the flattened arguments of one sample, as a batch of one.
        params: what to differentiate by, detached.
        leaves: flattened arguments of the batch.
        call: the call that is repeated.
        backprops: gradients of the loss by its tapped outputs.
        norms: what `norms_by_sample` gave for the outputs of the call; None if they are not to be compared.
        constants: the places of arguments that are no samples, however many rows they have.

    Returns:
        For each of ``params`` its per-sample gradients, shape ``(N, *shape)``.

    Raises:
        NotImplementedError: if the forward cannot be repeated on one sample at a time, or gives another output then.
    """
    axis = call.batch_axis
    batch_size = backprops[0].shape[axis]
    if batch_size == 0:
        return {name: param.new_zeros(0, *param.shape) for name, param in params.items()}
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place] for place in places]
    in_dims = [
        axis if tensor.dim() > axis and tensor.shape[axis] == batch_size and place not in constants else None
        for place, tensor in zip(places, tensors, strict=True)
    ]
    device, (autocast, dtype) = backprops[0].device.type, call.autocast

    def loss(params: dict[Any, Tensor], tensors: list[Tensor], backprops: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        one = list(leaves)
        for place, tensor, dim in zip(places, tensors, in_dims, strict=True):
            one[place] = tensor if dim is None else tensor.unsqueeze(axis)
        with torch.autocast(device, dtype, enabled=autocast):
            outputs = tree_flatten(function(params, one))[0]
        outputs = [outputs[i].squeeze(axis) for i in call.outputs]
        total = sum((output * backprop).sum() for output, backprop in zip(outputs, backprops, strict=True))
        return total, outputs

    in_dims_of_all = (None, in_dims, [axis] * len(backprops))
    try:
        gradients, outputs = vmap(grad(loss, has_aux=True), in_dims_of_all)(dict(params), tensors, list(backprops))
    except RuntimeError as error:
        raise NotImplementedError(
            "it has no norm sampler, and torch.func cannot repeat it on one sample at a time: "
            f"{error}. Register a norm sampler for it (opacus_fgc.register_norm_sampler)"
        ) from error
    if norms is not None:
        tolerance = max(torch.finfo(output.dtype).eps for output in outputs) ** 0.5
        if not torch.allclose(norms_by_sample(outputs, 0), norms, rtol=tolerance, equal_nan=True):
            raise NotImplementedError(
                "it has no norm sampler, and repeating it on one sample at a time gives another output than the batch did, "
                "so it mixes samples, shares an input between them, or changes a state in forward. Register a norm sampler "
                "for it (opacus_fgc.register_norm_sampler)"
            )
    return gradients


class Functorch:
    """Repeats a layer's forward on each sample by itself.

    Serves the layer and everything in it. The repeated forward has to give the output that the real one gave, which it does
    not if the layer mixes samples, draws random numbers or changes a state.
    """

    name = "torch.func"
    covers_children = True

    def fingerprint(self, outputs: list[Tensor], axis: int) -> Tensor:
        """The norm of each output and sample, to be compared with the repeated forward's."""
        return norms_by_sample(outputs, axis)

    def __call__(self, layer: nn.Module, uses: Sequence[Use], interleave: Interleave) -> Forms:
        """The forms of all trainable parameters in the layer, added up over its uses.

        Raises:
            NotImplementedError: if the layer cannot be repeated on one sample at a time.
        """
        several = [self._forms(layer, *use) for use in uses]
        return {param: add([forms[param] for forms in several]) for param in several[0]}

    def _forms(self, layer: nn.Module, call: Call, backprops: tuple[Tensor, ...]) -> Forms:
        if any(isinstance(module, FSDPModule) for module in layer.modules()):
            raise NotImplementedError(
                "it has no norm sampler, and torch.func cannot repeat what FSDP shards by itself. Register a norm sampler for it "
                "(opacus_fgc.register_norm_sampler), or call fully_shard on a module around it instead"
            )
        params = {name: param.detach() for name, param in layer.named_parameters() if param.requires_grad}
        leaves, spec = tree_flatten(call.arguments())

        def forward(params: Mapping[Any, Tensor], leaves: list[Any]) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            return functional_call(layer, dict(params), args, kwargs)

        gradients = gradients_by_sample(forward, params, leaves, call, backprops, call.fingerprint)
        return {layer.get_parameter(name): Dense(call.by_sample(gradient)) for name, gradient in gradients.items()}
