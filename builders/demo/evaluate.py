"""How often the demo checkpoint is right on held-out pictures and questions.

`evaluate` asks any ``answer_fn(messages, images) -> text``; `evaluate_batches` asks many conversations at a time, turn
by turn; `run_transformers` does so through transformers. Conversations go on with the answers actually given, right or
wrong, as a user's would. Held-out conversations come from their own stream of seeds (see `questions.conversation`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from builders.demo.drawing import render
from builders.demo.questions import HELD_OUT, Conversation, Turn, conversation
from builders.demo.scoring import is_right

Message = dict[str, Any]
Request = tuple[list[Message], list[Image.Image]]
AnswerFn = Callable[[list[Message], list[Image.Image]], str]
BatchAnswerFn = Callable[[Sequence[Request]], list[str]]
MAX_NEW_TOKENS = 80


@dataclass(frozen=True)
class Wrong:
    """One wrong answer: conversation ``index``, ``turn``, and what was said."""

    index: int
    turn: int
    category: str
    question: str
    expected: str
    answer: str


@dataclass
class EvalReport:
    """Right answers and questions asked, per category and per language, over ``n`` conversations of ``seed``."""

    n: int
    seed: int
    right: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def questions(self) -> int:
        """Questions asked in all."""
        return sum(count for name, count in self.asked.items() if not name.startswith("language:"))

    @property
    def accuracy(self) -> float:
        """Share of all questions answered right."""
        return 1 - len(self.wrong) / max(1, self.questions)

    def add(self, talk: Conversation, index: int, number: int, answer: str) -> None:
        """Score ``answer`` to turn ``number`` of ``talk``."""
        turn = talk.turns[number]
        right = is_right(answer, turn.answer, turn.category, turn.language)
        for name in (turn.category, f"language:{turn.language}"):
            self.asked[name] = self.asked.get(name, 0) + 1
            self.right[name] = self.right.get(name, 0) + right
        if not right:
            self.wrong.append(Wrong(index, number, turn.category, turn.user, turn.answer, answer))

    def table(self) -> str:
        """Lines of name, share right, right/asked; the total last."""
        lines = [
            f"{name:<14} {100 * self.right[name] / asked:6.2f} %  {self.right[name]}/{asked}"
            for name, asked in sorted(self.asked.items())
        ]
        total = self.questions
        lines.append(f"{'all':<14} {100 * self.accuracy:6.2f} %  {total - len(self.wrong)}/{total}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            "conversations": self.n,
            "questions": self.questions,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "categories": {name: {"right": self.right[name], "asked": self.asked[name]} for name in sorted(self.asked)},
            "wrong": [vars(entry) for entry in self.wrong],
        }


def _user_message(turn: Turn) -> Message:
    pictures: list[Message] = [{"type": "image"}] * turn.pictures
    words: list[Message] = [{"type": "text", "text": turn.user}] if turn.user else []
    return {"role": "user", "content": words + pictures if turn.pictures_last else pictures + words}


def request(talk: Conversation, number: int, answers: Sequence[str], images: Sequence[Image.Image]) -> Request:
    """The chat messages up to and with the question of turn ``number``, and the pictures they refer to, in order.

    A message is ``{"role", "content"}``; content is a list of ``{"type": "text", "text"}`` and ``{"type": "image"}``.
    ``answers`` are the answers given to the turns before.
    """
    messages: list[Message] = []
    if talk.system:
        messages.append({"role": "system", "content": [{"type": "text", "text": talk.system}]})
    for turn, answer in zip(talk.turns[:number], answers[:number], strict=True):
        messages.append(_user_message(turn))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages.append(_user_message(talk.turns[number]))
    shown = sum(turn.pictures for turn in talk.turns[: number + 1])
    return messages, list(images[:shown])


def evaluate_batches(answer_batch: BatchAnswerFn, n: int, seed: int, batch: int, progress: bool = True) -> EvalReport:
    """Ask ``n`` held-out conversations, ``batch`` questions at a time: all first turns, then all second turns …"""
    report = EvalReport(n, seed)
    talks = [conversation(HELD_OUT, seed, index) for index in range(n)]
    total = sum(len(talk.turns) for talk in talks)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("questions", total=total)
        _ask_all(answer_batch, batch, report, talks, lambda count: bar.advance(task, count))
    return report


def _ask_all(
    answer_batch: BatchAnswerFn, batch: int, report: EvalReport, talks: list[Conversation], done: Callable[[int], None]
) -> None:
    images = [[render(scene) for scene in talk.scenes] for talk in talks]
    answers: list[list[str]] = [[] for _ in talks]
    for number in range(max((len(talk.turns) for talk in talks), default=0)):
        # Requests of like length together: fewer padded tokens.
        waiting = [index for index, talk in enumerate(talks) if number < len(talk.turns)]
        waiting.sort(key=lambda index: (len(talks[index].scenes), sum(map(len, answers[index]))))
        for start in range(0, len(waiting), batch):
            chosen = waiting[start : start + batch]
            said = answer_batch([request(talks[index], number, answers[index], images[index]) for index in chosen])
            for index, answer in zip(chosen, said, strict=True):
                answers[index].append(answer)
                report.add(talks[index], index, number, answer)
            done(len(chosen))


def evaluate(answer_fn: AnswerFn, n: int, seed: int = 0, progress: bool = True) -> EvalReport:
    """Ask ``n`` held-out conversations of ``seed``, one question at a time, through ``answer_fn(messages, images)``."""
    return evaluate_batches(lambda requests: [answer_fn(*asked) for asked in requests], n, seed, 1, progress)


def load_transformers(checkpoint: Path, device: str = "cpu", quantize: str | None = None) -> Any:
    """The model of ``checkpoint`` in float32, its weights first rounded where ``quantize`` names one of `MODES`."""
    import torch
    from transformers import Gemma3ForConditionalGeneration

    from builders.demo.quantization import WeightQuantizer

    model = Gemma3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    if quantize is not None:
        WeightQuantizer(model).quantize(quantize)
    return model


def transformers_answerer(checkpoint: Path, device: str = "cpu", quantize: str | None = None) -> BatchAnswerFn:
    """A greedy batched answerer: the bfloat16 weights of ``checkpoint`` run in float32 by transformers on ``device``.

    ``quantize`` rounds the weights first, to one of `quantization.MODES`.
    """
    import torch
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = load_transformers(checkpoint, device, quantize)

    def answer(requests: Sequence[Request]) -> list[str]:
        texts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages, _ in requests]
        images = [list(pictures) for _, pictures in requests]
        # The template writes <bos> itself.
        inputs = processor(
            text=texts, images=images if any(images) else None, padding=True, return_tensors="pt",
            add_special_tokens=False,
        ).to(device)  # fmt: skip
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        told: list[str] = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return told

    return answer


def run_transformers(
    checkpoint: Path, n: int = 1000, seed: int = 0, batch: int = 32, device: str = "cpu", quantize: str | None = None
) -> EvalReport:
    """Evaluate ``checkpoint`` by greedy decoding in transformers on ``n`` held-out conversations of ``seed``.

    Args:
        checkpoint: folder that ``Gemma3ForConditionalGeneration.from_pretrained`` and ``AutoProcessor`` load.
        n: conversations; each asks about four to five questions.
        seed: of the held-out stream, which training never draws from whatever its own seed.
        batch: questions answered together.
        device: a torch device.
        quantize: ``None`` for the weights as stored, or one of `quantization.MODES`.
    """
    return evaluate_batches(transformers_answerer(checkpoint, device, quantize), n, seed, batch)


def sample_picture(seed: int, language: str = "en") -> tuple[Image.Image, str, str]:
    """One held-out picture with a question about it in ``language`` ("en" or "zh") and the right answer."""
    rng = random.Random(f"sample/{seed}")
    while True:
        talk = conversation(HELD_OUT, seed, rng.randrange(2**32))
        turn = talk.turns[0]
        if turn.pictures == 1 and turn.language == language and turn.user:
            return render(talk.scenes[0]), turn.user, turn.answer


def write_untrained(path: Path, seed: int = 0, **overrides: Any) -> None:
    """Write a random checkpoint of the demo's form to ``path``; ``overrides`` replace entries of its text config."""
    from builders.demo.corpus import corpus
    from builders.demo.model import create_model, write_weights
    from builders.demo.tokenizer import write_processor

    write_processor(path, corpus())
    write_weights(create_model(seed, **overrides), path)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m builders.demo.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(__file__).parent / "checkpoint")
    parser.add_argument("-n", type=int, default=1000, help="conversations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantize", choices=("int4", "int4-asymmetric", "int8"), help="round the weights first")
    parser.add_argument("--json", type=Path, help="also write the report here")
    options = parser.parse_args(arguments)
    report = run_transformers(
        options.checkpoint, options.n, options.seed, options.batch, options.device, options.quantize
    )
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
