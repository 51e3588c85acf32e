"""The benchmark's memory trace is right, and it runs as its users run it; no times are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")

from measure import BASELINE, WAYS, Figures, make_step, peak_memory
from report import tables
from workloads import MAIN, SWEEPS, WORKLOADS, gpt2

CPU = torch.device("cpu")
MIB = 2**20
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "step.py"


def block(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_peak_of_what_is_held_at_once():
    def step():
        a, b = block(8), block(8)
        del a, b
        return block(4)

    assert peak_memory(step, CPU) == 16 * MIB


def test_peak_is_over_the_level_before():
    held = [block(8)]

    def step():
        held.clear()
        held.append(block(4))
        held.append(block(2))

    assert peak_memory(step, CPU) == 6 * MIB
    assert peak_memory(step, CPU) == 6 * MIB  # frees what the trace before saw


def test_peak_of_backward():
    weight = torch.zeros(MIB, dtype=torch.float32, requires_grad=True)

    def step():
        weight.exp().sum().backward()  # the power is kept for its gradient

    assert 8 * MIB <= peak_memory(step, CPU) < 8 * MIB + 1024
    assert weight.grad is not None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", [BASELINE, "ghost", "ghost_bk"])
def test_language_model_of_gpt2s_form(way, autocast):
    torch.set_default_dtype(torch.float32)
    workload = gpt2(length=8, batch=2, width=12, depth=2, heads=3, vocabulary=20)
    step = make_step(workload, way, CPU, autocast)
    step()
    assert peak_memory(step, CPU) > 0


def test_sweeps_are_named_as_in_the_main_table():
    assert "text classifier, T=128" in MAIN
    assert set(WORKLOADS) - set(MAIN) == {name for sweep in SWEEPS for name in sweep.names().values()} - set(MAIN)
    lengths = next(sweep for sweep in SWEEPS if sweep.axis == "T")
    assert all(size * workload.batch == 2048 for size, workload in lengths.points.items())


def figures(*ratios):
    row = dict(zip(WAYS, ratios, strict=True))
    return Figures(batch=1, time=row, memory=row, step_ms=1.0, step_mib=1.0, stops={})


def test_means():
    text = tables({"MLP": figures(8.0, 2.0, 2.0, 1.0), "LoRA": figures(2.0, None, 8.0, 4.0)})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines.count(["LoRA", "2.00", "stops", "8.00", "4.00"]) == 2
    assert lines.count(["geometric mean", "4.00", "2.00", "4.00", "2.00"]) == 2
    assert lines.count(["geometric mean where all run", "8.00", "2.00", "2.00", "1.00"]) == 2
    assert lines.count(["worst", "8.00", "2.00", "8.00", "4.00"]) == 2
    assert "ghost_bk is 2.00 times as fast as opacus ghost" in text


def test_step(tmp_path):
    report, picture = tmp_path / "step.json", tmp_path / "step.png"
    names = ["MLP, B=1", "MLP, B=4"]
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--seconds", "0.1", "--json", report, "--plot", picture]
    run = subprocess.run([*command, "--only", "MLP, B=[14]"], capture_output=True, text=True, check=True)
    assert "| time of a step, MLP by B " in run.stdout
    assert "| peak memory of a step, MLP by B " in run.stdout
    written = json.loads(report.read_text())
    assert set(written["versions"]) == {"opacus_fgc", "opacus", "torch", "Python"}
    assert set(written["machine"]) == {"platform", "processor", "threads", "device"}
    assert written["seconds"] == 0.1
    assert list(written["workloads"]) == names
    for workload in written["workloads"].values():
        assert workload["stops"] == {}
        assert workload["step_ms"] > 0
        for quantity in "time", "memory":
            assert list(workload[quantity]) == WAYS
            assert all(ratio > 0 for ratio in workload[quantity].values())
    assert picture.stat().st_size > 0


def test_step_refuses_names_that_match_nothing():
    run = subprocess.run([sys.executable, BENCHMARK, "--only", "MPL"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "'MPL' matches none of: MLP; " in run.stderr
