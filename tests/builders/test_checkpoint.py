"""Every checkpoint layout in use opens to the same tensors; incomplete ones are refused by what they lack."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.checkpoint import open_checkpoint
from python_backends.errors import BuildError
from tests.builders.checkpoint_files import DTYPES, edit_json, load_weights, write_weights
from tests.checkpoints import FAMILIES, tiny


def _copy(folder: Path, family: str) -> Path:
    shutil.copytree(tiny(family), folder)
    return folder


def _canonical(name: str) -> str:
    """From the names that the installed transformers writes, which the test below pins."""
    for written, canonical in (
        ("language_model.model.", ""),
        ("model.", ""),
        ("vision_tower.", "vision."),
        ("multi_modal_projector.", "projector."),
    ):
        if name.startswith(written):
            return canonical + name.removeprefix(written)
    raise AssertionError(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_opens_with_every_tensor_as_it_was(family: str) -> None:
    saved = load_weights(tiny(family))
    checkpoint = open_checkpoint(tiny(family))
    assert {_canonical(name) for name in saved} == set(checkpoint.tensors)
    for name, tensor in saved.items():
        np.testing.assert_array_equal(checkpoint.tensor(_canonical(name)).read(), tensor)
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in saved.values())


def _published(name: str) -> str:
    if name.startswith("vision."):
        return "vision_tower.vision_model." + name.removeprefix("vision.")
    if name.startswith("projector."):
        return "multi_modal_projector." + name.removeprefix("projector.")
    return "language_model.model." + name


def _model_prefixed(name: str) -> str:
    name = _published(name)
    return "model." + name.replace("language_model.model.", "language_model.")


LAYOUTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "published multimodal": ("4b", _published),
    "transformers 4.52": ("4b", _model_prefixed),
    "transformers 4.52 without vision_model": ("4b", lambda name: _model_prefixed(name).replace("vision_model.", "")),
    "base model alone": ("4b", lambda name: _model_prefixed(name).removeprefix("model.")),
    "text-only": ("1b", lambda name: "model." + name),
    "text-only base model alone": ("1b", lambda name: name),
    "text-only cut from a multimodal one": ("1b", _published),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_naming_of_the_weights_opens_to_the_same_tensors(tmp_path: Path, layout: str) -> None:
    family, rename = LAYOUTS[layout]
    expected = open_checkpoint(tiny(family))
    folder = _copy(tmp_path / "checkpoint", family)
    write_weights(folder, {rename(_canonical(name)): tensor for name, tensor in load_weights(folder).items()})
    found = open_checkpoint(folder)
    assert set(found.tensors) == set(expected.tensors)
    for name in expected.tensors:
        np.testing.assert_array_equal(found.tensor(name).read(), expected.tensor(name).read())


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_any_element_type_open_like_one_file(tmp_path: Path, dtype: str) -> None:
    folder = _copy(tmp_path / "checkpoint", "4b")
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in load_weights(folder).items()}
    write_weights(folder, tensors, shards=3)
    checkpoint = open_checkpoint(folder)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(_canonical(name)).read(), tensor.astype(np.float32))


def test_siglips_own_head_and_a_head_copied_from_the_embedding_are_left_out(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "checkpoint", "4b")
    tensors = load_weights(folder)
    extra = {"vision_tower.vision_model.head.probe": np.ones((1, 1, 48), np.float32)}
    extra["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].copy()
    write_weights(folder, {**tensors, **extra})
    assert set(open_checkpoint(folder).tensors) == set(open_checkpoint(tiny("4b")).tensors)


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "checkpoint", "1b")
    edit_json(folder / "config.json", lambda values: values.update(tie_word_embeddings=False))
    with pytest.raises(BuildError, match=r"lacks tensors .*: lm_head\.weight;"):
        open_checkpoint(folder)
    tensors = load_weights(folder)
    head = tensors["model.embed_tokens.weight"] * 2
    write_weights(folder, {**tensors, "lm_head.weight": head})
    np.testing.assert_array_equal(open_checkpoint(folder).tensor("lm_head.weight").read(), head)


def test_missing_tensors_are_counted_and_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "checkpoint", "1b")
    tensors = {name: tensor for name, tensor in load_weights(folder).items() if "layers.1.mlp" not in name}
    write_weights(folder, tensors)
    with pytest.raises(BuildError, match=r"layers\.1\.mlp\.gate_proj\.weight, .*; download it again"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", lambda values: values.update(num_hidden_layers=9, layer_types=None))
    with pytest.raises(BuildError, match="and 13 more"):
        open_checkpoint(folder)


def test_weights_of_another_size_are_named_with_both_shapes(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "checkpoint", "1b")
    edit_json(folder / "config.json", lambda values: values.update(intermediate_size=400))
    with pytest.raises(BuildError, match=r"gate_proj\.weight' has shape \[384, 96\], config.json asks for \[400, 96\]"):
        open_checkpoint(folder)


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "checkpoint", "1b")
    tensors = load_weights(folder)
    write_weights(folder, {**tensors, "norm.weight": tensors["model.norm.weight"].copy()})
    with pytest.raises(BuildError, match="are the same weight"):
        open_checkpoint(folder)


def _remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty_index(folder: Path) -> None:
    edit_json(folder / "model.safetensors.index.json", lambda values: values.pop("weight_map"))


def _escaping_index(folder: Path) -> None:
    edit_json(
        folder / "model.safetensors.index.json",
        lambda values: values.update(weight_map={"w": "../elsewhere.safetensors"}),
    )


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (_remove_shard, r"lacks model-00002-of-00002\.safetensors"),
    "truncated": (_cut_shard, "is truncated"),
    "index without map": (_empty_index, "has no weight_map"),
    "index out of the folder": (_escaping_index, "lacks elsewhere.safetensors"),
}


@pytest.mark.parametrize("case", SHARD_DAMAGE)
def test_incomplete_shards_are_refused(tmp_path: Path, case: str) -> None:
    damage, message = SHARD_DAMAGE[case]
    folder = _copy(tmp_path / "checkpoint", "1b")
    write_weights(folder, load_weights(folder), shards=2)
    damage(folder)
    with pytest.raises(BuildError, match=message):
        open_checkpoint(folder)


def test_a_folder_without_weights_says_which_format_is_read(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "checkpoint", "1b")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BuildError, match=r"pytorch_model\.bin is of another format"):
        open_checkpoint(folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is not a folder"):
        open_checkpoint(tmp_path / "nothing")


def test_an_unknown_name_is_an_error_of_the_builder() -> None:
    with pytest.raises(BuildError, match=r"has no tensor 'layers\.99\.norm'"):
        open_checkpoint(tiny("270m")).tensor("layers.99.norm")
