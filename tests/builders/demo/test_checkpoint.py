"""The checkpoint that ships: what transformers makes of it, and how often it is right."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, Gemma3ForConditionalGeneration, Gemma3Processor

from builders.demo import evaluate

CHECKPOINT = Path(evaluate.__file__).parent / "checkpoint"
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_its_files_are_complete_and_small() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == FILES
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 12 * 1000**2


def test_every_weight_is_found_and_none_is_left_over() -> None:
    model, report = Gemma3ForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6


def test_it_has_everything_the_large_ones_have(model: Gemma3ForConditionalGeneration) -> None:
    text, vision = model.config.text_config, model.config.vision_config
    assert text.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * (text.num_hidden_layers // 6)
    assert text.num_attention_heads > text.num_key_value_heads > 1
    assert text.rope_parameters["full_attention"] == {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"}
    assert text.rope_parameters["sliding_attention"] == {"rope_theta": 1e4, "rope_type": "default"}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    patches = (vision.image_size // vision.patch_size) ** 2
    assert patches > model.config.mm_tokens_per_image > 1
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    last = text.num_hidden_layers - 1
    assert f"language_model.model.layers.{last}.self_attn.q_norm.weight" in names
    assert f"language_model.model.layers.{last}.self_attn.k_norm.weight" in names
    assert "multi_modal_projector.mm_soft_emb_norm.weight" in names
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert not any("lm_head" in name for name in names)


def test_its_usual_prompts_are_longer_than_its_window(model: Gemma3ForConditionalGeneration) -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert isinstance(processor, Gemma3Processor)
    lengths = []
    for seed in range(20):
        picture, question, _ = evaluate.sample_picture(seed)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        lengths.append(processor(text=text, images=[picture], return_tensors="np")["input_ids"].shape[1])
    assert min(lengths) > model.config.text_config.sliding_window


def test_older_releases_find_the_rope_settings_too() -> None:
    """transformers 4.57 reads ``rope_theta``, ``rope_local_base_freq`` and ``rope_scaling``."""
    text = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_scaling"] == {"factor": 8.0, "rope_type": "linear"}


def test_it_answers_right_on_pictures_never_trained_on() -> None:
    """The README's figures are these conversations and as many of seed 1."""
    report = evaluate.run_transformers(CHECKPOINT, n=125, seed=0, batch=125)
    assert report.questions >= 500
    assert report.accuracy >= 0.98, report.table() + "\n" + "\n".join(map(str, report.wrong))


def test_the_evaluation_of_int4_runs_on_rounded_weights() -> None:
    weights = evaluate.load_transformers(CHECKPOINT, quantize="int4").state_dict()
    blocks = weights["model.language_model.layers.0.mlp.up_proj.weight"].reshape(-1, 32)
    assert max(len(block.unique()) for block in blocks) <= 16
