"""The packed training network against transformers' own model."""

import numpy as np
import pytest
import torch
from transformers import Gemma3ForConditionalGeneration

from builders.demo.cells import HEADS
from builders.demo.model import IMAGE_SIZE, IMAGE_SOFT_TOKEN, MM_TOKENS_PER_IMAGE, VOCAB_SIZE, create_model
from builders.demo.network import Compiled, PackedNetwork
from builders.demo.samples import Batch, Encoded, Packer
from builders.demo.tokenizer import IMAGE_TOKEN


def talk(rng: np.random.Generator, length: int, starts: tuple[int, ...]) -> Encoded:
    ids = rng.integers(10, VOCAB_SIZE - 1, length)
    for start in starts:
        ids[start : start + MM_TOKENS_PER_IMAGE] = IMAGE_SOFT_TOKEN
    pixels = [rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8) for _ in starts]
    cells = [np.zeros((MM_TOKENS_PER_IMAGE, len(HEADS)), np.int64) for _ in starts]
    return Encoded(ids, ids.copy(), np.zeros(length, np.int64), pixels, cells)


def packed(talks: list[Encoded], rows: int, length: int) -> Batch:
    packer = Packer(rows, length, sum(len(one.pixels) for one in talks))
    for one in talks:
        assert packer.add(one)
    return packer.batch()


@pytest.fixture(scope="module")
def model() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(3)
    created = create_model(3, num_hidden_layers=6).eval()
    with torch.no_grad():
        for name, parameter in created.named_parameters():
            if "norm" in name:  # norms away from 1 show a forgotten one
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return created


def reference(model: Gemma3ForConditionalGeneration, one: Encoded) -> torch.Tensor:
    ids = torch.from_numpy(one.ids)[None]
    pixels = torch.from_numpy(np.stack(one.pixels).transpose(0, 3, 1, 2)).float() / 127.5 - 1
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == IMAGE_SOFT_TOKEN).long()).logits[0]


def test_logits_of_packed_conversations_equal_transformers(model: Gemma3ForConditionalGeneration) -> None:
    """Two conversations share a row; one has two pictures, and both are longer than the window."""
    rng = np.random.default_rng(0)
    talks = [talk(rng, 150, (7, 60)), talk(rng, 90, (5,)), talk(rng, 110, (30,))]
    batch = packed(talks, rows=2, length=256)
    network = PackedNetwork(model, Compiled(False, torch.float32))
    with torch.no_grad():
        logits = network.logits(network.hidden(batch, network.image_features(batch["pixels"])))
    for document, one in enumerate(talks, 1):
        found = logits[batch["document"] == document]
        wanted = reference(model, one)
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_gradients_equal_transformers(model: Gemma3ForConditionalGeneration) -> None:
    rng = np.random.default_rng(1)
    one = talk(rng, 100, (9,))
    batch = packed([one], rows=1, length=100)
    names = ("q_proj.weight", "k_norm.weight", "down_proj.weight", "fc1.bias", "mm_input_projection_weight")
    watched = {n: p for n, p in model.named_parameters() if n.endswith(names) and p.requires_grad}
    network = PackedNetwork(model, Compiled(False, torch.float32))
    logits = network.logits(network.hidden(batch, network.image_features(batch["pixels"])))
    found = torch.autograd.grad(torch.logsumexp(logits[0], -1).sum(), list(watched.values()))
    ids = torch.from_numpy(one.ids)[None]
    pixels = batch["pixels"].float() / 127.5 - 1
    output = model(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == IMAGE_SOFT_TOKEN).long()).logits
    wanted = torch.autograd.grad(torch.logsumexp(output[0], -1).sum(), list(watched.values()))
    for name, mine, theirs in zip(watched, found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max().clamp_min(1e-6), name


def test_bfloat16_products_stay_close_to_float32(model: Gemma3ForConditionalGeneration) -> None:
    rng = np.random.default_rng(2)
    batch = packed([talk(rng, 120, (9,))], rows=1, length=120)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        network = PackedNetwork(model, Compiled(False, dtype))
        with torch.no_grad():
            logits.append(network.logits(network.hidden(batch, network.image_features(batch["pixels"]))))
    assert (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].abs().max()


def test_the_image_token_is_the_vocabularys_last() -> None:
    assert IMAGE_TOKEN == "<image_soft_token>"
    assert IMAGE_SOFT_TOKEN == VOCAB_SIZE - 1
