"""Train the demo checkpoint: ``python -m builders.demo.train --help``.

The model is transformers' own Gemma-3, in bfloat16 autocast over float32 weights; the loss is taken on the model's
turns. Beside it a helper head, dropped afterwards, learns from the image tokens which shape and colour covers each cell
of the picture, so that the vision tower need not wait for the text to tell it. In the later part of training the
weights are rounded to int4 or int8 in a random half of the steps (see `quantization`).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Gemma3ForConditionalGeneration

from builders.demo.corpus import corpus
from builders.demo.drawing import COLOURS, KINDS
from builders.demo.model import create_model, write_weights
from builders.demo.optimizer import build_optimizers
from builders.demo.quantization import MODES, WeightQuantizer
from builders.demo.samples import IGNORED, Batch, TrainingBatches
from builders.demo.tokenizer import write_processor

STATE = "trainer.pt"
CELL_CLASSES = 1 + len(KINDS) * len(COLOURS)
CELL_LOSS_WEIGHT = 0.5
CONVERSATIONS_PER_STEP = 1_000_000  # more than any step takes: resumed runs never see a conversation twice


def attention_masks(
    document: torch.Tensor, feature: torch.Tensor, window: int, per_image: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Additive masks (rows, 1, length, length) of Gemma-3 for packed rows.

    Within a document attention is causal, and both ways within one image; local layers reach back ``window`` tokens.
    ``document`` and ``feature`` are (rows, length) as `samples.Packer` lays them out.
    """
    length = document.shape[1]
    index = torch.arange(length, device=document.device)
    back = index[:, None] - index[None, :]
    image = torch.where(feature < 0, -1, feature // per_image)
    same_image = (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, :, None]
    full = (document[:, :, None] == document[:, None, :]) & ((back >= 0) | same_image)
    blocked = torch.finfo(dtype).min
    masks = {"full_attention": full, "sliding_attention": full & (back < window)}
    return {kind: torch.where(mask[:, None], 0.0, blocked).to(dtype) for kind, mask in masks.items()}


@dataclass
class Losses:
    """Mean over a step's labelled tokens (``text``) and cells (``cells``), and the share of tokens guessed right."""

    total: torch.Tensor
    text: torch.Tensor
    cells: torch.Tensor
    right: torch.Tensor


def packed_logits(model: Gemma3ForConditionalGeneration, batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits (rows, length, vocabulary) and image features (pictures, image tokens, hidden) of a packed batch."""
    inner = model.model
    pixels = batch["pixels"].to(torch.float32).div(127.5).sub(1)
    features = inner.multi_modal_projector(inner.vision_tower(pixel_values=pixels).last_hidden_state)
    text = inner.language_model.embed_tokens(batch["ids"])
    flat = features.reshape(-1, features.shape[-1]).to(text.dtype)
    index = batch["feature"]
    embeddings = torch.where((index >= 0)[..., None], flat[index.clamp_min(0)], text)
    window = model.config.text_config.sliding_window
    masks = attention_masks(batch["document"], index, window, model.config.mm_tokens_per_image, dtype)
    output = inner.language_model(
        inputs_embeds=embeddings, attention_mask=masks, position_ids=batch["position"], use_cache=False
    )
    return model.lm_head(output.last_hidden_state), features


def step_losses(model: Gemma3ForConditionalGeneration, head: nn.Module, batch: Batch, dtype: torch.dtype) -> Losses:
    """The losses of one packed batch."""
    logits, features = packed_logits(model, batch, dtype)
    logits, labels = logits.float().flatten(0, 1), batch["labels"].flatten()
    text = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    guesses = head(features).float().flatten(0, 1)
    cells = nn.functional.cross_entropy(guesses, batch["cells"].flatten(), ignore_index=IGNORED)
    counted = labels != IGNORED
    right = ((logits.argmax(-1) == labels) & counted).sum() / counted.sum().clamp_min(1)
    return Losses(text + CELL_LOSS_WEIGHT * cells, text.detach(), cells.detach(), right.detach())


def learning_rate(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """Share of the peak rate at ``step``: a linear rise, a plateau, a linear fall to 1 % at the end."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    start = decay_from * steps
    fall = 1.0 if step <= start else 1.0 - 0.99 * (step - start) / max(1.0, steps - start)
    return min(rise, fall)


class Trainer:
    """Model, helper head, optimizers and the step reached; saved whole, so that a run can stop and go on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.out: Path = options.out
        if not (self.out / "tokenizer.json").exists():
            write_processor(self.out, corpus())
        self.model = create_model(options.seed, num_hidden_layers=options.layers).to(self.device).train()
        self.head = nn.Linear(self.model.config.text_config.hidden_size, CELL_CLASSES).to(self.device)
        self.optimizers = build_optimizers(self.model, self.head, options.lr, options.weight_decay)
        self.quantizer = WeightQuantizer(self.model)
        self.step = 0
        if options.resume:
            self.load()
        self.losses = torch.compile(step_losses) if options.compile else step_losses

    def load(self) -> None:
        """Take up the state a former run saved."""
        state: dict[str, Any] = torch.load(self.out / STATE, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def save(self) -> None:
        """Write the bfloat16 checkpoint and the state `load` takes up."""
        write_weights(self.model, self.out)
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        torch.save(state, self.out / STATE)

    def _mode(self, rng: random.Random) -> str | None:
        if self.step < self.options.quantize_from * self.options.steps or rng.random() < 0.5:
            return None
        return rng.choices(MODES, (2, 2, 1))[0]

    def train_step(self, batch: Batch) -> Losses:
        """One update from one packed batch."""
        options = self.options
        share = learning_rate(self.step, options.steps, options.warmup, options.decay_from)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * share
        mode = self._mode(random.Random(f"quantize/{options.seed}/{self.step}"))
        with self.quantizer.quantized(mode):
            with torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda"):
                losses = self.losses(self.model, self.head, batch, self.dtype)
            losses.total.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.head.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def batches(self) -> DataLoader[Batch]:
        """Packed batches of conversations that no earlier step of this run has seen."""
        options = self.options
        first = self.step * CONVERSATIONS_PER_STEP
        stream = TrainingBatches(self.out, options.rows, options.length, options.seed, first)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=options.workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=8 if options.workers else None,
        )

    def run(self) -> None:
        """Train to the last step, or to ``--minutes`` or Ctrl-C; save in any case."""
        options, started = self.options, time.monotonic()
        progress = tqdm(total=options.steps, initial=self.step, unit="step", disable=not sys.stderr.isatty())
        try:
            for batch in self.batches() if self.step < options.steps else ():
                moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
                losses = self.train_step(moved)
                progress.update()
                if self.step % options.log_every == 0 or self.step == options.steps:
                    seconds = time.monotonic() - started
                    text, cells, right = losses.text.item(), losses.cells.item(), losses.right.item()
                    progress.write(
                        f"step {self.step}/{options.steps} {seconds:.0f} s: loss {text:.4f}, tokens right {right:.4f}, "
                        f"cells {cells:.4f}",
                        file=sys.stdout,
                    )
                late = options.minutes is not None and time.monotonic() - started > options.minutes * 60
                if self.step >= options.steps or late:
                    break
        except KeyboardInterrupt:
            print("stopped; go on with --resume")
        finally:
            progress.close()
            self.save()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m builders.demo.train", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the checkpoint and the trainer's state")
    add("--steps", type=int, default=20000, help="steps of the whole run (default: %(default)s)")
    add("--rows", type=int, default=48, help="packed rows in a batch (default: %(default)s)")
    add("--length", type=int, default=640, help="tokens in a row (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="Muon's weight decay (default: %(default)s)")
    add("--warmup", type=int, default=300, help="steps of linear warm-up (default: %(default)s)")
    add("--decay-from", type=float, default=0.4, help="share of the run after which the rate falls")
    add("--quantize-from", type=float, default=0.6, help="share of the run after which weights are rounded")
    add("--layers", type=int, default=12, help="layers of the language model (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights and of the training stream")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0, help="processes that draw and ask (default: in the main one)")
    add("--compile", action="store_true", help="compile the training step")
    add("--resume", action="store_true", help="go on from the state in --out")
    add("--minutes", type=float, help="stop and save after this long")
    add("--log-every", type=int, default=50)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    torch.set_float32_matmul_precision("high")
    Trainer(options).run()


if __name__ == "__main__":
    main()
