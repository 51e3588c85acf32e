"""The benchmark's memory trace is right, and it runs as its users run it; no times are compared."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce
from torch.profiler import ProfilerActivity, profile

from opacus_fgc.planner import MEMORY
from tests.distributed_cases import needs_fsdp
from tests.ranks import ranks
from tests.scripts import run_here

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")

import distributed
import head
from communication import Communication
from measure import BASELINE, WAYS, Figures, make_step, peak_memory
from report import read, tables
from scaling import Batch, sent
from workloads import MAIN, SWEEPS, WORKLOADS, Transformer, Workload, gpt2, tokens

CPU = torch.device("cpu")
MIB = 2**20
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "step.py"
DISTRIBUTED = BENCHMARK.with_name("distributed.py")


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


def test_peak_of_a_later_step():
    kept = []

    def step():
        if not kept:
            block(8)  # the first step alone
        kept.append(block(1))
        return block(2)

    # What the four before it kept is held as well.
    assert peak_memory(step, CPU, early=4) == 7 * MIB


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_in_chunks_takes_less_than_half(tied, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(MEMORY, "temporary", 2**16)
    sizes = argparse.Namespace(vocabulary=2048, length=64, batch=2, width=16, depth=1, tied=tied)
    peaks = {
        loss: [peak_memory(head.make_step(loss, way, sizes), CPU) for way in head.WAYS]
        for loss in ("logits", "ChunkedCausalLMLoss")
    }
    print({loss: [round(peak / peaks["logits"][0], 2) for peak in of_ways] for loss, of_ways in peaks.items()})
    assert max(peaks["ChunkedCausalLMLoss"]) < peaks["logits"][0] / 2
    assert min(peaks["logits"]) == peaks["logits"][0]


def test_sweeps_are_named_as_in_the_main_table():
    assert "text classifier, T=128" in MAIN
    assert set(WORKLOADS) - set(MAIN) == {name for sweep in SWEEPS for name in sweep.names().values()} - set(MAIN)
    lengths = next(sweep for sweep in SWEEPS if sweep.axis == "T")
    assert all(size * workload.batch == 2048 for size, workload in lengths.points.items())


def figures(*ratios):
    row = dict(zip(WAYS, ratios, strict=True))
    return Figures(batch=1, time=row, memory=row, later=row, step_ms=1.0, step_mib=1.0, stops={})


def test_means():
    text = tables({"MLP": figures(8.0, 2.0, 2.0, 1.0), "LoRA": figures(2.0, None, 8.0, 4.0)})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines.count(["LoRA", "2.00", "stops", "8.00", "4.00"]) == 3
    assert lines.count(["geometric mean", "4.00", "2.00", "4.00", "2.00"]) == 3
    assert lines.count(["geometric mean where all run", "8.00", "2.00", "2.00", "1.00"]) == 3
    assert lines.count(["worst", "8.00", "2.00", "8.00", "4.00"]) == 3
    assert "ghost_bk is 2.00 times as fast as opacus ghost" in text


def test_tables_are_read_as_they_were_written():
    results = {"MLP": figures(8.0, 2.0, 2.0, 1.0), "LoRA": figures(2.0, None, 8.0, 4.0)}
    found = read(f"Some text\n\n{tables(results)}\n\n| another | table |\n")
    assert {name: (one.time, one.memory, one.later) for name, one in found.items()} == {
        name: (one.time, one.memory, one.later) for name, one in results.items()
    }
    assert read("| MLP | 1.00 | 1.00 | 1.00 | 1.00 |") == {}


def test_draw(tmp_path):
    page, picture = tmp_path / "page.md", tmp_path / "page.png"
    page.write_text(tables({"MLP": figures(8.0, 2.0, 2.0, 1.0)}))
    draw = BENCHMARK.with_name("draw.py")
    assert run_here(draw, page, picture).returncode == 0
    assert picture.stat().st_size > 0
    page.write_text("nothing")
    run = run_here(draw, page, picture)
    assert run.returncode == 2
    assert "none of the tables" in run.stderr


@pytest.mark.slow
def test_step(tmp_path):
    report, picture = tmp_path / "step.json", tmp_path / "step.png"
    names = ["MLP, B=1", "MLP, B=4"]
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--seconds", "0.1", "--json", report, "--plot", picture]
    run = subprocess.run([*command, "--only", "MLP, B=[14]"], capture_output=True, text=True, check=True)
    assert "| time of a step, MLP by B " in run.stdout
    assert "| peak memory of the first step, MLP by B " in run.stdout
    written = json.loads(report.read_text())
    assert set(written["versions"]) == {"opacus_fgc", "opacus", "torch", "Python"}
    assert set(written["machine"]) == {"platform", "processor", "threads", "device"}
    assert written["seconds"] == 0.1
    assert list(written["workloads"]) == names
    for workload in written["workloads"].values():
        assert workload["stops"] == {}
        assert workload["step_ms"] > 0
        for quantity in "time", "memory", "later":
            assert list(workload[quantity]) == WAYS
            assert all(ratio > 0 for ratio in workload[quantity].values())
    assert picture.stat().st_size > 0


def test_step_refuses_names_that_match_nothing():
    run = run_here(BENCHMARK, "--only", "MPL")
    assert run.returncode == 2
    assert "'MPL' matches none of: MLP; " in run.stderr


def known_collectives():
    pair = dist.new_group([0, 1])
    whole, part = torch.ones(1000, dtype=torch.float32), torch.ones(250, dtype=torch.float32)
    with Communication() as communication:
        dist.all_reduce(whole)
        all_reduce(whole, "sum", dist.group.WORLD).sum()
        dist.all_gather(list(torch.empty(4, 250).unbind()), part.double())
        dist.broadcast(whole, 0)
        dist.barrier()
        if dist.get_rank() < 2:
            dist.all_reduce(whole, group=pair)
    return communication.sent


@pytest.mark.slow
def test_bytes_of_known_collectives():
    """Four ranks: 1000 numbers of 4 bytes; 250 of 8 bytes; and 1000 once more among two of them."""
    with ranks(4) as group:
        counts = group(known_collectives)
    for rank, sizes in enumerate(counts):
        assert sizes["c10d::allreduce_"] == 2 * 3 / 4 * 4000 + (2 * 1 / 2 * 4000 if rank < 2 else 0)
        assert sizes["_c10d_functional::all_reduce"] == 2 * 3 / 4 * 4000
        assert sizes["c10d::allgather_"] == 3 * 2000
        assert sizes["c10d::broadcast_"] == 3 / 4 * 4000
        assert sum(sizes.values()) == sum(size for name, size in sizes.items() if name != "c10d::barrier")


SMALL = Workload(lambda: Transformer(64, 8, width=32, depth=3), tokens(8, 64), tokens(8, 64), 8)


def compare(name):
    """What is counted, what the profiler sees, and what the formulas say."""
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        shape = SMALL.model()
    found = []
    for way in [BASELINE, *distributed.MODES]:
        step = distributed.make_step(SMALL, name, way, CPU)
        step()
        step()
        counted = distributed.count(step)
        step()  # the fourth, which has certificates
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step()
        seen = sum(event.name.startswith("c10d::") for event in trace.events())
        expected = sent(shape, distributed.LAYOUTS[name].mesh(dist.get_world_size()), way, Batch(8, 8))
        found.append((sum(counted.calls.values()), seen, sum(counted.sent.values()), expected))
    return found


@pytest.mark.slow
@needs_fsdp
@pytest.mark.parametrize("name", list(distributed.LAYOUTS))
def test_formulas_say_what_is_sent(name):
    with ranks(4) as group:
        for found in group(compare, name):
            for calls, seen, size, expected in found:
                assert calls == seen
                assert calls == pytest.approx(expected.calls, rel=0.1)  # what "ghost" keeps is up to the planner
                assert size == pytest.approx(expected.size, rel=0.01)


@pytest.mark.slow
@needs_fsdp
def test_distributed(tmp_path):
    report = tmp_path / "distributed.json"
    command = [sys.executable, DISTRIBUTED, "--seconds", "0.1", "--json", report, "--only", "ddp"]
    run = subprocess.run([*command, "--workload", "text classifier, T=32"], capture_output=True, text=True, check=True)
    assert "| time of a step " in run.stdout
    (figures,) = json.loads(report.read_text())["layouts"].values()
    assert set(figures["time"]) == {BASELINE, *distributed.MODES}
    for quantity in "time", "sent", "expected", "calls", "peak":
        assert all(value > 0 for value in figures[quantity].values())


def test_distributed_formulas():
    run = run_here(DISTRIBUTED, "--formulas")
    assert run.returncode == 0
    assert "6,714,727,680 parameters" in run.stdout


def test_distributed_refuses_too_few_ranks():
    run = run_here(DISTRIBUTED, "--only", "hsdp")
    assert run.returncode == 2
    assert "hsdp need --ranks 4" in run.stderr
