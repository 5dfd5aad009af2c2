"""What keys of the configuration do before a server starts: which repository, which precision, how much of a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest

from builders.build import ONNXRUNTIME, TENSORRT
from builders.cli import default_precision
from client.commands.serve import read_admin_key, read_settings
from python_backends import manifest
from python_backends.config import Config
from python_backends.errors import ConfigError
from tests.paths import DEMO_CHECKPOINT
from tests.python_backends.stage_repository import write_repository


@pytest.mark.effect("model_path")
def test_the_repository_is_named_by_the_configuration_relative_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(tmp_path / "built")
    file = tmp_path / "wicore.json"
    file.write_text(json.dumps({"model_path": "built"}), encoding="utf-8")
    assert read_settings(None, file)[0] == tmp_path / "built"
    assert read_settings(tmp_path / "other", file)[0] == tmp_path / "other"  # an option goes before it
    monkeypatch.setenv("WICORE_MODEL_PATH", str(DEMO_CHECKPOINT))
    with pytest.raises(ConfigError, match=r"no built model repository.*wicore up"):
        read_settings(None, file)


@pytest.mark.effect("trt_precision")
def test_a_build_for_a_gpu_has_the_precision_of_the_configuration(tmp_path: Path) -> None:
    folder = write_repository(tmp_path)
    (folder / "wicore.json").write_text(json.dumps({"trt_precision": "fp8"}), encoding="utf-8")
    assert default_precision(TENSORRT, folder).value == "fp8"
    assert default_precision(ONNXRUNTIME, folder).value == "int8"
    built = json.loads((folder / manifest.MANIFEST_NAME).read_text(encoding="utf-8"))
    text = json.dumps({**built, "runtime": TENSORRT, "precision": "bf16"})
    (folder / manifest.MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trt_precision is fp8.*built in bf16"):
        read_settings(folder, None)


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    """The module that opens a card, importable also where CUDA's bindings are not installed."""
    driver = ModuleType("cuda.bindings.driver")
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"cuda": ModuleType("cuda"), "cuda.bindings": bindings}):
        yield importlib.import_module("python_backends.runtime.gpu.open")


@pytest.mark.effect("gpu_memory_gb", "enable_cuda_graph")
def test_a_device_is_opened_with_its_limits(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is not asked: what it would be told is looked at. On a card: tests/gpu."""

    def card(_: object, *, use_graphs: bool) -> SimpleNamespace:
        return SimpleNamespace(use_graphs=use_graphs, memory_limit=80_000_000_000)

    monkeypatch.setattr(gpu, "CudaDevice", card)
    config = Config(gpu_memory_gb=20.0, enable_cuda_graph=False)
    device = gpu.open_device(tmp_path, config)
    assert not device.use_graphs
    assert gpu.gpu_options(config, device).memory_limit == 20_000_000_000
    whole = gpu.open_device(tmp_path, dataclasses.replace(config, gpu_memory_gb=200.0, enable_cuda_graph=True))
    assert whole.use_graphs
    assert 0.8 * 80e9 < whole.memory_limit < 80e9


def test_the_admin_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from an option, which every user of the machine could read."""
    monkeypatch.delenv("WICORE_ADMIN_KEY", raising=False)
    assert read_admin_key(None) == ""
    monkeypatch.setenv("WICORE_ADMIN_KEY", "from-variable")
    assert read_admin_key(None) == "from-variable"
    file = tmp_path / "key"
    file.write_text("from-file\n", encoding="utf-8")
    assert read_admin_key(file) == "from-file"
    for text, reason in (("", "holds no admin key"), ("two words", "letters, digits"), ("a:b=c", "letters, digits")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=reason):
            read_admin_key(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_admin_key(tmp_path / "none")
