"""Complete checkpoint folders for builder tests, and ways to rewrite and damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.checkpoints import BOI, BOS, EOI, EOS, FAMILIES, IMAGE, VOCAB, tiny

DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def complete(folder: Path, family: str) -> Path:
    """A copy of the random checkpoint of ``family`` with tokenizer and processor files beside the weights."""
    shutil.copytree(tiny(family), folder)
    add_tokenizer(folder)
    vision = FAMILIES[family].vision
    if vision is not None:
        size = {"height": vision["image_size"], "width": vision["image_size"]}
        write_json(folder / "preprocessor_config.json", {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
        tokens = FAMILIES[family].tokens_per_image
        write_json(folder / "processor_config.json", {"image_seq_length": tokens})
    return folder


def add_tokenizer(folder: Path) -> None:
    control = {EOS: "<eos>", BOS: "<bos>", IMAGE: "<image_soft_token>", BOI: "<start_of_image>", EOI: "<end_of_image>"}
    words = {control.get(index, f"word{index}"): index for index in range(VOCAB)}
    Tokenizer(WordLevel(words, unk_token="word3")).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<eos>"})


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    write_json(path, values)


def load_weights(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "model.safetensors"))


def write_weights(folder: Path, tensors: dict[str, Any], shards: int = 1) -> None:
    """Replace the weights of a checkpoint, in one file or in shards with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    where = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
