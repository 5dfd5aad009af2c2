"""Words copied by a kernel: all of them, and nothing behind them."""

from __future__ import annotations

import numpy as np
import pytest

from python_backends.runtime.gpu.interpreter import InterpreterDevice
from python_backends.runtime.gpu.kernels import words


@pytest.mark.parametrize("count", [1, 1000, 1024, 2500])
def test_words_are_copied_and_nothing_else_is_touched(count: int) -> None:
    device = InterpreterDevice()
    source, target = device.allocate("i32", count), device.allocate("i32", count + 8)
    values = np.random.default_rng(0).integers(-(2**31), 2**31 - 1, count, np.int32)
    device.write(source, values)
    device.write(target, np.full(count + 8, 5, np.int32))
    device.launch(words.copy(source, target.view(0, count)))
    np.testing.assert_array_equal(device.read(target), [*values, *[5] * 8])
