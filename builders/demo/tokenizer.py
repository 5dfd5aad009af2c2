"""The demo checkpoint's tokenizer and processor, laid out as Gemma's own.

A byte-fallback BPE without a pre-tokenizer that cuts anything (spaces become ``▁`` before it), Gemma's special
tokens, runs of line feeds as single tokens, all 256 bytes, and pieces for the English and Chinese of the demo world.
Any other text falls back to characters and bytes and still round-trips.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer

from builders.demo.model import IMAGE_SIZE, MM_TOKENS_PER_IMAGE, VOCAB_SIZE

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
IMAGE_TOKEN = "<image_soft_token>"
CONTROL_TOKENS = SPECIAL_TOKENS + TURN_TOKENS
MAX_NEWLINES = 4

# Words, with the space before them, are the widest pieces: merges never cross these cuts. Chinese puts no spaces
# between its words, so the demo world's are listed; other characters stand alone.
_CHINESE_WORDS = """
    红色 绿色 蓝色 黄色 紫色 橙色 黑色 白色 圆形 圆圈 正方形 方形 方块 三角形 星形 五角星 星星 图形 左上 上方 右上 左边
    中间 右边 左下 下方 右下 上面 下面 图中 图里 图片 图画 这张 第一张 第二张 两张 哪张 哪一张 一共 总共 多少 几个 什么
    颜色 形状 位置 哪里 哪儿 哪个 哪种 哪些 一个 有没有 是不是 没有 是的 还有 别的 其他 都有 只有 更大 更小 更多 最大
    最小 看到 描述 请问 告诉我 给我 那么 一样 一样多 相同 同一种 内容 所有 数一数 列出 你好 谢谢 再见 请看 好的
"""
_PIECES = Regex("|".join(sorted(_CHINESE_WORDS.split(), key=len, reverse=True)) + r"|▁?[A-Za-z]+|▁?[0-9]|[^A-Za-z0-9]")

CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model
' }}
{%- endif -%}
"""


def _learned_merges(corpus: Iterable[str], room: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Train BPE on ``corpus``; return its characters and its merges, together making at most ``room`` pieces."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(_PIECES, behavior="isolated")
    ascii_characters = [chr(code) for code in range(33, 127)] + ["▁"]
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=room, initial_alphabet=ascii_characters, show_progress=False, min_frequency=3),
    )
    state: dict[str, Any] = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in state["merges"]]
    merged = {left + right for left, right in merges}
    characters = sorted(piece for piece in state["vocab"] if piece not in merged and piece != "\n")
    return characters, merges


def build_vocabulary(corpus: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Piece → id (ids 0 … ``VOCAB_SIZE`` − 1, all used) and the merges in order of rank."""
    newlines = ["\n" * count for count in range(1, MAX_NEWLINES + 1)]
    newline_merges = [("\n", "\n"), ("\n\n", "\n"), ("\n\n", "\n\n")]
    raw_bytes = [f"<0x{value:02X}>" for value in range(256)]
    room = VOCAB_SIZE - len(CONTROL_TOKENS) - len(newlines) - len(raw_bytes) - 1
    characters, merges = _learned_merges(corpus, room)
    pieces = [*CONTROL_TOKENS, *newlines, *raw_bytes, *characters]
    known = set(pieces)
    for left, right in merges:
        if left + right not in known:
            known.add(left + right)
            pieces.append(left + right)
    unused = VOCAB_SIZE - 1 - len(pieces)
    pieces += [f"<unused{number}>" for number in range(unused)] + [IMAGE_TOKEN]
    return {piece: number for number, piece in enumerate(pieces)}, newline_merges + merges


def build_tokenizer(corpus: Iterable[str]) -> GemmaTokenizer:
    """Gemma's tokenizer class over the vocabulary learned from ``corpus``, padding on the left."""
    vocabulary, merges = build_vocabulary(corpus)
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        add_eos_token=False,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token=IMAGE_TOKEN,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": IMAGE_TOKEN,
        },
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        spaces_between_special_tokens=False,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(TURN_TOKENS)}, replace_extra_special_tokens=False)
    return tokenizer


def write_processor(folder: Path, corpus: Iterable[str]) -> None:
    """Write tokenizer, chat template and image-processor files into ``folder`` (created if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    image_processor: dict[str, Any] = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": MM_TOKENS_PER_IMAGE,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    processor = {"image_seq_length": MM_TOKENS_PER_IMAGE, "processor_class": "Gemma3Processor"}
    for name, content in (("preprocessor_config.json", image_processor), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
