"""The config.json files of the published Gemma-3 checkpoints, in the forms they were released in, and a tiny one."""

from __future__ import annotations

from typing import Any

_TEXT_ONLY: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
_VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
_SPARSE_TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def _multimodal(**text: Any) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {**_SPARSE_TEXT, **text},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": dict(_VISION),
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "270m": {
        **_TEXT_ONLY,
        "_sliding_window_pattern": 6,
        "eos_token_id": 1,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": [("full" if layer % 6 == 5 else "sliding") + "_attention" for layer in range(18)],
        "num_hidden_layers": 18,
        "transformers_version": "4.55.0.dev0",
        "use_bidirectional_attention": False,
    },
    "1b": {
        **_TEXT_ONLY,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
        "transformers_version": "4.50.0.dev0",
    },
    "4b": _multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "12b": _multimodal(
        hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48, num_key_value_heads=8
    ),
    "27b": _multimodal(
        head_dim=128,
        hidden_size=5376,
        intermediate_size=21504,
        num_attention_heads=32,
        num_hidden_layers=62,
        num_key_value_heads=16,
        query_pre_attn_scalar=168,
    ),
}
_OUTSIDE = ("architectures", "eos_token_id", "torch_dtype", "transformers_version", "vocab_size")
"""Keys that a multimodal config has beside its text_config, and the vocabulary, which is larger by the image tokens."""
TINY: dict[str, Any] = {
    **PUBLISHED["1b"],
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "vocab_size": 4096,
}
"""No published shape: everything the 1B has, small enough to build and run in seconds."""
SMALL_MULTIMODAL: dict[str, Any] = {
    **_multimodal(**{key: value for key, value in PUBLISHED["1b"].items() if key not in _OUTSIDE}),
    "vision_config": {
        **_VISION,
        "hidden_size": 192,
        "image_size": 448,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    },
}
"""No published shape: the 1B's text with a small vision tower, for conversations about pictures on a small machine."""
