"""transformers with PyTorch as a peer."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.bench.peers.protocol import Prompt, serve

ATTENTION = ["sdpa", "eager"]
"""What transformers offers on a CPU."""


class Transformers:
    """The checkpoint's language model, stepped by hand: no time goes to `generate`.

    Raises:
        RuntimeError: a weight of the model is not in the checkpoint. transformers would make one up and only warn.
    """

    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

        torch.set_num_threads(threads)
        self._torch = torch
        kind = AutoConfig.from_pretrained(checkpoint).model_type
        architecture = Gemma3ForConditionalGeneration if kind == "gemma3" else Gemma3ForCausalLM
        model, report = architecture.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation=ATTENTION[0], output_loading_info=True
        )
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if wrong:
            raise RuntimeError(
                f"transformers did not find {len(wrong)} weights in the checkpoint, among them {wrong[0]}"
            )
        self._model = model.eval()

    def variants(self) -> list[str]:
        """See `Peer.variants`."""
        return list(ATTENTION)

    def use(self, variant: str) -> None:
        """See `Peer.use`."""
        self._model.set_attn_implementation(variant)

    def keep(self, variants: Sequence[str]) -> None:
        """See `Peer.keep`; they share everything."""

    def _step(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """Tokens drawn [B, 1] and the cache."""
        with self._torch.inference_mode():
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    def prefill(self, prompt: Prompt) -> float:
        """See `Peer.prefill`."""
        begin = time.perf_counter()
        self._step(self._torch.tensor([list(prompt)]), None)
        return time.perf_counter() - begin

    def decode(self, prompts: Sequence[Prompt], tokens: int) -> list[float]:
        """See `Peer.decode`."""
        drawn, cache = self._step(self._torch.tensor([list(prompt) for prompt in prompts]), None)
        seconds = []
        for _ in range(tokens - 1):
            begin = time.perf_counter()
            drawn, cache = self._step(drawn, cache)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def logits(self, prompt: Prompt, last: int) -> NDArray[np.float32]:
        """See `Peer.logits`."""
        ids = self._torch.tensor([list(prompt)])
        with self._torch.inference_mode():
            output = self._model(input_ids=ids, use_cache=False, logits_to_keep=last)
        values: NDArray[np.float32] = output.logits[0].float().numpy()
        return values


if __name__ == "__main__":
    serve(Transformers(sys.argv[1], sys.argv[2], int(sys.argv[3])))
