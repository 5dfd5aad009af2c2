"""Small random checkpoints of every Gemma-3 size, made by transformers, and their configurations.

Structure and ratios are those of the published models; widths, depths and windows are shrunk, so that ordinary
prompts are far longer than the window. Weights are random but useful: norms have random weights (a forgotten ``1 +``
shows), and logits are peaked without being ties.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from builders.random_checkpoint import shape_config

VOCAB = 512
PAD, EOS, BOS = 0, 1, 2
IMAGE, BOI, EOI = 509, 510, 511
FIRST_TEXT = 4
"""Ids from here to IMAGE − 1 are ordinary text."""


@dataclass(frozen=True)
class Family:
    """One published size, shrunk."""

    text: dict[str, Any]
    vision: dict[str, Any] | None = None
    tokens_per_image: int = 0


def _text(**sizes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "attn_implementation": "eager",
        **sizes,
    }


_SCALED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
# Width 4304 of the published towers is no multiple of 32 either.
_VISION = {"image_size": 32, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES = {
    # 18 layers of 640, 4 heads over 1, head_dim 256
    "270m": Family(
        _text(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=16,
        )
    ),
    # 26 layers of 1152, 4 heads over 1, head_dim 256: ends two layers into the pattern
    "1b": Family(
        _text(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=8,
        )
    ),
    # 34 layers of 2560, 8 heads over 4, head_dim 256
    "4b": Family(
        _text(
            hidden_size=160,
            intermediate_size=640,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=24,
            **_SCALED,
        ),
        {**_VISION, "intermediate_size": 108},
        16,
    ),
    # 48 layers of 3840, 16 heads over 8, head_dim 256; here the window is shorter than an image
    "12b": Family(
        _text(
            hidden_size=240,
            intermediate_size=480,
            num_hidden_layers=6,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=12,
            **_SCALED,
        ),
        {**_VISION, "intermediate_size": 108},
        16,
    ),
    # 62 layers of 5376, 32 heads over 16, head_dim 128, scores scaled by hidden / heads
    "27b": Family(
        _text(
            hidden_size=336,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=16,
            query_pre_attn_scalar=21,
            sliding_window=16,
            **_SCALED,
        ),
        {**_VISION, "intermediate_size": 108, "image_size": 48},
        9,
    ),
}
TEXT_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.vision is None)
IMAGE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.vision is not None)


def make_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of that family, in evaluation mode."""
    text = Gemma3TextConfig(**family.text)
    if family.vision is None:
        model: PreTrainedModel = Gemma3ForCausalLM(text)
    else:
        config = Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**family.vision, vision_use_head=False),
            mm_tokens_per_image=family.tokens_per_image,
            image_token_index=IMAGE,
            boi_token_index=BOI,
            eoi_token_index=EOI,
            attn_implementation="eager",
        )
        model = Gemma3ForConditionalGeneration(config)
    _randomize(model, np.random.default_rng(seed))
    return model.eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel, rng: np.random.Generator) -> None:
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("embed_tokens.weight"):
            # Small beside what the layers add: a tied head would otherwise repeat the last token for ever.
            values = 0.1 * rng.standard_normal(shape) / np.sqrt(shape[1])
            values[[PAD, IMAGE]] = 0  # never answered
        elif "norm" in name and name.endswith("weight"):
            centre = 0.0 if "vision" not in name or "soft_emb" in name else 1.0
            values = centre + rng.uniform(-0.5, 0.5, shape)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                values += 0.5  # sharper attention
            if name.endswith(("language_model.norm.weight", "model.norm.weight")):
                values += 30.0  # peaked logits
        elif name.endswith("bias"):
            values = rng.normal(0, 0.1, shape)
        elif name.endswith("position_embedding.weight"):
            values = rng.normal(0, 0.5, shape)
        elif name.endswith("mm_input_projection_weight"):
            values = rng.standard_normal(shape) / np.sqrt(shape[0])
        else:
            values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))


@functools.cache
def scratch() -> Path:
    """A folder that lasts as long as the process, for what tests make once."""
    root = Path(tempfile.mkdtemp(prefix="wicore-checkpoints-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def tiny(name: str, seed: int = 0) -> Path:
    """Folder of the random checkpoint of family ``name`` (a key of FAMILIES); made once per process."""
    folder = scratch() / f"{name}-{seed}"
    make_model(FAMILIES[name], seed).save_pretrained(folder)
    return folder


def small_multimodal() -> dict[str, Any]:
    """The published 4B's config.json with two layers, small widths, and queries scaled by something of their own."""
    config = shape_config("4b", 2)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 1024, "head_dim": 32}
    text = {**config["text_config"], **sizes, "sliding_window": 32, "query_pre_attn_scalar": 20}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {**config["vision_config"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    ids = {"boi_token_index": 1021, "eoi_token_index": 1022, "image_token_index": 1023}
    return {**config, **ids, "text_config": text, "vision_config": vision}


DEMO = Path(__file__).resolve().parents[1] / "builders" / "demo" / "checkpoint"
"""The trained checkpoint that the project ships."""

NAMES = (*FAMILIES, *(["demo"] if (DEMO / "model.safetensors").exists() else []))
IMAGE_NAMES = (*IMAGE_FAMILIES, *NAMES[len(FAMILIES) :])


def checkpoint(name: str) -> Path:
    """Folder of the shipped checkpoint ("demo") or of a random one (a key of FAMILIES)."""
    return DEMO if name == "demo" else tiny(name)
