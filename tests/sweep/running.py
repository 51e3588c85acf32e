"""Many classes, each in a process of its own, which may fail or hang."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from tests.sweep.building import IMPLEMENTATIONS, has_experts
from tests.sweep.measuring import Row, measured
from tests.sweep.tasks import TASKS


class Work(NamedTuple):
    """A row that is to be made; the task by its key."""

    task: str
    model_type: str
    name: str
    experts: str | None


def works(task: str, names: list[str]) -> Iterator[Work]:
    """The rows of a task, or of some classes of it."""
    for model_type, name in TASKS[task].classes():
        if not names or name in names:
            for experts in IMPLEMENTATIONS if has_experts(name) else (None,):
                yield Work(task, model_type, name, experts)


def _child(work: Work, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        answer.send(measured(TASKS[work.task], *work[1:]))
    except Exception as error:
        answer.send(Row(work.name, work.experts or "", "error", f"{type(error).__name__}: {error}"))


def run(left: list[Work], jobs: int, timeout: float) -> Iterator[tuple[Work, Row]]:
    """The rows, as they come."""
    context = multiprocessing.get_context("fork")
    running: list[tuple[Any, Connection, float, Work]] = []
    while left or running:
        while left and len(running) < jobs:
            work = left.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours, time.monotonic(), work))
        time.sleep(0.05)
        for one in list(running):
            process, answer, start, work = one
            row = None
            if answer.poll():
                try:
                    row = answer.recv()
                except EOFError:
                    row = Row(work.name, work.experts or "", "error", f"the process ended with {process.exitcode}")
            elif time.monotonic() - start > timeout:
                row = Row(work.name, work.experts or "", "error", f"took more than {timeout:.0f} s")
            if row is not None:
                process.kill()
                process.join()
                running.remove(one)
                yield work, row
