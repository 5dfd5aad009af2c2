"""The manifest round-trips, and every way in which a repository can be unusable says how to mend it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from python_backends import manifest
from python_backends.errors import ArtifactError
from python_backends.manifest import File, ImageShape, Manifest, ModelShape, Stage

SHAPE = ModelShape(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_window=8,
    layer_types=("local", "global"),
    max_context_length=4096,
    eos_token_ids=(1, 106),
    bos_token_id=2,
    pad_token_id=0,
    image=ImageShape(32, 16, 509, 510, 511),
)


def _write(repository: Path, image: ImageShape | None = SHAPE.image) -> Manifest:
    """A repository with two stages of one file each."""
    stages = {}
    for stage, content in (("tokenizer", b"words"), ("decoder", b"weights")):
        folder = repository / stage / "1" / "build"
        folder.mkdir(parents=True)
        path = folder / "file.bin"
        path.write_bytes(content)
        digests = manifest.file_sha256(path), manifest.edges_sha256(path)
        stages[stage] = Stage(f"{stage}/1/build", (File("file.bin", len(content), *digests),))
    written = Manifest(
        format=manifest.FORMAT,
        build_id="build",
        fingerprint="f" * 64,
        source="s" * 64,
        name="tiny",
        precision="int8",
        block_size=32,
        symmetric=True,
        runtime="onnxruntime",
        ranks=1,
        versions={"python": "3.11"},
        model=dataclasses.replace(SHAPE, image=image),
        stages=stages,
        repository=repository,
    )
    (repository / manifest.MANIFEST_NAME).write_text(written.to_json(), encoding="utf-8")
    return written


@pytest.mark.parametrize("image", [SHAPE.image, None])
def test_what_is_written_is_what_is_loaded(tmp_path: Path, image: ImageShape | None) -> None:
    written = _write(tmp_path, image)
    found = manifest.load(tmp_path)
    assert found == written
    assert found.folder("decoder") == tmp_path / "decoder" / "1" / "build"
    assert (found.folder("decoder") / "file.bin").read_bytes() == b"weights"


def test_a_stage_without_files_says_what_the_repository_lacks(tmp_path: Path) -> None:
    _write(tmp_path)
    found = manifest.load(tmp_path, ["vision_encoder"])
    with pytest.raises(ArtifactError, match=r"holds no files for vision_encoder; run `wicore build CHECKPOINT"):
        found.folder("vision_encoder")


def test_an_empty_repository_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"no built model; run `wicore build CHECKPOINT --repository {tmp_path}`"):
        manifest.load(tmp_path)


def test_a_stage_checks_its_own_hashes_and_everyones_sizes(tmp_path: Path) -> None:
    _write(tmp_path)
    path = tmp_path / "decoder" / "1" / "build" / "file.bin"
    path.write_bytes(b"WEIGHTS")
    manifest.load(tmp_path, ["tokenizer"])
    for stages in (None, ["decoder"]):
        with pytest.raises(ArtifactError, match=r"decoder/1/build/file\.bin is corrupt \(its hash differs\); run"):
            manifest.load(tmp_path, stages)
    path.write_bytes(b"weight")
    with pytest.raises(ArtifactError, match=r"file\.bin has 6 bytes instead of 7; run `wicore build"):
        manifest.load(tmp_path, ["tokenizer"])
    path.unlink()
    with pytest.raises(ArtifactError, match=r"file\.bin is missing; run `wicore build"):
        manifest.load(tmp_path, ["tokenizer"])


def _changed(key: str, value: object) -> Callable[[dict[str, Any]], str]:
    def change(values: dict[str, Any]) -> str:
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner[name]
        inner[last] = value
        return json.dumps(values)

    return change


def _without_model(values: dict[str, Any]) -> str:
    del values["model"]
    return json.dumps(values)


CORRUPT: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "not JSON": (lambda values: "{", "cannot be read"),
    "a list": (lambda values: "[]", "has format None, this WiCore reads 1"),
    "another version": (_changed("format", 2), "has format 2, this WiCore reads 1"),
    "a key missing": (_without_model, r"is corrupt \('model'\)"),
    "a number as text": (_changed("model.head_dim", "16"), "'16' is not of type int"),
    "true as a number": (_changed("ranks", True), "True is not of type int"),
    "no list": (_changed("model.layer_types", "local"), "'local' is not of type list"),
    "no object": (_changed("model", 3), "ModelShape is 3"),
    "a path out of the repository": (_changed("stages.decoder.folder", "../elsewhere"), "outside the repository"),
    "no path": (_changed("stages.decoder.folder", "a\0b"), "outside the repository"),
    "an absolute path": (_changed("stages.decoder.folder", "/etc"), "outside the repository"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, case: str) -> None:
    change, message = CORRUPT[case]
    values = json.loads(_write(tmp_path).to_json())
    (tmp_path / manifest.MANIFEST_NAME).write_text(change(values), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message) as caught:
        manifest.load(tmp_path)
    assert "run `wicore build" in caught.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None)
@given(
    key=st.sampled_from([field.name for field in dataclasses.fields(Manifest) if field.name != "repository"]),
    value=JSON,
)
def test_any_value_anywhere_loads_or_is_refused_as_an_artefact(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object
) -> None:
    repository = tmp_path_factory.mktemp("repository")
    values = json.loads(_write(repository).to_json())
    accepted = type(values[key])
    values[key] = value
    (repository / manifest.MANIFEST_NAME).write_text(json.dumps(values), encoding="utf-8")
    try:
        found = manifest.load(repository)
    except ArtifactError:
        return
    assert type(getattr(found, key)) is accepted


def test_of_large_files_both_ends_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FULL_HASH_LIMIT", 4)
    monkeypatch.setattr(manifest, "EDGE", 2)
    found = _write(tmp_path)
    path = tmp_path / "decoder" / "1" / "build" / "file.bin"
    assert found.stages["decoder"].files[0].edges_sha256 == hashlib.sha256(b"wets").hexdigest()
    path.write_bytes(b"we-ghts")
    manifest.load(tmp_path)
    for damaged in (b"-eights", b"weight-"):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="is corrupt"):
            manifest.load(tmp_path)
