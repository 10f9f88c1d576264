"""Kernels by name, and threads; both are put back afterwards."""

import pytest
import torch

from packings import KERNELS
from secateur.runtime import kernels


@pytest.fixture(params=KERNELS)
def kernel(request):
    """The name of the kernels in use; the best are again in use afterwards."""
    if kernels.use(request.param) is None:
        pytest.skip(f"no {request.param} kernels here")
    yield request.param
    kernels.use(None)


@pytest.fixture
def threads():
    """``threads(number)`` sets torch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
