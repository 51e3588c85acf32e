"""Scripts that end by themselves at once, run in the process of the tests: a new one takes seconds to import torch."""

from __future__ import annotations

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_here(script: Path, *args: object) -> Ran:
    """Runs a script as ``python script args`` does, but for what is imported already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(script), *map(str, args)])
        patch.syspath_prepend(str(script.parent))
        torch.set_default_dtype(torch.float32)
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ran(code, out.getvalue(), err.getvalue())
