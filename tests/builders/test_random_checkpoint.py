"""Random checkpoints have the published shapes and a tokenizer that the whole path can use."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from builders.build import Options, build
from builders.checkpoint import expected_shapes, open_checkpoint
from builders.model_config import read_model_config
from builders.quantize import Precision
from builders.random_checkpoint import (
    SHAPES,
    WORDS_FROM,
    make_checkpoint,
    shape_config,
    write_random_checkpoint,
    write_random_tokenizer,
)
from python_backends.errors import BuildError
from python_backends.pixels import ImageLimits
from python_backends.prompt import ImageTokens, PromptTokenizer
from tests.builders.checkpoint_files import write_json
from tests.checkpoints import small_multimodal

LIMITS = ImageLimits(2**20, 2**20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    make_checkpoint(folder, "tiny")
    return folder


def test_every_tensor_is_there_and_no_two_rows_of_the_embedding_are_alike(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert set(checkpoint.tensors) == set(expected_shapes(checkpoint.config))
    embedding = checkpoint.tensor("embed_tokens.weight").read()
    assert len(np.unique(embedding, axis=0)) == len(embedding)
    assert 0.019 < float(embedding.std()) < 0.021


@pytest.mark.parametrize("shape", ["tiny", "multimodal"])
def test_transformers_finds_every_weight_under_its_published_name(shape: str, tiny: Path, tmp_path: Path) -> None:
    folder, model = tiny, Gemma3ForCausalLM
    if shape == "multimodal":
        folder, model = tmp_path / "multimodal", Gemma3ForConditionalGeneration
        write_random_checkpoint(folder, small_multimodal())
    loaded, report = model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    ours = open_checkpoint(folder).tensor("embed_tokens.weight").read()
    assert np.array_equal(loaded.get_input_embeddings().weight.detach().numpy(), ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_shape_keeps_its_first_layers(shape: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", shape_config(shape))
    whole = read_model_config(tmp_path)
    write_json(tmp_path / "config.json", shape_config(shape, 3))
    cut = read_model_config(tmp_path)
    assert cut.text.layer_types == whole.text.layer_types[:3]
    assert cut.text.hidden_size == whole.text.hidden_size
    assert cut.vision == whole.vision


@pytest.mark.parametrize(("shape", "layers"), [("2b", None), ("tiny", 0), ("tiny", 7), ("27b", 63)])
def test_shapes_and_layers_that_are_not_there_are_refused(shape: str, layers: int | None) -> None:
    with pytest.raises(BuildError):
        shape_config(shape, layers)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    with pytest.raises(BuildError, match="exists"):
        make_checkpoint(tmp_path, "tiny")
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "kept"


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(tiny: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids = tokenizer.encode(text.replace("▁", ""), add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", "")
    assert all(token < 4096 for token in ids)


def test_a_word_of_the_vocabulary_is_one_token(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    words = [tokenizer.id_to_token(token)[1:] for token in range(WORDS_FROM, WORDS_FROM + 300)]
    ids = tokenizer.encode(" " + " ".join(words), add_special_tokens=False).ids
    assert ids == list(range(WORDS_FROM, WORDS_FROM + 300))


def test_pictures_have_their_tokens_where_the_published_models_have_them(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", shape_config("4b", 1))
    write_random_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wanted = {"<bos>": 2, "<start_of_turn>": 105, "<start_of_image>": 255_999, "<image_soft_token>": 262_144}
    assert {token: tokenizer.token_to_id(token) for token in wanted} == wanted
    assert tokenizer.get_vocab_size() == 262_145
    prompt = PromptTokenizer(
        tmp_path,
        vocab_size=262_208,
        max_context_length=8192,
        images=ImageTokens(tokens_per_image=256, pan_and_scan=None, limits=LIMITS, max_images=4),
    )
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    found = prompt(
        [], [b'[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]'], [buffer.getvalue()]
    )
    assert (found.input_ids == 262_144).sum() == 256


def test_a_cut_without_a_layer_that_sees_everything_is_refused_by_the_build(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "cut", "tiny", 5)
    with pytest.raises(BuildError, match="keep at least the first six"):
        build(tmp_path / "cut", tmp_path / "repository", Options(Precision("int8")))
