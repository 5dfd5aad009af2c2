"""A checkpoint's config.json as the few numbers the builders rely on, every one of them checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from python_backends.errors import BuildError

if TYPE_CHECKING:
    from transformers import Gemma3TextConfig, SiglipVisionConfig

LayerType = Literal["local", "global"]

_LAYER_TYPES: dict[str, LayerType] = {"sliding_attention": "local", "full_attention": "global"}
_ARCHITECTURES = {
    "gemma3": {"Gemma3ForConditionalGeneration", "Gemma3Model"},
    "gemma3_text": {"Gemma3ForCausalLM", "Gemma3TextModel"},
}
_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    """Positions a local layer's query sees, itself included."""
    layer_types: tuple[LayerType, ...]
    rope_theta_global: float
    rope_theta_local: float
    rope_scaling_factor: float
    """Positions of global layers are divided by it; 1.0 where the checkpoint scales nothing."""
    rms_norm_eps: float
    query_pre_attn_scalar: float
    """Attention scores are multiplied by its power −0.5."""
    max_context_length: int
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int
    pad_token_id: int


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP tower and of what the projector makes of an image."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    layer_norm_eps: float
    tokens_per_image: int
    """Embeddings of one image after pooling, a square number."""

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def pool_size(self) -> int:
        """Patches averaged along each side into one token."""
        return self.patches_per_side // math.isqrt(self.tokens_per_image)


@dataclass(frozen=True)
class ModelConfig:
    """A Gemma-3 model; ``vision`` and the image token ids are None in a text-only one."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int | None
    boi_token_id: int | None
    eoi_token_id: int | None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint.

    Raises:
        BuildError: no such file, or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BuildError(
            f"{path.parent} has no {path.name}; pass the folder of a Hugging Face Gemma-3 checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(values, dict):
        raise BuildError(f"{path} must hold one JSON object; download it again")
    return values


def read_model_config(folder: Path) -> ModelConfig:
    """Parse ``config.json`` (published and transformers-5 forms) and ``generation_config.json`` of a checkpoint.

    Defaults come from transformers' own configuration classes, because published files leave out most of what they
    share with them.

    Raises:
        BuildError: not Gemma-3, or an option the builders do not support; the message names key and value.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = _check_architecture(values, path)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Gemma3Config, Gemma3TextConfig

    try:
        parsed = Gemma3Config(**values) if kind == "gemma3" else Gemma3TextConfig(**values)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise BuildError(f"{path} is not a valid Gemma-3 configuration: {reason}") from error
    text = parsed.text_config if kind == "gemma3" else parsed
    tied = bool(parsed.tie_word_embeddings)
    generation = folder / "generation_config.json"
    sources = (read_json(generation) if generation.exists() else {}, values, {"eos_token_id": text.eos_token_id})
    eos = next(found for source in sources if (found := _token_ids(source.get("eos_token_id"))))
    text_config = _text_config(text, tied, eos, path)
    if kind == "gemma3_text":
        return ModelConfig(text_config, None, None, None, None)
    image_token_id = _size(parsed.image_token_index, "image_token_index", path)
    if image_token_id >= text_config.vocab_size:
        raise BuildError(f"{path}: image_token_index {image_token_id} is not below vocab_size {text_config.vocab_size}")
    return ModelConfig(
        text_config,
        _vision_config(parsed.vision_config, parsed.mm_tokens_per_image, path),
        image_token_id,
        _size(parsed.boi_token_index, "boi_token_index", path),
        _size(parsed.eoi_token_index, "eoi_token_index", path),
    )


def _check_architecture(values: dict[str, Any], path: Path) -> str:
    kind = values.get("model_type")
    if kind not in _ARCHITECTURES:
        raise BuildError(
            f"{path} describes a model of type {kind!r}; WiCore builds Gemma-3: 'gemma3' (4B, 12B, 27B) and "
            "'gemma3_text' (270M, 1B)"
        )
    names = values.get("architectures") or []
    if names and not _ARCHITECTURES[kind] & set(names):
        raise BuildError(f"{path} describes {', '.join(names)}; WiCore builds generative Gemma-3 models only")
    if values.get("quantization_config"):
        raise BuildError(
            f"{path} has a quantization_config: these weights are already quantized; "
            "build from the original bfloat16 checkpoint"
        )
    return str(kind)


def _text_config(text: Gemma3TextConfig, tied: bool, eos: tuple[int, ...], path: Path) -> TextConfig:
    for key, wanted in (
        ("hidden_activation", (_ACTIVATION,)),
        ("attention_bias", (False,)),
        ("attn_logit_softcapping", (None,)),
        ("final_logit_softcapping", (None,)),
        ("use_bidirectional_attention", (None, False)),
    ):
        if getattr(text, key) not in wanted:
            raise BuildError(f"{path}: {key} = {getattr(text, key)!r} is not supported; Gemma-3 has {wanted[0]!r}")
    heads, kv_heads = (_size(getattr(text, key), key, path) for key in ("num_attention_heads", "num_key_value_heads"))
    if heads % kv_heads:
        raise BuildError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    layers = _size(text.num_hidden_layers, "num_hidden_layers", path)
    if len(text.layer_types) != layers or not set(text.layer_types) <= set(_LAYER_TYPES):
        raise BuildError(
            f"{path}: layer_types must name {layers} layers, each {' or '.join(_LAYER_TYPES)}; it is {text.layer_types}"
        )
    theta_global, factor = _rope(text.rope_parameters, "full_attention", path)
    theta_local, local_factor = _rope(text.rope_parameters, "sliding_attention", path)
    if local_factor != 1.0:
        raise BuildError(f"{path}: local layers with a RoPE scaling factor of {local_factor} are not supported")
    return TextConfig(
        vocab_size=_size(text.vocab_size, "vocab_size", path),
        hidden_size=_size(text.hidden_size, "hidden_size", path),
        num_layers=layers,
        intermediate_size=_size(text.intermediate_size, "intermediate_size", path),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_size(text.head_dim, "head_dim", path),
        sliding_window=_size(text.sliding_window, "sliding_window", path),
        layer_types=tuple(_LAYER_TYPES[name] for name in text.layer_types),
        rope_theta_global=theta_global,
        rope_theta_local=theta_local,
        rope_scaling_factor=factor,
        rms_norm_eps=float(text.rms_norm_eps),
        query_pre_attn_scalar=float(text.query_pre_attn_scalar),
        max_context_length=_size(text.max_position_embeddings, "max_position_embeddings", path),
        tie_embeddings=tied,
        eos_token_ids=eos,
        bos_token_id=2 if text.bos_token_id is None else int(text.bos_token_id),
        pad_token_id=0 if text.pad_token_id is None else int(text.pad_token_id),
    )


def _rope(parameters: dict[str, dict[str, Any]], layer_type: str, path: Path) -> tuple[float, float]:
    """(theta, linear scaling factor) of one layer type."""
    values = dict(parameters[layer_type])
    kind, theta, factor = values.pop("rope_type", "default"), values.pop("rope_theta"), values.pop("factor", None)
    if values or kind not in {"default", "linear"} or (kind == "linear") != (factor is not None):
        raise BuildError(
            f"{path}: RoPE of {layer_type} is {parameters[layer_type]}; supported are rope_type 'default', "
            "and 'linear' with a factor"
        )
    return float(theta), float(factor or 1.0)


def _vision_config(vision: SiglipVisionConfig, tokens: object, path: Path) -> VisionConfig:
    if vision.model_type != "siglip_vision_model" or vision.hidden_act != _ACTIVATION or vision.num_channels != 3:
        raise BuildError(
            f"{path}: the vision tower must be siglip_vision_model with {_ACTIVATION} and 3 channels; it is "
            f"{vision.model_type} with {vision.hidden_act} and {vision.num_channels}"
        )
    config = VisionConfig(
        image_size=_size(vision.image_size, "vision_config.image_size", path),
        patch_size=_size(vision.patch_size, "vision_config.patch_size", path),
        hidden_size=_size(vision.hidden_size, "vision_config.hidden_size", path),
        num_layers=_size(vision.num_hidden_layers, "vision_config.num_hidden_layers", path),
        num_heads=_size(vision.num_attention_heads, "vision_config.num_attention_heads", path),
        intermediate_size=_size(vision.intermediate_size, "vision_config.intermediate_size", path),
        layer_norm_eps=float(vision.layer_norm_eps),
        tokens_per_image=_size(tokens, "mm_tokens_per_image", path),
    )
    side = math.isqrt(config.tokens_per_image)
    if config.image_size % config.patch_size or side**2 != config.tokens_per_image or config.patches_per_side % side:
        raise BuildError(
            f"{path}: {config.patches_per_side} patches a side ({config.image_size} / {config.patch_size} pixels) "
            f"cannot be pooled evenly to mm_tokens_per_image {config.tokens_per_image}"
        )
    if config.hidden_size % config.num_heads:
        raise BuildError(f"{path}: the vision tower's hidden_size {config.hidden_size} is not a multiple of its heads")
    return config


def _size(value: object, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BuildError(f"{path}: {key} must be a positive integer, not {value!r}")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))
