"""Everything runs in float64, against the oracle to 1e-10, unless a test says otherwise."""

from collections import Counter

import pytest
import torch

from opacus_fgc.planner import MEMORY

# For a GPU that is not there, `torch.manual_seed` keeps its whole stack to be called later, which takes a millisecond each time.
for absent in (torch.cuda, torch.xpu, torch.mtia):
    if not absent.is_available():
        absent.manual_seed_all = lambda seed: None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", type=torch.device, help="where tensors are made, for example cuda; a CPU if left out")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes cases slow of which others of their test say enough in the default run."""
    seen = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.fixture(autouse=True)
def float64(request: pytest.FixtureRequest):
    dtype, device = torch.get_default_dtype(), request.config.getoption("device")
    torch.set_default_dtype(torch.float64)
    if device is not None:
        torch.set_default_device(device)
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def two_passes(monkeypatch: pytest.MonkeyPatch):
    """Mode "ghost" makes two passes; small as the models here are, one would do, which is that of "ghost_bk"."""
    monkeypatch.setattr(MEMORY, "peak", 0)
