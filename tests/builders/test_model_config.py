"""config.json: the published files and what transformers writes are understood; anything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, Gemma3TextConfig

from builders.model_config import ModelConfig, TextConfig, VisionConfig, read_model_config
from builders.published_configs import PUBLISHED
from python_backends.errors import BuildError
from tests.builders.checkpoint_files import write_json


def _read(folder: Path, values: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    write_json(folder / "config.json", values)
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    return read_model_config(folder)


# vocab, hidden, layers, intermediate, heads, kv heads, head_dim, window, factor, scalar, context, eos
SIZES = {
    "270m": (262144, 640, 18, 2048, 4, 1, 256, 512, 1.0, 256.0, 32768, (1,)),
    "1b": (262144, 1152, 26, 6912, 4, 1, 256, 512, 1.0, 256.0, 32768, (1, 106)),
    "4b": (262208, 2560, 34, 10240, 8, 4, 256, 1024, 8.0, 256.0, 131072, (1, 106)),
    "12b": (262208, 3840, 48, 15360, 16, 8, 256, 1024, 8.0, 256.0, 131072, (1, 106)),
    "27b": (262208, 5376, 62, 21504, 32, 16, 128, 1024, 8.0, 168.0, 131072, (1, 106)),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configs_give_every_number_including_those_they_leave_out(tmp_path: Path, family: str) -> None:
    config = _read(tmp_path, PUBLISHED[family])
    vocab, hidden, layers, wide, heads, kv_heads, head_dim, window, factor, scalar, context, eos = SIZES[family]
    assert config.text == TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        intermediate_size=wide,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=window,
        layer_types=tuple("global" if layer % 6 == 5 else "local" for layer in range(layers)),
        rope_theta_global=1e6,
        rope_theta_local=1e4,
        rope_scaling_factor=factor,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=scalar,
        max_context_length=context,
        tie_embeddings=True,
        eos_token_ids=eos,
        bos_token_id=2,
        pad_token_id=0,
    )
    if family in {"270m", "1b"}:
        assert config.vision is None
        assert config.image_token_id is None
        return
    assert config.vision == VisionConfig(896, 14, 1152, 27, 16, 4304, 1e-6, 256)
    assert (config.vision.patches_per_side, config.vision.pool_size) == (64, 4)
    assert (config.image_token_id, config.boi_token_id, config.eoi_token_id) == (262144, 255999, 256000)


@pytest.mark.parametrize("family", PUBLISHED)
def test_configs_saved_again_by_this_transformers_mean_the_same(tmp_path: Path, family: str) -> None:
    values = PUBLISHED[family]
    kind = Gemma3Config if values["model_type"] == "gemma3" else Gemma3TextConfig
    kind(**values).save_pretrained(tmp_path)
    saved = read_model_config(tmp_path)
    assert saved == _read(tmp_path, values)


def test_generation_config_decides_which_tokens_end_an_answer(tmp_path: Path) -> None:
    assert _read(tmp_path, PUBLISHED["270m"], {"eos_token_id": [1, 106]}).text.eos_token_ids == (1, 106)
    assert _read(tmp_path, PUBLISHED["4b"], {"do_sample": True}).text.eos_token_ids == (1, 106)
    assert _read(tmp_path, PUBLISHED["4b"], {"eos_token_id": 7}).text.eos_token_ids == (7,)


def _with(path: str, value: object) -> dict[str, Any]:
    values = {**PUBLISHED["4b"], "text_config": dict(PUBLISHED["4b"]["text_config"])}
    values["vision_config"] = dict(values["vision_config"])
    *outer, key = path.split(".")
    inner = values
    for name in outer:
        inner = inner[name]
    inner[key] = value
    return values


REFUSED = {
    "model_type": ("gemma2", "type 'gemma2'"),
    "architectures": (["Gemma3ForSequenceClassification"], "Gemma3ForSequenceClassification"),
    "quantization_config": ({"quant_method": "bitsandbytes"}, "already quantized"),
    "image_token_index": (262208, "not below vocab_size"),
    "mm_tokens_per_image": (255, "mm_tokens_per_image 255"),
    "text_config.attn_logit_softcapping": (50.0, "attn_logit_softcapping = 50.0"),
    "text_config.final_logit_softcapping": (30.0, "final_logit_softcapping = 30.0"),
    "text_config.attention_bias": (True, "attention_bias = True"),
    "text_config.use_bidirectional_attention": (True, "use_bidirectional_attention = True"),
    "text_config.hidden_activation": ("silu", "hidden_activation = 'silu'"),
    "text_config.num_key_value_heads": (3, "not a multiple of num_key_value_heads 3"),
    "text_config.num_hidden_layers": (0, "num_hidden_layers must be a positive integer, not 0"),
    "text_config.layer_types": (["chunked_attention"] * 34, "each sliding_attention or full_attention"),
    "text_config.rope_scaling": ({"rope_type": "yarn", "factor": 8.0}, "supported are rope_type 'default'"),
    "text_config.sliding_window": (None, "sliding_window must be a positive integer, not None"),
    "text_config.head_dim": (33, "requires an even rotary dimension"),
    "text_config.hidden_size": ("wide", "not a valid Gemma-3 configuration"),
    "vision_config.patch_size": (13, "cannot be pooled evenly"),
    "vision_config.hidden_act": ("relu", "must be siglip_vision_model"),
    "vision_config.num_attention_heads": (7, "not a multiple of its heads"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_builders_do_not_support_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value, message = REFUSED[key]
    with pytest.raises(BuildError, match=message):
        _read(tmp_path, _with(key, value))


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "must hold one JSON object")])
def test_a_damaged_config_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(BuildError, match=message):
        read_model_config(tmp_path)


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no config\.json"):
        read_model_config(tmp_path)
