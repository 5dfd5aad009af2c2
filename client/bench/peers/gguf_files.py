"""GGUF files of a Gemma-3 checkpoint's language model, for llama.cpp: written plain, quantized by llama.cpp.

Names and metadata are those of llama.cpp's own converter for ``gemma3``; norms are stored as 1 + w, as it does. There
is no tokenizer inside: prompts are token ids. What its loader would guess from the number of layers is written out or
made to fit: which layers are local, their RoPE base, and the scale of the queries.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from builders.checkpoint import Checkpoint, open_checkpoint
from builders.model_config import TextConfig

PLAIN = ("bf16", "f32")
"""Formats written here, without llama.cpp."""
_LAYERS_27B = 62
"""llama.cpp takes a model of so many layers for the 27B, which scales its queries by hidden size / heads."""
_LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(checkpoint: Checkpoint, path: Path, kind: str) -> None:
    """The language model, its norms in float32. Tensors are read one at a time.

    Args:
        checkpoint: images are left out.
        path: of the file.
        kind: one of `PLAIN`, of the matrices.
    """
    text = checkpoint.config.text
    writer = gguf.GGUFWriter(path, "gemma3", use_temp_file=True)
    _write_metadata(writer, text)
    matrices = {"embed_tokens": "token_embd"}
    if not text.tie_embeddings:
        matrices["lm_head"] = "output"
    norms = {"norm": "output_norm"}
    for layer in range(text.num_layers):
        matrices |= {f"layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in _LINEAR.items()}
        norms |= {f"layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in _NORMS.items()}
    for ours, theirs in norms.items():
        factor = query_factor(text) if ours.endswith("q_norm") else 1.0
        weight = (1 + checkpoint.tensor(f"{ours}.weight").read()) * np.float32(factor)
        writer.add_tensor(f"{theirs}.weight", weight)
    for ours, theirs in matrices.items():
        weight = checkpoint.tensor(f"{ours}.weight").read()
        if kind == "bf16":
            raw = weight.astype(ml_dtypes.bfloat16).view(np.uint8)
            writer.add_tensor(f"{theirs}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(f"{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def query_factor(text: TextConfig) -> float:
    """What the queries' norm must be multiplied with so that llama.cpp's scale gives the model's.

    Both scale after the norm, and RoPE keeps a factor.
    """
    theirs = text.hidden_size // text.num_heads if text.num_layers == _LAYERS_27B else text.head_dim
    return math.sqrt(theirs / text.query_pre_attn_scalar)


def _write_metadata(writer: gguf.GGUFWriter, text: TextConfig) -> None:
    writer.add_context_length(text.max_context_length)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta_global)
    writer.add_rope_freq_base_swa(text.rope_theta_local)
    if text.rope_scaling_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_scaling_factor)
    writer.add_sliding_window(text.sliding_window)
    writer.add_sliding_window_pattern([kind == "local" for kind in text.layer_types])
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("none")


def quantize(source: Path, path: Path, name: str, threads: int) -> None:
    """Every matrix in one type, embedding and head included ("pure"), by llama.cpp's own quantizer."""
    import llama_cpp

    types = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = types[name], True, threads
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings))
    if status:
        raise RuntimeError(f"llama.cpp could not quantize {source} to {name}: {status}")


def _main(checkpoint: Path, folder: Path, threads: int, names: list[str]) -> None:
    """Write ``<name>.gguf`` for every name, each complete or not there."""
    plain = next((name for name in names if name in PLAIN), PLAIN[0])
    source = folder / f"{plain}.gguf"
    for name in [plain, *(name for name in names if name != plain)]:
        unfinished = folder / f"{name}.unfinished"
        if name in PLAIN:
            write_gguf(open_checkpoint(checkpoint), unfinished, name)
        else:
            quantize(source, unfinished, name, threads)
        unfinished.replace(folder / f"{name}.gguf")
    if plain not in names:
        source.unlink()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
