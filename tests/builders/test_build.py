"""A build is whole or does not exist: what it writes, when it is skipped, and what interrupts it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import identity, repository
from builders.build import Options, Result, build
from builders.checkpoint import open_checkpoint
from builders.quantize import Precision
from python_backends import contract, manifest
from python_backends.errors import BuildError
from tests.builders.checkpoint_files import complete, edit_json, load_weights, write_json, write_weights

INT8 = Options(Precision("int8"))


def _files(folder: Path) -> dict[str, bytes]:
    """Every file of a repository but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != repository.LOCK_NAME
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return complete(tmp_path / "checkpoint", "4b")


@pytest.fixture
def built(checkpoint: Path, tmp_path: Path) -> Result:
    return build(checkpoint, tmp_path / "repository", INT8)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_a_build_fills_every_stage_and_its_manifest_describes_it(
    checkpoint: Path, tmp_path: Path, precision: Any
) -> None:
    target = tmp_path / "repository"
    result = build(checkpoint, target, Options(Precision(precision), max_context_length=1000))
    found = manifest.load(target)
    assert found == result.manifest
    assert (found.precision, found.runtime, found.ranks, found.name) == (precision, "onnxruntime", 1, "checkpoint")
    assert set(found.stages) == set(contract.STAGES)
    text = open_checkpoint(checkpoint).config.text
    assert found.model.layer_types == text.layer_types
    assert (found.model.num_kv_heads, found.model.head_dim, found.model.vocab_size) == (4, 16, 512)
    assert found.model.max_context_length == 1000
    assert found.model.image == manifest.ImageShape(32, 16, 509, 510, 511)
    assert (found.folder(contract.DECODER) / "decoder.onnx").is_file()
    assert (found.folder(contract.VISION_ENCODER) / "vision_encoder.onnx").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "processor_config.json"):
        assert (found.folder(contract.TOKENIZER) / name).read_bytes() == (checkpoint / name).read_bytes()
    processor = {path.name for path in found.folder(contract.IMAGE_PROCESSOR).iterdir()}
    assert processor == {"preprocessor_config.json", "processor_config.json"}
    for model in contract.MODELS:
        assert (target / model / "config.pbtxt").read_bytes() == (
            repository.TRACKED / model / "config.pbtxt"
        ).read_bytes()


def test_a_text_only_build_has_no_image_stages(tmp_path: Path) -> None:
    found = build(complete(tmp_path / "checkpoint", "1b"), tmp_path / "repository", INT8).manifest
    assert set(found.stages) == {contract.TOKENIZER, contract.DECODER}
    assert found.model.image is None


def test_the_same_build_again_is_up_to_date_at_once(checkpoint: Path, built: Result) -> None:
    assert not built.up_to_date
    before = _files(built.manifest.repository)
    again = build(checkpoint, built.manifest.repository, INT8)
    assert again.up_to_date
    assert again.seconds < 1
    assert again.manifest == built.manifest
    assert _files(built.manifest.repository) == before


def _touch_config(folder: Path) -> None:
    edit_json(folder / "config.json", lambda values: values["text_config"].update(sliding_window=20))


def _change_weight(folder: Path) -> None:
    tensors = load_weights(folder)
    tensors["language_model.model.norm.weight"][0] += 1
    write_weights(folder, tensors)


def _change_tokenizer(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"bos_token": "word9"})


@pytest.mark.parametrize("change", [_touch_config, _change_weight, _change_tokenizer])
def test_a_changed_checkpoint_is_built_again(checkpoint: Path, built: Result, change: Callable[[Path], None]) -> None:
    change(checkpoint)
    assert not build(checkpoint, built.manifest.repository, INT8).up_to_date


def test_large_files_are_identified_without_reading_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "CONTENT_LIMIT", 100_000)
    build(checkpoint, tmp_path / "repository", INT8)
    weights = checkpoint / "model.safetensors"
    status = weights.stat()
    assert status.st_size > 100_000
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert build(checkpoint, tmp_path / "repository", INT8).up_to_date
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not build(checkpoint, tmp_path / "repository", INT8).up_to_date


def test_other_options_are_built_again_and_the_older_build_goes(checkpoint: Path, built: Result) -> None:
    target = built.manifest.repository
    result = build(checkpoint, target, Options(Precision("int8", 64)))
    assert not result.up_to_date
    assert manifest.load(target) == result.manifest
    assert not any(built.manifest.build_id in name for name in _files(target))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _flip])
def test_damaged_artefacts_are_noticed_and_built_again(
    checkpoint: Path, built: Result, damage: Callable[[Path], Any]
) -> None:
    weights = built.manifest.folder(contract.DECODER) / "decoder.weights"
    damage(weights)
    result = build(checkpoint, built.manifest.repository, INT8)
    assert not result.up_to_date
    assert result.manifest.stages[contract.DECODER].files == built.manifest.stages[contract.DECODER].files


def test_force_builds_the_same_again(checkpoint: Path, built: Result) -> None:
    result = build(checkpoint, built.manifest.repository, INT8, force=True)
    assert not result.up_to_date
    assert result.manifest.build_id != built.manifest.build_id
    assert result.manifest.fingerprint == built.manifest.fingerprint


def test_the_fingerprint_is_of_the_weights_whatever_files_hold_them(
    checkpoint: Path, built: Result, tmp_path: Path
) -> None:
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_weights(checkpoint).items()
    }
    write_weights(checkpoint, tensors, shards=3)
    assert build(checkpoint, tmp_path / "other", INT8).manifest.fingerprint == built.manifest.fingerprint
    tensors["language_model.model.norm.weight"][0] += 1
    write_weights(checkpoint, tensors, shards=3)
    assert build(checkpoint, tmp_path / "other", INT8).manifest.fingerprint != built.manifest.fingerprint


def test_literal_files_that_somebody_edited_are_left_alone(checkpoint: Path, built: Result) -> None:
    path = built.manifest.repository / contract.DECODER / "config.pbtxt"
    path.write_text("# edited\n", encoding="utf-8")
    result = build(checkpoint, built.manifest.repository, INT8, force=True)
    assert path.read_text(encoding="utf-8") == "# edited\n"
    assert built.kept_files == ()
    assert result.kept_files == ("decoder/config.pbtxt",)


def test_without_literal_files_to_copy_the_build_says_where_to_run(
    checkpoint: Path, built: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "TRACKED", tmp_path / "nothing")
    assert build(checkpoint, built.manifest.repository, INT8).up_to_date
    with pytest.raises(BuildError, match=r"has no config\.pbtxt .*; install WiCore again"):
        build(checkpoint, tmp_path / "other", INT8)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


def _bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}", encoding="utf-8")


def _no_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def _no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _other_size(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", lambda values: values.update(size={"height": 224, "width": 224}))


def _other_mean(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", lambda values: values.update(image_mean=[0.48, 0.46, 0.41]))


def _other_tokens(folder: Path) -> None:
    edit_json(folder / "processor_config.json", lambda values: values.update(image_seq_length=256))


def _nan(folder: Path) -> None:
    tensors = load_weights(folder)
    tensors["multi_modal_projector.mm_input_projection_weight"][3, 3] = float("nan")
    write_weights(folder, tensors)


FAILURES: dict[Callable[[Path], None], str] = {
    _no_tokenizer: r"has no tokenizer\.json",
    _bad_tokenizer: "is not a tokenizer",
    _bad_template: "cannot be served .*template",
    _no_tokenizer_config: "cannot be served .*tokenizer_config",
    _no_processor: "has no image size",
    _other_size: "the vision tower takes 32 pixels a side",
    _other_mean: "image_mean",
    _other_tokens: "the model makes 16",
    _nan: "holds NaN or infinity",
}


@pytest.mark.parametrize("damage", FAILURES)
def test_a_build_that_fails_leaves_the_previous_one_as_it_was(
    checkpoint: Path, built: Result, damage: Callable[[Path], None]
) -> None:
    before = _files(built.manifest.repository)
    damage(checkpoint)
    with pytest.raises(BuildError, match=FAILURES[damage]):
        build(checkpoint, built.manifest.repository, INT8)
    assert _files(built.manifest.repository) == before


def test_a_context_beyond_the_models_is_refused_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="outside what this model takes, 1 … 4096"):
        build(checkpoint, tmp_path / "repository", Options(Precision("int8"), max_context_length=5000))


def test_a_runtime_that_is_not_offered_says_what_is() -> None:
    with pytest.raises(BuildError, match=r"runtime 'cuda' is not offered; choose one of onnxruntime, tensorrt"):
        Options(Precision("int8"), runtime="cuda")


def test_a_checkpoint_that_changes_during_the_build_is_refused(checkpoint: Path, built: Result) -> None:
    class Changing:
        def begin(self, step: str, num_bytes: int = 0) -> None:
            if step == "decoder":
                _change_tokenizer(checkpoint)

        def read(self, num_bytes: int) -> None:
            pass

    before = _files(built.manifest.repository)
    with pytest.raises(BuildError, match="changed while it was being built"):
        build(checkpoint, built.manifest.repository, INT8, force=True, reporter=Changing())
    assert _files(built.manifest.repository) == before


def test_two_builds_at_once_are_refused(checkpoint: Path, built: Result) -> None:
    target = built.manifest.repository
    with repository.locked(target), pytest.raises(BuildError, match=f"another build \\(process {os.getpid()}\\)"):
        build(checkpoint, target, INT8)
    assert build(checkpoint, target, INT8).up_to_date


def test_folders_that_are_no_builds_are_never_swept(checkpoint: Path, built: Result) -> None:
    keep = built.manifest.repository / contract.DECODER / "1" / "notes"
    keep.mkdir()
    stale = built.manifest.repository / contract.DECODER / "1" / "0123456789ab-01234567"
    stale.mkdir()
    build(checkpoint, built.manifest.repository, INT8)
    assert keep.is_dir()
    assert not stale.exists()


# Builds in a process of their own, stopped where it hurts: when the decoder's weights are written and no manifest is.
CHILD = """
import sys, time
from pathlib import Path
from builders.build import Options, build
from builders.quantize import Precision

class Pausing:
    def begin(self, step, num_bytes=0):
        if step == sys.argv[3]:
            print("there", flush=True)
            time.sleep(60)
    def read(self, num_bytes):
        pass

build(Path(sys.argv[1]), Path(sys.argv[2]), Options(Precision("int8")), force=True, reporter=Pausing())
"""


def _child(checkpoint: Path, target: Path, pause_at: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, checkpoint, target, pause_at],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("step", ["decoder", "vision encoder", "checking"])
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT])
def test_a_build_stopped_at_any_step_leaves_the_previous_one_servable(
    checkpoint: Path, built: Result, step: str, with_signal: signal.Signals
) -> None:
    target = built.manifest.repository
    before = _files(target)
    with _child(checkpoint, target, step) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        child.send_signal(with_signal)
        child.wait(20)
    assert manifest.load(target) == built.manifest
    if with_signal == signal.SIGINT:
        assert _files(target) == before
    # What a kill left is swept by the next run, which needs no build; the lock went with the process.
    assert build(checkpoint, target, INT8).up_to_date
    assert _files(target) == before


def test_a_full_disk_is_named_and_the_previous_build_stays(checkpoint: Path, built: Result) -> None:
    target = built.manifest.repository
    before = _files(target)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with _child(checkpoint, target, "never", preexec_fn=limit) as child:
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "the previous build is intact: free space" in errors
    assert _files(target) == before


def test_a_build_larger_than_the_free_space_is_refused_before_it_starts(
    checkpoint: Path, built: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(BuildError, match=r"0\.0 GB free, this build needs .* GB beside the previous one"):
        build(checkpoint, built.manifest.repository, INT8, force=True)
