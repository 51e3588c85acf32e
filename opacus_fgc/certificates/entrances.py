"""Calls of a model from outside, as they were made, so that they can be made again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opacus_fgc.certificates.model_state import ModelState
from opacus_fgc.certificates.samples import tensors_by_path


class RandomStates:
    """The states of all global generators of random numbers: of Python, numpy and torch.

    Args:
        devices: the CUDA devices that have one.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._python = random.getstate()
        # Not imported for this: nobody draws from what is not there.
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._torch = torch.get_rng_state()
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Makes all of them what they were."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)


class Entrance:
    """One call of a model, or of a part of it, from outside.

    The taps of the layers in it hold it, so that it lives as long as the graph that it made.

    Args:
        module: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        modules: all modules of the model.
        state: what the model kept from its forwards before this one; None if that does not matter.

    Attributes:
        module: what was called.
        inputs: positional and keyword arguments.
        modes: which of the modules were training.
        state: the argument.
        forward: what this call came by, where that was noted.
        rows: the layer, and which of its calls, that was called on an input of the model as it is, by the input's path.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modules: Sequence[nn.Module],
        state: ModelState | None = None,
    ) -> None:
        self.module = module
        self.state = state
        self.forward: Any = None
        self.inputs = (args, kwargs)
        self.modes = tuple(module.training for module in modules)
        self._modules = modules
        self.rows: dict[str, tuple[Any, int]] = {}
        self._calls: dict[Any, int] = {}
        tensors = tensors_by_path(self.inputs)
        self._addresses = {_address(tensor): path for path, tensor in tensors.items()}
        self._devices = sorted({t.device for t in tensors.values() if t.device.type == "cuda"}, key=str)
        self._random = RandomStates(self._devices)
        self._autocast = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in {"cpu", *(device.type for device in self._devices)}
        ]

    def enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Told of the call of a layer in it. Called for every call of every layer, so it is kept light.

        Args:
            layer: the layer, or what stands for a tapped operation.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            Which of the layer's calls it is, from 0 on.
        """
        number = self._calls.get(layer, 0)
        self._calls[layer] = number + 1
        for value in (*args, *kwargs.values()) if kwargs else args:
            # What a layer computed is no input.
            if isinstance(value, Tensor) and value.grad_fn is None:
                path = self._addresses.get(_address(value))
                if path is not None:
                    self.rows.setdefault(path, (layer, number))
        return number

    @contextmanager
    def again(self, keep: bool) -> Iterator[RandomStates]:
        """A context for forwards that are not the user's own, with the modes and the autocast of this call.

        Random states and modes are as before afterwards.

        Args:
            keep: whether something is kept for a backward, as a forward needs that computes gradients itself.

        Yields:
            The random states of this call.
        """
        random_states = RandomStates(self._devices)
        modes = [module.training for module in self._modules]
        try:
            for module, training in zip(self._modules, self.modes, strict=True):
                module.training = training
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for device, dtype, enabled in self._autocast:
                    stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
                if not keep:
                    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_forget, _forgotten))
                yield self._random
        finally:
            for module, training in zip(self._modules, modes, strict=True):
                module.training = training
            random_states.restore()


def _address(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _forget(tensor: Tensor) -> None:
    return None


def _forgotten(nothing: None) -> Tensor:
    raise RuntimeError("this forward is not one to go backward through")
