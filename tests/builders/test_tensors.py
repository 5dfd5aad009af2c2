"""Tensors read in slices equal the tensors in the file; a damaged file is refused before or while it is read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from builders.tensors import concat_rows, map_rows, read_tensors, row_chunks, transpose
from python_backends.errors import BuildError
from tests.builders.checkpoint_files import DTYPES


@pytest.fixture(scope="module")
def values() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((37, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, values: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    save_file({name: values.astype(dtype) for name, dtype in DTYPES.items()}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(ends=st.tuples(st.integers(0, 37), st.integers(0, 37)).map(sorted))
def test_any_rows_of_any_element_type_are_the_files_values(
    file: Path, values: Any, dtype: str, ends: list[int]
) -> None:
    start, stop = ends
    rows = read_tensors(file)[dtype].read(start, stop)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, values.astype(DTYPES[dtype])[start:stop].astype(np.float32))


@settings(deadline=None)
@given(ends=st.tuples(st.integers(0, 111), st.integers(0, 111)).map(sorted))
def test_joined_tensors_read_as_one(file: Path, values: Any, ends: list[int]) -> None:
    start, stop = ends
    tensors = read_tensors(file)
    parts = [tensors[name] for name in DTYPES]
    joined = concat_rows(parts)
    assert joined.shape == (111, 5)
    whole = np.concatenate([values.astype(dtype).astype(np.float32) for dtype in DTYPES.values()])
    np.testing.assert_array_equal(joined.read(start, stop), whole[start:stop])


def test_joining_different_widths_is_refused(file: Path) -> None:
    tensor = read_tensors(file)["F32"]
    with pytest.raises(BuildError, match="cannot be joined by rows"):
        concat_rows([tensor, map_rows(tensor, lambda rows: rows[:, :3], (3,))])


def test_mapped_and_transposed_tensors_read_like_arrays(file: Path, values: Any) -> None:
    tensor = read_tensors(file)["F32"]
    np.testing.assert_array_equal(map_rows(tensor, lambda rows: rows + 1).read(3, 9), values[3:9] + 1)
    turned = transpose(tensor)
    assert turned.shape == (5, 37)
    np.testing.assert_array_equal(turned.read(1, 4), values.T[1:4])
    assert turned.read().flags.c_contiguous


def test_row_chunks_cover_a_tensor_once_within_the_limit(file: Path) -> None:
    tensor = read_tensors(file)["F32"]
    chunks = list(row_chunks(tensor, chunk_bytes=100))
    assert chunks[0][0] == 0
    assert chunks[-1][1] == 37
    assert all(before[1] == after[0] for before, after in itertools.pairwise(chunks))
    assert max(stop - start for start, stop in chunks) * 5 * 4 <= 100


def test_reads_report_their_bytes(file: Path) -> None:
    seen: list[int] = []
    read_tensors(file, seen.append)["BF16"].read(2, 12)
    assert seen == [10 * 5 * 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    array = np.ones((4, 4), DTYPES[dtype])
    array[2, 1] = value
    save_file({"w": array}, tmp_path / "w.safetensors")
    tensor = read_tensors(tmp_path / "w.safetensors")["w"]
    tensor.read(0, 2)
    with pytest.raises(BuildError, match="holds NaN or infinity"):
        tensor.read(2, 3)


def _header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "is not a safetensors file"),
    "text": (b"<!doctype html><html>", "is not a safetensors file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "cut in the header": (_header({"w": ENTRY})[:20], "is truncated"),
    "cut in the data": (_header({"w": ENTRY}, bytes(7)), "is truncated"),
    "not JSON": ((4).to_bytes(8, "little") + b"{{{{", "malformed safetensors header"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "malformed safetensors header"),
    "no shape": (_header({"w": {"dtype": "F32"}}), "malformed entry for tensor 'w'"),
    "offsets and shape disagree": (_header({"w": {**ENTRY, "shape": [1]}}, bytes(8)), "has 8 bytes, its shape 4"),
    "float8": (_header({"w": {**ENTRY, "dtype": "F8_E4M3"}}, bytes(8)), "element type F8_E4M3"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_from_their_header(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BuildError, match=message):
        read_tensors(path)


def test_a_file_cut_after_it_was_opened_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_header({"w": ENTRY}, bytes(8)))
    tensor = read_tensors(path)["w"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BuildError, match="is truncated: it ends at byte"):
        tensor.read()


@settings(deadline=None)
@given(junk=st.binary(max_size=200))
def test_no_bytes_make_reading_fail_in_another_way(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("junk") / "model.safetensors"
    path.write_bytes(junk)
    with pytest.raises(BuildError):
        read_tensors(path)
