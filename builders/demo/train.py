# mypy: disable-error-code="misc, untyped-decorator"
"""Train the demo checkpoint: ``python -m builders.demo.train --help``.

First the vision tower and the projector learn alone what each cell of a picture shows (see `cells`), then the whole
model learns conversations, with that task kept beside them; the loss is taken on the model's turns. In the last part
the weights are rounded to int4 or int8 in half of the steps (see `quantization`) while the learning rate falls to zero.

Several processes, one thread each, share the work of a step on a CPU: unlike threads they need not wait for each other
at every operation. The run's length is given in steps, or in minutes where a deadline counts.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from builders.demo.cells import IGNORED, CellHead
from builders.demo.corpus import corpus
from builders.demo.model import create_model, write_weights
from builders.demo.network import Batch, Compiled, PackedNetwork
from builders.demo.optimizer import build_optimizers
from builders.demo.quantization import MODES, WeightQuantizer
from builders.demo.questions import PAIRS, TRAINING, VALIDATION
from builders.demo.samples import CATEGORIES, MANY, ConversationBatches, PictureBatches
from builders.demo.tokenizer import write_processor

STATE = "trainer.pt"
CONVERSATIONS_PER_STEP = 1_000_000  # more than any step takes: resumed runs never see a conversation twice
VISION = ("vision_tower", "multi_modal_projector")


def rate_share(progress: float, step: int, warmup: int, decay_from: float) -> float:
    """Share of the peak learning rate: a linear rise over ``warmup`` steps, a plateau, a fall to 0 by the end."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = 1.0 if progress <= decay_from else max(0.0, (1.0 - progress) / (1.0 - decay_from))
    return min(rise, fall)


class Trainer:
    """Model, helper head, optimizers and the step reached; saved whole, so that a run can stop and go on."""

    def __init__(self, options: argparse.Namespace, rank: int = 0) -> None:
        self.options, self.rank = options, rank
        self.device = torch.device(options.device)
        self.out: Path = options.out
        self.model = create_model(options.seed, num_hidden_layers=options.layers).to(self.device).train()
        self.head = CellHead(self.model.config.text_config.hidden_size).to(self.device)
        self.network = PackedNetwork(self.model, Compiled(options.compile))
        self.quantizer = WeightQuantizer(self.model)
        self.step, self.seconds = 0, 0.0
        self.stop = False
        self.names = {name for name, _ in self.model.named_parameters()}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.warm_from = 0
        self.choose_parameters()
        if options.resume:
            self.load()
        self.validation: list[Batch] = []

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by minutes, whichever is further."""
        by_steps = self.step / self.options.steps if self.options.steps else 0.0
        by_time = self.seconds / (60 * self.options.minutes) if self.options.minutes else 0.0
        return max(by_steps, by_time)

    @property
    def pictures_only(self) -> bool:
        """Whether the step to come is one of those that train the vision tower alone."""
        return self.step < int(self.options.picture_steps)

    def choose_parameters(self) -> None:
        """Take up the parameters that this part of the run trains, with fresh optimizers."""
        seeing = self.pictures_only
        named = [(name, p) for name, p in self.model.named_parameters() if not seeing or any(v in name for v in VISION)]
        named += [(f"head.{name}", p) for name, p in self.head.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        self.optimizers = build_optimizers(named, self.options.lr, self.options.weight_decay)
        self.seeing, self.warm_from = seeing, self.step

    def load(self) -> None:
        """Take up the state a former run saved; a run given other lengths goes on from its weights alone."""
        state: dict[str, Any] = torch.load(self.out / STATE, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        if self.options.restart:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        self.choose_parameters()
        self.warm_from = state["warm_from"]
        if self.seeing == state["seeing"]:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the bfloat16 checkpoint and the state `load` takes up."""
        if self.rank:
            return
        write_weights(self.model, self.out)
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "seconds": self.seconds,
            "seeing": self.seeing, "warm_from": self.warm_from,
        }  # fmt: skip
        torch.save(state, self.out / (STATE + ".new"))
        os.replace(self.out / (STATE + ".new"), self.out / STATE)

    def _mode(self) -> str | None:
        rng = random.Random(f"quantize/{self.options.seed}/{self.step}")
        if self.seeing or self.progress < self.options.quantize_from or rng.random() < 0.5:
            return None
        return rng.choices(MODES, (2, 2, 1))[0]

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.network.image_features(batch["pixels"])
        cells, report = self.head.losses(features, batch["cells"])
        if self.seeing:
            return cells, {"loss": cells.detach(), **report}
        hidden, wanted = self._answers(batch, features)
        text = nn.functional.cross_entropy(self.network.logits(hidden), wanted)
        loss = text + self.options.cell_weight * cells
        return loss, {"text": text.detach(), **{name: report[name] for name in ("cover", "centre", "same")}}

    def _answers(self, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network.hidden(batch, features)
        chosen = (batch["labels"] != IGNORED).flatten().nonzero().squeeze(1)
        return hidden.flatten(0, 1)[chosen], batch["labels"].flatten()[chosen]

    def train_step(self, batch: Batch, seconds: float) -> dict[str, Tensor]:
        """One update from this process's batch and the others'; ``seconds`` have passed since the step before."""
        options = self.options
        if self.seeing and not self.pictures_only:
            self.choose_parameters()
        share = rate_share(self.progress, self.step - self.warm_from, options.warmup, options.decay_from)
        with self.quantizer.quantized(self._mode()):
            loss, report = self._losses(batch)
            loss.backward()
        self._combine(seconds)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return report

    def _combine(self, seconds: float) -> None:
        """Average gradients, and agree on the time passed and on whether to stop, over all processes."""
        if not dist.is_initialized():
            self.seconds += seconds
            return
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        extra = torch.tensor([seconds, float(self.stop)], device=self.device)
        flat = torch.cat([grad.flatten() for grad in grads] + [extra])
        dist.all_reduce(flat)
        flat[:-2] /= dist.get_world_size()
        pieces = flat[:-2].split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads, strict=True)])
        self.seconds += flat[-2].item() / dist.get_world_size()
        self.stop = bool(flat[-1].item() > 0)

    def _loader(self, stream: IterableDataset[Batch]) -> DataLoader[Batch]:
        workers = self.options.workers
        return DataLoader(
            stream, batch_size=None, num_workers=workers, pin_memory=self.device.type == "cuda",
            prefetch_factor=8 if workers else None, worker_init_fn=_lower_priority,
        )  # fmt: skip

    def conversations(self, stream: str, first: int) -> ConversationBatches:
        """Packed batches for this process, from conversation ``first`` of ``stream``."""
        options, training = self.options, stream == TRAINING
        return ConversationBatches(
            self.out, rows=options.rows, length=options.length, room=options.pictures, seed=options.seed,
            first=first + self.rank, stride=options.processes, stream=stream,
            turns_least=options.turns if training else 1, pairs=options.pairs if training else PAIRS,
            practice=training,
        )  # fmt: skip

    def batches(self) -> Iterator[Batch]:
        """Batches no earlier step of this run has seen: pictures first, then conversations."""
        first = self.options.data_offset + self.step * CONVERSATIONS_PER_STEP
        if self.pictures_only:
            pictures = PictureBatches(self.options.pictures, self.options.seed, first + self.rank)
            for batch in self._loader(pictures):
                if not self.pictures_only:
                    break
                yield batch
        yield from self._loader(self.conversations(TRAINING, first))

    @torch.no_grad()
    def check(self) -> str:
        """Share of validation questions with every token of the answer right (given the right tokens before it)."""
        if not self.validation:
            stream = iter(self.conversations(VALIDATION, 0))
            self.validation = [next(stream) for _ in range(self.options.check_batches)]
        counts = torch.zeros(2, len(CATEGORIES), device=self.device)
        for batch in self._moved(self.validation):
            hidden, wanted = self._answers(batch, self.network.image_features(batch["pixels"]))
            right = (self.network.logits(hidden).argmax(-1) == wanted).float()
            question = batch["question"].flatten()[(batch["labels"] != IGNORED).flatten()]
            names, which = question.unique(return_inverse=True)
            whole = right.new_ones(len(names)).scatter_reduce(0, which, right, "amin")
            counts[0].index_add_(0, names % MANY, whole)
            counts[1].index_add_(0, names % MANY, torch.ones_like(whole))
        if dist.is_initialized():
            dist.all_reduce(counts)
        shares = (100 * counts[0] / counts[1].clamp_min(1)).tolist()
        total = 100 * counts[0].sum() / counts[1].sum()
        named = " ".join(f"{name} {share:.1f}" for name, share in zip(CATEGORIES, shares, strict=True))
        return f"{total:.2f} % of {int(counts[1].sum())}: {named}"

    def _moved(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def run(self) -> None:
        """Train to the last step or minute, or to Ctrl-C; save now and then and in any case at the end."""
        columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), disable=self.rank > 0)
        with _interrupts(lambda *_: setattr(self, "stop", True)), progress as bar:
            task = bar.add_task("training", total=1.0, step=self.step)
            self._train(lambda: bar.update(task, completed=self.progress, step=self.step))
        self.save()
        if self.stop:
            self._say("stopped; go on with --resume")

    def _train(self, show: Callable[[], None]) -> None:
        options = self.options
        last = saved = time.monotonic()
        for batch in self._moved(self.batches()) if self.progress < 1 else ():
            now = time.monotonic()
            report = self.train_step(batch, now - last)
            last = now
            show()
            if self.step % options.log_every == 0:
                figures = " ".join(f"{name} {value.item():.4f}" for name, value in report.items())
                self._say(f"step {self.step} {100 * self.progress:.1f} % {self.seconds:.0f} s: {figures}")
            if not self.seeing and self.step % options.check_every == 0:
                self._say(f"  validation {self.check()}")
            if now - saved > 60 * options.save_minutes:
                self.save()
                saved = now
            if self.progress >= 1 or self.stop:
                break

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


@contextmanager
def _interrupts(handler: Callable[..., object] | signal.Handlers) -> Iterator[None]:
    """Ctrl-C goes to ``handler``, and afterwards to whom it went before."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lower_priority(_: int) -> None:
    """Data workers run ahead of the trainer; they may wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.nice(5)


def _process(rank: int, options: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(options.threads)
    if options.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes)
    Trainer(options, rank).run()
    if dist.is_initialized():
        dist.destroy_process_group()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m builders.demo.train", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the checkpoint and the trainer's state")
    add("--steps", type=int, default=0, help="steps of the whole run, pictures' included")
    add(
        "--minutes",
        type=float,
        default=0.0,
        help="or its length in minutes; the schedule follows the one that ends first",
    )
    add("--picture-steps", type=int, default=3000, help="first steps, of the vision tower alone (default: %(default)s)")
    add("--rows", type=int, default=16, help="packed rows of a process's batch (default: %(default)s)")
    add("--length", type=int, default=256, help="tokens in a row (default: %(default)s)")
    add("--pictures", type=int, default=24, help="pictures of a process's batch, at most (default: %(default)s)")
    add("--turns", type=int, default=1, help="least number of turns in a conversation, before it is cut to a row")
    add("--pairs", type=float, default=PAIRS, help="share of conversations about two pictures (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="Muon's weight decay (default: %(default)s)")
    add("--cell-weight", type=float, default=0.5, help="weight of the helper task (default: %(default)s)")
    add("--warmup", type=int, default=100, help="steps of linear warm-up of each part (default: %(default)s)")
    add("--decay-from", type=float, default=0.6, help="share of the run after which the learning rate falls")
    add("--quantize-from", type=float, default=0.75, help="share of the run after which weights are rounded")
    add("--layers", type=int, default=12, help="layers of the language model (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights and of the training stream")
    add("--data-offset", type=int, default=0, help="first conversation of the training stream (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--processes", type=int, default=1, help="processes that share a step (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads of each process (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that draw and ask for each (default: %(default)s)")
    add("--compile", action="store_true", help="compile the training step")
    add("--resume", action="store_true", help="go on from the state in --out")
    add("--restart", action="store_true", help="with --resume: take the weights alone and begin the schedule anew")
    add("--save-minutes", type=float, default=3.0, help="minutes between two saves (default: %(default)s)")
    add("--log-every", type=int, default=50)
    add("--check-every", type=int, default=250, help="steps between two validations (default: %(default)s)")
    add("--check-batches", type=int, default=4, help="batches of a validation, for each process")
    options = parser.parse_args(arguments)
    if not options.steps and not options.minutes:
        parser.error("give --steps or --minutes")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    if not (options.out / "tokenizer.json").exists():
        write_processor(options.out, corpus())
    if options.processes == 1:
        _process(0, options, "")
        return
    with tempfile.TemporaryDirectory() as folder, _interrupts(signal.SIG_IGN):
        torch.multiprocessing.spawn(_process, (options, f"{folder}/meeting"), options.processes)


if __name__ == "__main__":
    main()
