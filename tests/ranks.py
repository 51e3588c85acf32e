"""Processes that run the same function, each as one rank of torch.distributed (gloo)."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opacus_fgc.planner import MEMORY

PATIENCE = 60
"""Seconds after which a function that does not return counts as hung; a quarter of it after a rank has failed."""


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    MEMORY.peak = 0  # as in conftest.py
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        function, args, kwargs = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((function(*args, **kwargs), None))
        except Exception as error:
            # The process ends, as a script's would, so that no other waits for it.
            # A PrivacyValueError is a ValueError, and so on.
            kind = type(error).__name__.removeprefix("Privacy")
            pipe.send((None, (kind, str(error), traceback.format_exc())))
            return


class Failed(AssertionError):
    """What came of ranks of which one failed at least.

    Attributes:
        errors: type and text of the error of each rank; None for one without, or without an answer.
    """

    def __init__(self, errors: list[tuple[str, str, str] | None]) -> None:
        self.errors = [error and error[:2] for error in errors]
        super().__init__("\n".join(f"rank {rank}: {error[2]}" for rank, error in enumerate(errors) if error))


class Ranks:
    """``size`` processes. After a failure they are started anew, since others may wait for the one that failed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "opacus", "opacus_fgc"])
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.size):
            pipe, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, other), daemon=True)
            process.start()
            other.close()
            self._processes.append((process, pipe))

    def stop(self) -> None:
        """Ends the processes."""
        for process, pipe in self._processes:
            process.kill()
            process.join()
            pipe.close()
        self._processes = []

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Runs a function of a module on all ranks.

        Returns:
            What it returned, by rank.

        Raises:
            Failed: if it raised on a rank, or did not return.
        """
        if not self._processes:
            self._start()
        for _, pipe in self._processes:
            pipe.send((function, args, kwargs))
        answers: dict[Any, Any] = {}
        end = time.monotonic() + PATIENCE
        waiting = {pipe: process for process, pipe in self._processes}
        while waiting and (ready := wait(list(waiting), end - time.monotonic())):
            for pipe in ready:
                process = waiting.pop(pipe)
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    process.join()
                    answers[pipe] = None, ("Died", str(process.exitcode), f"died with {process.exitcode}")
                if answers[pipe][1] is not None:
                    end = min(end, time.monotonic() + PATIENCE / 4)
        hung = None, ("Hung", "", f"did not return from {function.__name__}")
        errors = [answers.get(pipe, hung)[1] for _, pipe in self._processes]
        if any(errors):
            self.stop()
            raise Failed(errors)
        return [answers[pipe][0] for _, pipe in self._processes]


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    processes = Ranks(size)
    try:
        yield processes
    finally:
        processes.stop()


@contextmanager
def refused_on_all_ranks(kind: type[Exception], text: str) -> Iterator[None]:
    """Checks that an error of this type, with this in its text, is raised on every rank."""
    with pytest.raises(Failed) as failed:
        yield
    for error in failed.value.errors:
        assert error is not None and error[0] == kind.__name__ and text in error[1]
