"""Starting the engines that are compared, each in a process of its own and on the same checkpoint."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.build import Options, build
from builders.checkpoint import weight_files
from builders.quantize import Precision
from client.bench.peers.install import install_llama, require_torch
from client.bench.peers.worker import Worker, environment
from client.bench.suite import Plan
from python_backends.config import Config
from python_backends.errors import BuildError

LLAMA, TRANSFORMERS, REFERENCE = "llama.cpp", "transformers", "transformers float32"
QUANTIZED = ("q4_0", "q8_0")
"""GGUF types that llama.cpp makes of the plain file."""
NEVER_MS = 10**6
"""As a latency target: prompts are computed in whole chunks, for nobody waits."""

Report = Callable[[str], object]


@dataclass(frozen=True)
class Setup:
    """What to compare, and how."""

    checkpoint: Path
    folder: Path
    """Keeps packages, GGUF files and our builds from run to run."""
    ours: tuple[str, ...]
    """As `read_label` takes them."""
    gguf: tuple[str, ...]
    """llama.cpp's types, of `QUANTIZED` and the plain ones."""
    without: frozenset[str]
    threads: int
    plan: Plan
    probe_tokens: int
    """Of the prompt whose logits are compared."""

    @property
    def context(self) -> int:
        """Tokens of context that every engine has."""
        longest = max(
            self.plan.prompt_tokens + 2 * self.plan.output_tokens, self.plan.prefill_tokens, self.probe_tokens
        )
        return 256 * -(-(longest + 64) // 256)

    @property
    def sizes(self) -> list[str]:
        """Threads, sequences and context, as workers take them."""
        return [str(self.threads), str(max(self.plan.batches)), str(self.context)]


def label(precision: Precision) -> str:
    """As ``--ours`` takes it."""
    kind = f"{precision.name}:{precision.block}" if precision.quantized else precision.name
    return kind if precision.symmetric else f"{kind}:asymmetric"


def read_label(text: str) -> tuple[Precision, dict[str, Any]]:
    """``int4:32``, ``int8``, ``int4:128:asymmetric``, ``fp32`` …, and settings behind it: ``int4:32@name=value,…``.

    Raises:
        BuildError: anything else.
    """
    kind, _, rest = text.partition("@")
    name, _, after = kind.partition(":")
    block, _, symmetry = after.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if (block and not block.isdigit()) or symmetry not in {"", "asymmetric"} or not all(value for _, _, value in pairs):
        raise BuildError(
            f"{text!r} is no precision; write int4:32, int8, int4:128:asymmetric, fp32 or int4:32@key=value"
        )
    settings = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
    return Precision.of(name, int(block) if block else None, not symmetry), settings  # type: ignore[arg-type]


def start(setup: Setup, opened: ExitStack, report: Report) -> list[Worker]:
    """Every engine of a setup, loaded; all at once they hold what each of them holds.

    Raises:
        BuildError: a peer cannot be installed, or the checkpoint not be built.
        ServerUnavailableError: a worker does not start.
    """
    workers = [_ours(setup, text, opened, report) for text in setup.ours]
    if LLAMA not in setup.without:
        report("installing llama.cpp (it is compiled, which takes minutes) …")
        packages = install_llama(setup.folder / "peers")
        for kind, path in gguf_files(setup, packages, report).items():
            report(f"loading {LLAMA} {kind} …")
            arguments = [str(path), *setup.sizes]
            workers.append(_worker(setup, opened, f"{LLAMA} {kind}", "llama_worker", arguments, [packages]))
    if TRANSFORMERS not in setup.without:
        report("loading transformers …")
        workers.append(start_transformers(setup, opened, f"{TRANSFORMERS} bf16", "bfloat16"))
    if not workers:
        raise BuildError("nothing is left to measure")
    return workers


def start_transformers(setup: Setup, opened: ExitStack, name: str, dtype: str) -> Worker:
    """transformers on the checkpoint.

    Raises:
        BuildError: PyTorch is not installed.
        ServerUnavailableError: it does not start.
    """
    require_torch()
    arguments = [str(setup.checkpoint), dtype, str(setup.threads)]
    return _worker(setup, opened, name, "transformers_worker", arguments)


def _ours(setup: Setup, text: str, opened: ExitStack, report: Report) -> Worker:
    precision, changed = read_label(text)
    report(f"building {text} …")
    kind = label(precision).replace(":", "-")
    repository = setup.folder / "repositories" / f"{setup.checkpoint.resolve().name}-{kind}"
    build(setup.checkpoint, repository, Options(precision))
    settings = Config(
        max_batch_size=max(setup.plan.batches),
        max_context_length=setup.context,
        max_draft=0,
        num_threads=setup.threads,
        target_inter_token_ms=NEVER_MS,
    )
    values = json.dumps({**settings.changed(), **changed})
    return _worker(setup, opened, f"wicore {text}", "wicore_worker", [str(repository), values])


def _worker(
    setup: Setup, opened: ExitStack, name: str, module: str, arguments: list[str], folders: Sequence[Path] = ()
) -> Worker:
    log = setup.folder / "logs" / ("".join(each if each.isalnum() else "-" for each in name) + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    module = f"client.bench.peers.{module}"
    worker = Worker(name, module, arguments, folders=folders, threads=setup.threads, log=log)
    return opened.enter_context(worker)


def _state(checkpoint: Path) -> str:
    """A hash that changes with the checkpoint's files; no weight is read."""
    paths = [checkpoint / "config.json", *weight_files(checkpoint)]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def gguf_files(setup: Setup, packages: Path, report: Report) -> dict[str, Path]:
    """The checkpoint in the GGUF types of a setup, by type; written where they are not there yet.

    Raises:
        BuildError: they cannot be written.
    """
    folder = setup.folder / "gguf" / f"{setup.checkpoint.resolve().name}-{_state(setup.checkpoint)}"
    files = {kind: folder / f"{kind}.gguf" for kind in setup.gguf}
    missing = [kind for kind, path in files.items() if not path.exists()]
    if not missing:
        return files
    report(f"writing GGUF files ({', '.join(missing)}) …")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "client.bench.peers.gguf_files", str(setup.checkpoint), str(folder)]
    done = subprocess.run(
        [*command, str(setup.threads), *missing],
        env=environment([packages], setup.threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise BuildError(f"cannot write GGUF files of {setup.checkpoint}: {reason}")
    return files
