"""Everything runs in float64, against the oracle to 1e-10, unless a test says otherwise."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)
