"""The demo model: Gemma-3's architecture at a few million parameters, and its checkpoint in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

IMAGE_SIZE = 96
PATCH_SIZE = 8
MM_TOKENS_PER_IMAGE = 36
VOCAB_SIZE = 1024
PAD, EOS, BOS = 0, 1, 2
START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE = 5, 6, 7, 8
IMAGE_SOFT_TOKEN = VOCAB_SIZE - 1

TEXT_CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "final_logit_softcapping": None,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 8192,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "query_pre_attn_scalar": 32,
    "rms_norm_eps": 1e-06,
    # transformers 4 reads these three, transformers 5 the dictionary below.
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 48,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

VISION_CONFIG: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "image_size": IMAGE_SIZE,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-06,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 4,
    "patch_size": PATCH_SIZE,
    "vision_use_head": False,
}

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": START_OF_IMAGE,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "eoi_token_index": END_OF_IMAGE,
    "eos_token_id": [EOS, END_OF_TURN],
    "image_token_index": IMAGE_SOFT_TOKEN,
    "initializer_range": 0.02,
    "mm_tokens_per_image": MM_TOKENS_PER_IMAGE,
    "model_type": "gemma3",
    "pad_token_id": PAD,
    "text_config": TEXT_CONFIG,
    "tie_word_embeddings": True,
    "vision_config": VISION_CONFIG,
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": BOS,
    "do_sample": False,
    "eos_token_id": [EOS, END_OF_TURN],
    "pad_token_id": PAD,
}


def _layer_types(text: dict[str, Any]) -> list[str]:
    period = int(text["sliding_window_pattern"])
    count = int(text["num_hidden_layers"])
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(count)]


def checkpoint_config(**overrides: Any) -> dict[str, Any]:
    """The content of config.json; ``overrides`` replace single entries of its text part (``num_hidden_layers=2`` …)."""
    text = {**TEXT_CONFIG, **overrides}
    text["layer_types"] = _layer_types(text)
    return {**CONFIG, "text_config": dict(sorted(text.items()))}


def create_model(seed: int = 0, **overrides: Any) -> Gemma3ForConditionalGeneration:
    """An untrained float32 model. The projector, zero in transformers' own initialisation, starts random here."""
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(Gemma3Config(**checkpoint_config(**overrides))).float()
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        projector.mm_input_projection_weight.normal_(std=projector.mm_input_projection_weight.shape[0] ** -0.5)
    return model


def published_name(name: str) -> str | None:
    """The name of parameter ``name`` in published Gemma-3 checkpoints; ``None`` for the tied head."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return None
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.").removeprefix("model.")
    if name.startswith("vision_tower."):
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    return name


def write_weights(model: Gemma3ForConditionalGeneration, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        published = published_name(name)
        if published is not None:
            tensors[published] = value.detach().to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config
    overrides = {key: getattr(text, key) for key in TEXT_CONFIG if "rope" not in key and hasattr(text, key)}
    config = checkpoint_config(**overrides)
    for name, content in (("config.json", config), ("generation_config.json", GENERATION_CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
