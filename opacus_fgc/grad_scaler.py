"""Scaled losses for training in float16."""

from __future__ import annotations

from typing import Any

import torch

from opacus_fgc.loss import DPTensorFastGradientClipping


class GradScaler(torch.amp.GradScaler):
    """Scales losses so that backprops do not vanish in float16; `torch.amp.GradScaler` for private losses.

    Norms and clipped sums are those of the loss itself. The scale stays ``init_scale``, and every step is made: torch's own
    scaler skips steps and moves its scale by whether a gradient of the batch overflowed, which is a fact about the data that no
    noise covers. A sample whose backprops overflow has no finite gradient; see ``nonfinite`` in `PrivacyEngine.make_private`.

    Args:
        device: type of the device.
        init_scale: the scale, a power of two, so that it costs no precision.
        **kwargs: other arguments of torch's class.

    Example:
        >>> scaler = GradScaler(init_scale=2.0**12)
        >>> with torch.autocast("cuda", torch.float16):
        ...     loss = criterion(model(x), y)
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def __init__(self, device: str = "cuda", init_scale: float = 2.0**16, **kwargs: Any) -> None:
        super().__init__(device, init_scale=init_scale, **kwargs)

    def scale(self, outputs: Any) -> Any:
        """Returns the loss, scaled.

        Raises:
            TypeError: if it is no private loss.
        """
        if not isinstance(outputs, DPTensorFastGradientClipping):
            raise TypeError(
                f"scale() got a {type(outputs).__name__}; it takes what the criterion from make_private returns, the only loss "
                "whose gradients are clipped"
            )
        return outputs.scaled(self.get_scale())

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Does nothing: clipped sums are not scaled."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Makes the optimizer's step, with its arguments."""
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        """Sets the scale if there is a new one, and else leaves it as it is."""
        if new_scale is not None:
            self._init_scale = float(new_scale)
