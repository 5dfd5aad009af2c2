"""Any Gemma-3 checkpoint folder behind one set of tensor names.

Canonical names are those of transformers' text model without prefix (``embed_tokens.weight``,
``layers.0.self_attn.q_proj.weight``, ``norm.weight``, ``lm_head.weight``); the SigLIP tower's begin with ``vision.``
(``vision.encoder.layers.0.mlp.fc1.weight``) and the projector's with ``projector.``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from builders.model_config import ModelConfig, TextConfig, VisionConfig, read_json, read_model_config
from builders.tensors import (
    FileTensor,
    LazyTensor,
    concat_rows,
    map_rows,
    read_tensors,
    row_chunks,
    transpose,
)
from python_backends.errors import BuildError

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "canonical_name",
    "concat_rows",
    "expected_shapes",
    "map_rows",
    "open_checkpoint",
    "row_chunks",
    "transpose",
    "weight_files",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: configuration read, every tensor found and its shape checked, no weight read yet."""

    folder: Path
    config: ModelConfig
    tensors: dict[str, FileTensor] = field(repr=False)
    """The tensors the model has, by canonical name."""

    def tensor(self, name: str) -> LazyTensor:
        """The tensor of that canonical name.

        Raises:
            BuildError: the checkpoint has none.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise BuildError(f"{self.folder} has no tensor {name!r}") from None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the model, as stored."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_checkpoint(folder: Path, on_read: Callable[[int], None] | None = None) -> Checkpoint:
    """Open a Hugging Face Gemma-3 checkpoint: single or sharded safetensors, names of any transformers version.

    ``on_read`` is told the bytes of every later read, for progress.

    Raises:
        BuildError: not a Gemma-3 checkpoint, an unsupported option, files missing or truncated, tensors missing or of
            a wrong shape; the message names what and what to do.
    """
    if not folder.is_dir():
        raise BuildError(f"{folder} is not a folder; pass a checkpoint folder or a hub id such as google/gemma-3-4b-it")
    config = read_model_config(folder)
    found: dict[str, FileTensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path, on_read).items():
            canonical = canonical_name(name)
            if canonical in found:
                raise BuildError(f"{folder}: tensors {found[canonical].name!r} and {name!r} are the same weight")
            found[canonical] = tensor
    return Checkpoint(folder, config, _select(found, config, folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of their names.

    Raises:
        BuildError: none, a malformed index, or shards that the index names and the folder lacks.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / SINGLE_FILE).exists():
            return [folder / SINGLE_FILE]
        others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth", "*.npz") for path in folder.glob(pattern))
        hint = f" ({others[0]} is of another format: get the safetensors version)" if others else ""
        raise BuildError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}; download the weights")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise BuildError(f"{index} has no weight_map of names; download it again")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [path.name for path in files if path.parent != folder or not path.is_file()]
    if missing:
        raise BuildError(f"{folder} lacks {', '.join(missing)}, named in {INDEX_FILE}; download them")
    return files


def canonical_name(name: str) -> str:
    """The canonical name of a tensor of a checkpoint.

    Known prefixes: ``model.`` (text-only), ``language_model.model.`` with ``vision_tower.vision_model.`` (published
    multimodal files), ``model.language_model.`` with ``model.vision_tower.`` (transformers 4.52 on), ``vision_tower.``
    without ``vision_model.`` (saved by transformers 5), and none (base models saved alone).
    """
    name = name.removeprefix("model.")
    for prefix, inner, canonical in (
        ("language_model.", "model.", ""),
        ("vision_tower.", "vision_model.", "vision."),
        ("multi_modal_projector.", "", "projector."),
    ):
        if name.startswith(prefix):
            return canonical + name.removeprefix(prefix).removeprefix(inner)
    return name


def _select(found: dict[str, FileTensor], config: ModelConfig, folder: Path) -> dict[str, FileTensor]:
    """The tensors the model has, all present and of the right shape; others (SigLIP's own head) are left out."""
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BuildError(f"{folder} lacks tensors of the model config.json describes: {shown}; download it again")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise BuildError(
                f"{folder}: tensor {found[name].name!r} has shape {list(found[name].shape)}, config.json asks for "
                f"{list(shape)}; config.json and weights are of different models"
            )
    return {name: found[name] for name in expected}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of that configuration, by canonical name, in the order of computation."""
    expected = dict(_text_shapes(config.text))
    if config.vision is not None:
        expected.update(_vision_shapes(config.vision, config.text.hidden_size))
    return expected


def _text_shapes(text: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, q, kv = (
        text.hidden_size,
        text.intermediate_size,
        text.num_heads * text.head_dim,
        text.num_kv_heads * text.head_dim,
    )
    yield "embed_tokens.weight", (text.vocab_size, hidden)
    for layer in range(text.num_layers):
        prefix = f"layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (q, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.q_norm.weight", (text.head_dim,)
        yield prefix + "self_attn.k_norm.weight", (text.head_dim,)
        yield prefix + "self_attn.o_proj.weight", (hidden, q)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "pre_feedforward_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (wide, hidden)
        yield prefix + "mlp.up_proj.weight", (wide, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, wide)
        yield prefix + "post_feedforward_layernorm.weight", (hidden,)
    yield "norm.weight", (hidden,)
    if not text.tie_embeddings:
        yield "lm_head.weight", (text.vocab_size, hidden)


def _vision_shapes(vision: VisionConfig, text_hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = vision.hidden_size, vision.intermediate_size
    yield "vision.embeddings.patch_embedding.weight", (hidden, 3, vision.patch_size, vision.patch_size)
    yield "vision.embeddings.patch_embedding.bias", (hidden,)
    yield "vision.embeddings.position_embedding.weight", (vision.patches_per_side**2, hidden)
    for layer in range(vision.num_layers):
        prefix = f"vision.encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}{norm}.weight", (hidden,)
            yield f"{prefix}{norm}.bias", (hidden,)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}self_attn.{projection}.weight", (hidden, hidden)
            yield f"{prefix}self_attn.{projection}.bias", (hidden,)
        yield prefix + "mlp.fc1.weight", (wide, hidden)
        yield prefix + "mlp.fc1.bias", (wide,)
        yield prefix + "mlp.fc2.weight", (hidden, wide)
        yield prefix + "mlp.fc2.bias", (hidden,)
    yield "vision.post_layernorm.weight", (hidden,)
    yield "vision.post_layernorm.bias", (hidden,)
    yield "projector.mm_input_projection_weight", (hidden, text_hidden)
    yield "projector.mm_soft_emb_norm.weight", (hidden,)
