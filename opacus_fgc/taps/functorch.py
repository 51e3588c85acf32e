"""What no table knows: per-sample gradients from one more forward and backward of each sample by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call, grad, vmap

from opacus_fgc._compat.pytree import tree_flatten, tree_unflatten
from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, add
from opacus_fgc.per_sample.precision import at_least_float32
from opacus_fgc.taps.tap import Call, Interleave, Use


def norms_by_sample(outputs: Sequence[Tensor], axis: int) -> Tensor:
    """The norm of each output and sample, by which a repeated forward is compared with the real one.

    Raises:
        NotImplementedError: if an output has no batch axis.
    """
    if any(output.dim() <= axis for output in outputs):
        raise NotImplementedError("it has no norm sampler, and an output without a batch axis")
    rows = [at_least_float32(output.detach()).movedim(axis, 0) for output in outputs]
    if len({len(row) for row in rows}) > 1:
        raise NotImplementedError(
            "it would have to be repeated on one sample at a time (because of force_functorch=True, or of a use of its weights "
            f"outside of its forward), and its outputs, of shapes {[tuple(output.shape) for output in outputs]}, do not all have "
            f"the batch on axis {axis}. Leave force_functorch out, and use the weights in its forward only; or return outputs "
            "that have the batch there"
        )
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
    """Repeats a forward on each sample by itself: by ``vmap`` over ``grad``, or by a loop where that cannot do it.

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

    def loss(
        params: Mapping[Any, Tensor], tensors: Sequence[Tensor], backprops: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        one = list(leaves)
        for place, tensor, dim in zip(places, tensors, in_dims, strict=True):
            one[place] = tensor if dim is None else tensor.unsqueeze(axis)
        with torch.autocast(device, dtype, enabled=autocast):
            outputs = tree_flatten(function(params, one))[0]
        outputs = [outputs[i].squeeze(axis) for i in call.outputs]
        return torch.stack(list(map(_inner, outputs, backprops))).sum(), outputs

    in_dims_of_all = (None, in_dims, [axis] * len(backprops))
    again = _REPEATING.set(True)
    try:
        gradients, outputs = vmap(grad(loss, has_aux=True), in_dims_of_all)(dict(params), tensors, list(backprops))
    except RuntimeError:
        # What it has no rule for, and what looks at the numbers, a loop can do.
        gradients, outputs = _one_by_one(loss, params, tensors, list(backprops), in_dims, axis)
    finally:
        _REPEATING.reset(again)
    if norms is not None:
        tolerance = max(torch.finfo(output.dtype).eps for output in outputs) ** 0.5
        if not torch.allclose(norms_by_sample(outputs, 0), norms, rtol=tolerance, equal_nan=True):
            raise NotImplementedError(
                "it has no norm sampler, and repeating it on one sample at a time gives another output than the batch did, "
                "so it mixes samples, shares an input between them, or changes a state in forward. Register a norm sampler "
                "for it (opacus_fgc.register_norm_sampler)"
            )
    return gradients


def _inner(output: Tensor, backprop: Tensor) -> Tensor:
    """What has the backprop for its gradient by the output, as torch defines gradients by complex numbers."""
    return (output * backprop.conj()).real.sum() if output.is_complex() else (output * backprop).sum()


def _one_by_one(
    loss: Callable[..., tuple[Tensor, list[Tensor]]],
    params: Mapping[Any, Tensor],
    tensors: Sequence[Tensor],
    backprops: Sequence[Tensor],
    in_dims: Sequence[int | None],
    axis: int,
) -> tuple[dict[Any, Tensor], list[Tensor]]:
    """What ``vmap(grad(loss, has_aux=True))`` gives, by a loop over the samples."""
    gradients: dict[Any, list[Tensor]] = {name: [] for name in params}
    several = []
    generators = _random_states(backprops[0].device)
    try:
        for n in range(backprops[0].shape[axis]):
            one = [
                tensor if dim is None else tensor.select(dim, n) for tensor, dim in zip(tensors, in_dims, strict=True)
            ]
            with torch.enable_grad():
                own = {name: param.detach().requires_grad_() for name, param in params.items()}
                total, outputs = loss(own, one, [backprop.select(axis, n) for backprop in backprops])
                by_param: Sequence[Tensor | None] = [None] * len(own)
                if total.requires_grad:
                    by_param = torch.autograd.grad(total, list(own.values()), allow_unused=True)
            for (name, param), gradient in zip(params.items(), by_param, strict=True):
                gradients[name].append(torch.zeros_like(param) if gradient is None else gradient.to_dense())
            several.append([output.detach() for output in outputs])
    except RuntimeError as error:
        raise NotImplementedError(
            "it has no norm sampler, and it cannot be repeated on one sample at a time: "
            f"{error}. Register a norm sampler for it (opacus_fgc.register_norm_sampler)"
        ) from error
    if not all(map(torch.equal, generators, _random_states(backprops[0].device))):
        raise NotImplementedError(
            "it has no norm sampler, and it draws random numbers, so that it cannot be repeated on one sample at a time. Put "
            "what "
            "draws them (dropout) into a module of its own, or register a norm sampler for it "
            "(opacus_fgc.register_norm_sampler)"
        )
    stacked = {name: torch.stack(rows) for name, rows in gradients.items()}
    return stacked, [torch.stack(outputs) for outputs in zip(*several, strict=True)]


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


_REPEATING: ContextVar[bool] = ContextVar("repeating", default=False)


def is_repeating() -> bool:
    """Whether what runs is no forward of the user's, but a sampler that repeats one."""
    return _REPEATING.get()


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
                "it has no norm sampler, and torch.func cannot repeat what FSDP shards by itself. Register a norm sampler "
                "for it "
                "(opacus_fgc.register_norm_sampler), or call fully_shard on a module around it instead"
            )
        params = {name: param.detach() for name, param in layer.named_parameters() if param.requires_grad}
        leaves, spec = tree_flatten(call.arguments())

        def forward(params: Mapping[Any, Tensor], leaves: list[Any]) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            # What a forward does to buffers it has done already.
            buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            return functional_call(layer, {**buffers, **params}, args, kwargs)

        gradients = gradients_by_sample(forward, params, leaves, call, backprops, call.fingerprint)
        return {layer.get_parameter(name): Dense(call.by_sample(gradient)) for name, gradient in gradients.items()}
