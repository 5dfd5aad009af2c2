"""What a step is made of: the launches of the layers and of the head, for one bucket of shapes.

Buffers are allocated once and shared by all buckets, so recordings hold their addresses. What lies between two
attentions is `Products`' matter: kernels of ours, or TensorRT plans that take the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import ArtifactError, InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.gpu.device_weights import DeviceWeights
from python_backends.runtime.gpu.inputs import DECODE_POSITIONS, Bucket, StepLayout
from python_backends.runtime.gpu.kernels import (
    adjust,
    attention_mass,
    choice,
    decode_attention,
    decode_splits,
    embed,
    most_likely,
    norm,
    prefill_attention,
    ranking,
    rope,
    sampling,
)
from python_backends.runtime.gpu.kernels.most_likely import MAX_TOP_N
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows
from python_backends.runtime.gpu.kv import PagedKv
from python_backends.runtime.gpu.launch import Device, Launch, Operation, Tensor
from python_backends.runtime.gpu.weights import Names

_INPUT_WORDS = 1 << 20
"""Room for a step's small arrays beside its masks."""

_CHANGES = ("adjust_ids", "adjust_factor", "adjust_bias", "token_mask")

Step = Launch | Operation


class Products(Protocol):
    """What lies between two attentions: norms, products, residuals."""

    def first(self, tokens: int, stream: Tensor) -> tuple[list[Step], Tensor]:
        """The stream [M, D] → the first layer's packed qkv."""
        ...

    def between(self, layer: int, tokens: int, attended: Tensor, stream: Tensor) -> tuple[list[Step], Tensor | None]:
        """A layer's attention output [M, H·hd] → the stream behind the layer, in place, and the next layer's qkv.

        After the last layer there is none.
        """
        ...

    def logits(self, normed: Tensor, logits: Tensor) -> list[Step]:
        """Rows [R, D] → float32 [R, V]."""
        ...

    def save(self) -> None:
        """Keep what was compiled while the steps were recorded."""
        ...

    def close(self) -> None:
        """Free what is not the device's memory; nothing that was issued may still run."""
        ...


@dataclass(frozen=True)
class Results:
    """Where the head leaves what a bucket's steps wanted."""

    words: Tensor
    """All of the following but the logits, contiguous, as int32."""
    next_token: Tensor
    logprob: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    logits: Tensor


class Program:
    """Buffers of a decoder, and the launches over them."""

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        weights: DeviceWeights,
        products: Products,
        max_tokens: int,
        max_logit_rows: int,
    ) -> None:
        """Allocates everything but the KV.

        Raises:
            ArtifactError: a vocabulary that the sampling kernels cannot number.
            ConfigError: no such memory is left.
        """
        if model.vocab_size > ranking.MAX_VOCABULARY:
            raise ArtifactError(
                f"{model.vocab_size} tokens in the vocabulary; a GPU draws from {ranking.MAX_VOCABULARY}"
            )
        self._device, self._model, self._weights, self._products = device, model, weights, products
        width, act = model.num_heads * model.head_dim, weights.activation
        self.mask_words = -(-model.vocab_size // 32)
        self._words = device.allocate("i32", _INPUT_WORDS + max_logit_rows * self.mask_words)
        self.stream = device.allocate("fp32", max_tokens, model.hidden_size)
        self._query = device.allocate(act, max_tokens, model.num_heads, model.head_dim)
        self._fresh = device.allocate(act, max_tokens, 2 * model.num_kv_heads, model.head_dim)
        self._attended = device.allocate(act, max_tokens, width)
        self._normed = device.allocate(act, max_logit_rows, model.hidden_size)
        self._logits = device.allocate("fp32", max_logit_rows, model.vocab_size)
        self._adjusted = device.allocate("fp32", max_logit_rows, model.vocab_size)
        self._results = device.allocate("i32", 2 * (max_logit_rows + 4) * (1 + MAX_TOP_N))
        self._pieces = choice.Scratch.allocate(device, max_logit_rows, model.vocab_size)
        self._drawing = sampling.Scratch.allocate(device, max_logit_rows)
        self._ranks = most_likely.allocate_scratch(device, max_logit_rows, model.vocab_size)
        self._features = device.allocate("fp32", max_tokens if model.image else 1, model.hidden_size)
        global_layers = [layer for layer, kind in enumerate(model.layer_types) if kind == "global"]
        self._observed = global_layers[len(global_layers) // 2]

    def bind(self, kv: PagedKv, max_rows: int) -> None:
        """Take the caches, once they are made of what memory is left."""
        model = self._model
        counts = {"global": 0, "local": 0}
        self._layers: list[LayerKv] = []
        for kind in model.layer_types:
            if kind == "global":
                layer = LayerKv(kv.global_pool, kv.global_table, counts[kind])
            else:
                layer = LayerKv(kv.local_pool, kv.local_table, counts[kind], model.sliding_window)
            counts[kind] += 1
            self._layers.append(layer)
        tiles = decode_splits.mass_tiles(self._layers[self._observed])
        self._scratch = decode_splits.Scratch.allocate(
            self._device, max_rows * DECODE_POSITIONS, model.num_heads, model.head_dim, max_rows, tiles
        )
        self._masses = self._device.allocate("fp32", max_rows, kv.global_table.shape[1])

    # --- what goes in and comes out ---------------------------------------------------------------------------

    def words(self, count: int) -> Tensor:
        """The first words of the buffer that steps' small arrays are written to.

        Raises:
            InternalError: more than there are.
        """
        if count > self._words.size:
            raise InternalError(f"{count} words of step inputs; there is room for {self._words.size}")
        return self._words.view(0, count)

    def write_features(self, features: NDArray[np.float32]) -> None:
        """Image embeddings [M, D] of the next step."""
        if len(features):
            target = self._features.view(0, len(features), self._model.hidden_size)
            self._device.write(target, np.ascontiguousarray(features, np.float32))

    def results(self, bucket: Bucket) -> Results:
        """Where a bucket's steps leave their results."""
        rows, top = bucket.logit_rows, bucket.top_n if bucket.top_n <= MAX_TOP_N else 0
        step = -(-rows // 4) * 4  # addresses are multiples of 16 bytes
        words, at = self._results, self._results.address

        def part(first: int, dtype: str, *shape: int) -> Tensor:
            return Tensor(at + 4 * first, dtype, shape)

        return Results(
            words.view(0, 2 * step * (1 + top)),
            part(0, "i32", rows),
            part(step, "fp32", rows),
            part(2 * step, "i32", rows, top) if top else None,
            part(2 * step + step * top, "fp32", rows, top) if top else None,
            self._logits.view(0, rows, self._model.vocab_size),
        )

    def read_masses(self, rows: int, pages: int) -> NDArray[np.float32]:
        """[rows, pages] of the last step that wanted masses."""
        width = self._masses.shape[1]
        found: NDArray[np.float32] = self._device.read(self._masses.view(0, rows, width))[:, :pages]
        return found

    # --- the layers -------------------------------------------------------------------------------------------

    def layers(self, bucket: Bucket, layout: StepLayout) -> list[Step]:
        """From token ids to the stream behind the last layer; keys and values are appended to the caches."""
        inputs = layout.tensors(self._words)
        tokens, model = bucket.tokens, self._model
        stream = self.stream.view(0, tokens, model.hidden_size)
        rows = Rows(inputs["past_len"], inputs["query_len"], inputs["slot_base"], bucket.positions)
        steps: list[Step] = [
            embed.embed(
                inputs["input_ids"],
                self._weights.matrix(Names.EMBED, model.hidden_size),
                stream,
                scale=self._weights.embed_scale,
                image_index=inputs.get("image_index"),
                features=self._features if bucket.images else None,
            )
        ]
        found, first = self._products.first(tokens, stream)
        steps += found
        qkv: Tensor | None = first
        for layer in range(model.num_layers):
            if qkv is None:
                raise InternalError(f"no projections for layer {layer}")
            steps += self._attention(layer, bucket, rows, qkv, inputs.get("image_group"))
            attended = self._attended.view(0, tokens, self._attended.shape[1])
            found, qkv = self._products.between(layer, tokens, attended, stream)
            steps += found
        return steps

    def _attention(self, layer: int, bucket: Bucket, rows: Rows, qkv: Tensor, group: Tensor | None) -> list[Step]:
        model, kv, capability = self._model, self._layers[layer], self._device.capability
        tokens = bucket.tokens
        query = self._query.view(0, tokens, model.num_heads, model.head_dim)
        fresh = self._fresh.view(0, tokens, 2 * model.num_kv_heads, model.head_dim)
        output = self._attended.view(0, tokens, self._attended.shape[1])
        is_global = kv.window == 0
        # A chunk may overwrite what its first tokens still see of a ring, so there it is appended behind attention.
        at_once = bucket.is_decode or is_global
        steps: list[Step] = [
            rope.rope_append(
                qkv,
                self._weights.vector(Names.layer(layer, Names.Q_NORM)),
                self._weights.vector(Names.layer(layer, Names.K_NORM)),
                self._weights.vector(Names.inverse_frequency("global" if is_global else "local")),
                rows,
                kv,
                query,
                fresh,
                epsilon=self._weights.epsilon,
                append=at_once,
            )
        ]
        wants_mass = bucket.mass and layer == self._observed
        mass = attention_mass.Mass(self._masses.view(0, bucket.rows, self._masses.shape[1]), kv.page_tokens)
        if bucket.is_decode:
            steps += decode_attention.decode_attention(
                query, kv, rows, output, self._scratch, capability=capability, mass=mass if wants_mass else None
            )
            return steps
        steps.append(
            prefill_attention.prefill_attention(
                query, fresh, kv, rows, output, image_group=group, capability=capability
            )
        )
        if not at_once:
            steps.append(rope.append(fresh, rows, kv))
        if wants_mass:
            steps += decode_attention.last_query_mass(query, kv, rows, self._scratch, mass, capability=capability)
        return steps

    # --- the head ---------------------------------------------------------------------------------------------

    def head(self, bucket: Bucket, layout: StepLayout) -> list[Step]:
        """From the stream to tokens and their log-probabilities.

        A greedy step reads the logits once; adjustments, draws and the most likely tokens are launches of their own.
        """
        inputs, results, model = layout.tensors(self._words), self.results(bucket), self._model
        stream = self.stream.view(0, bucket.tokens, model.hidden_size)
        normed = self._normed.view(0, bucket.logit_rows, model.hidden_size)
        gamma = self._weights.vector(Names.NORM)
        steps: list[Step] = [
            norm.gather_norm(stream, inputs["logit_positions"], gamma, normed, epsilon=self._weights.epsilon),
            *self._products.logits(normed, results.logits),
        ]
        chosen_from = results.logits
        if bucket.adjustments or bucket.masked:
            chosen_from = self._adjusted.view(0, bucket.logit_rows, model.vocab_size)
            changes = {name: inputs[name] for name in _CHANGES if name in inputs}
            steps += adjust.adjust(results.logits, chosen_from, bucket.wanted, **changes)
        steps.append(choice.largest(results.logits, chosen_from, self._pieces))
        if bucket.random:
            filters = sampling.Filters(*(inputs[field.name] for field in fields(sampling.Filters)))
            steps += sampling.draw(chosen_from, self._pieces.bests, inputs["targets"], filters, self._drawing)
        steps.append(
            choice.choose(
                results.logits,
                inputs["targets"],
                self._pieces,
                results.next_token,
                results.logprob,
                drawn=self._drawing.drawn if bucket.random else None,
                temperature=inputs.get("temperature"),
            )
        )
        if results.top_ids and results.top_logprobs:
            steps += most_likely.most_likely(
                results.logits, self._pieces, self._ranks, results.top_ids, results.top_logprobs
            )
        return steps
