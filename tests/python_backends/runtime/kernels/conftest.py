import pytest

from python_backends.errors import InternalError
from python_backends.runtime.kernels import cpu
from python_backends.runtime.kernels.compile import library


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """The library, where this machine can have one."""
    variant = cpu.variant()
    if variant is None:
        pytest.skip(f"the CPU lacks {', '.join(cpu.missing())}")
    try:
        return library(variant)
    except InternalError as error:
        pytest.skip(error.message)
