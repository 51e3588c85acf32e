"""Checkpoints of model, optimizer and budget."""

from __future__ import annotations

import os
import secrets
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from opacus import PrivacyEngine as OpacusPrivacyEngine

from opacus_fgc.distributed.checkpoint import WholeState
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping


class Checkpoints(OpacusPrivacyEngine):
    """An engine whose checkpoints survive a kill, fit any number of ranks, and never bring back noise that was used."""

    _batches: list[torch.Generator]

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
        sharded = layout is not None and layout.forward_communicates
        if sharded:
            state = WholeState(module).state_dict(**(kwargs.pop("module_state_dict_kwargs", None) or {}))
            module = SimpleNamespace(state_dict=lambda: state)
            if optimizer is not None:
                optimizer_state = WholeState(optimizer).state_dict()
                optimizer = SimpleNamespace(state_dict=lambda: optimizer_state)
        if layout is None or dist.get_rank() == 0:
            self._write_checkpoint(path, module=module, optimizer=optimizer, **kwargs)
        if sharded:
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


def _layout(module: Any, optimizer: Any) -> Layout | None:
    """How a private model lies over several processes; None in one."""
    layout = getattr(getattr(optimizer, "module", None) or module, "layout", None)
    return layout if layout is not None and layout.axes else None
