"""What lies between two attentions, by kernels of ours: products that read each weight once, norms that add up parts.

Weights in eight bits meet activations in eight bits, quantized per token where they are made: the tensor cores take
both as they are, while widening weights in registers is bound by the widening (an H200 reads them at half its rate).
"""

from __future__ import annotations

from python_backends.manifest import ModelShape
from python_backends.runtime.gpu.device_weights import DeviceWeights, Matrix
from python_backends.runtime.gpu.kernels import linear, linear_config, norm
from python_backends.runtime.gpu.kernels.norm import Quantized
from python_backends.runtime.gpu.launch import Device, Launch, Operation, Tensor
from python_backends.runtime.gpu.weights import Names

_MAX_PARTS = 4
"""Parts of a split product that buffers hold."""
_EIGHT_BITS = frozenset(("fp8e4nv", "i8"))

Step = Launch | Operation
Activations = Tensor | Quantized


class KernelProducts:
    """`Products` over a decoder's weights."""

    def __init__(self, device: Device, model: ModelShape, weights: DeviceWeights, max_tokens: int) -> None:
        """Allocates what lies between the products of one layer; all layers share it."""
        self._model, self._weights, self._capability = model, weights, device.capability
        hidden, width = model.hidden_size, model.num_heads * model.head_dim
        self._packed = width + 2 * model.num_kv_heads * model.head_dim
        self._intermediate = self._matrix(0, Names.DOWN, None).columns
        act, widest = weights.activation, max(hidden, width, self._intermediate)
        self._normed = device.allocate(act, max_tokens, hidden)
        self._qkv = device.allocate(act, max_tokens, self._packed)
        self._sublayer = device.allocate(act, max_tokens, hidden)
        self._gated = device.allocate(act, max_tokens, self._intermediate)
        few = min(max_tokens, linear_config.SKINNY_TOKENS)
        self._parts = device.allocate("fp32", _MAX_PARTS, few, max(self._packed, hidden))
        self._eight_bits = {
            dtype: (device.allocate(dtype, max_tokens, widest), device.allocate("fp32", max_tokens))
            for dtype in sorted(_EIGHT_BITS & self._storages())
        }

    def first(self, tokens: int, stream: Tensor) -> tuple[list[Step], Tensor]:
        """See `Products.first`."""
        gamma = self._vector(0, Names.INPUT_NORM)
        x = self._for(self._matrix(0, Names.QKV, self._model.hidden_size), self._normed, tokens)
        steps: list[Step] = [norm.norm(stream, gamma, x, epsilon=self._weights.epsilon)]
        product, qkv = self._qkv_product(0, tokens, x)
        return [*steps, *product], qkv

    def between(self, layer: int, tokens: int, attended: Tensor, stream: Tensor) -> tuple[list[Step], Tensor | None]:
        """See `Products.between`."""
        model, epsilon = self._model, self._weights.epsilon
        width, hidden = model.num_heads * model.head_dim, model.hidden_size
        output = self._matrix(layer, Names.O, width)
        gate_up = self._matrix(layer, Names.GATE_UP, hidden)
        down = self._matrix(layer, Names.DOWN, None)

        x, steps = self._quantized(output, attended)
        product, projected = self._product(output, x, self._sublayer, tokens)
        normed = self._for(gate_up, self._normed, tokens)
        post, pre = self._vector(layer, Names.POST_ATTENTION_NORM), self._vector(layer, Names.PRE_FEEDFORWARD_NORM)
        steps += [*product, norm.add_norm(projected, post, stream, pre, normed, epsilon=epsilon)]

        gated = self._gated.view(0, tokens, self._intermediate)
        steps += linear.product(gate_up, normed, gated, capability=self._capability, gated=True)
        x, quantize = self._quantized(down, gated)
        product, projected = self._product(down, x, self._sublayer, tokens)
        steps += [*quantize, *product]
        post = self._vector(layer, Names.POST_FEEDFORWARD_NORM)
        if layer + 1 == model.num_layers:
            return [*steps, norm.add_norm(projected, post, stream, epsilon=epsilon)], None
        pre = self._vector(layer + 1, Names.INPUT_NORM)
        normed = self._for(self._matrix(layer + 1, Names.QKV, hidden), self._normed, tokens)
        steps.append(norm.add_norm(projected, post, stream, pre, normed, epsilon=epsilon))
        product, qkv = self._qkv_product(layer + 1, tokens, normed)
        return [*steps, *product], qkv

    def logits(self, normed: Tensor, logits: Tensor) -> list[Step]:
        """See `Products.logits`. Weights in eight bits are widened here: what they meet is not rounded for the head."""
        name = Names.HEAD if Names.HEAD in self._weights else Names.EMBED
        head = self._weights.matrix(name, self._model.hidden_size)
        return list(linear.product(head, normed, logits, capability=self._capability))

    def save(self) -> None:
        """See `Products.save`: kernels are kept where they are compiled."""

    def close(self) -> None:
        """See `Products.close`: all of it is the device's."""

    def _qkv_product(self, layer: int, tokens: int, x: Activations) -> tuple[list[Step], Tensor]:
        return self._product(self._matrix(layer, Names.QKV, self._model.hidden_size), x, self._qkv, tokens)

    def _product(self, matrix: Matrix, x: Activations, whole: Tensor, tokens: int) -> tuple[list[Step], Tensor]:
        """A product, and where it lies: in ``whole``, or in parts that the next kernel adds up."""
        parts = min(_MAX_PARTS, linear_config.split_parts(matrix, tokens, self._capability))
        output = self._parts.view(0, parts, tokens, matrix.rows) if parts > 1 else whole.view(0, tokens, matrix.rows)
        return list(linear.product(matrix, x, output, capability=self._capability)), output

    def _quantized(self, matrix: Matrix, x: Tensor) -> tuple[Activations, list[Step]]:
        """Activations as a matrix takes them, and what makes them so."""
        if matrix.data.dtype not in self._eight_bits:
            return x, []
        target = self._target(matrix, *x.shape)
        return target, [norm.quantize(x, target)]

    def _for(self, matrix: Matrix, buffer: Tensor, tokens: int) -> Activations:
        """Where a norm leaves what a matrix reads."""
        if matrix.data.dtype not in self._eight_bits:
            return buffer.view(0, tokens, matrix.columns)
        return self._target(matrix, tokens, matrix.columns)

    def _target(self, matrix: Matrix, tokens: int, columns: int) -> Quantized:
        data, scale = self._eight_bits[matrix.data.dtype]
        return Quantized(data.view(0, tokens, columns), scale.view(0, tokens))

    def _matrix(self, layer: int, name: str, columns: int | None) -> Matrix:
        """A layer's matrix; the rows of gate_up say how many columns down has, whatever it is stored in."""
        if columns is None:
            columns = self._weights.vector(Names.layer(layer, Names.GATE_UP)).shape[0] // 2
        return self._weights.matrix(Names.layer(layer, name), columns)

    def _storages(self) -> set[str]:
        return {self._weights.vector(Names.layer(0, name)).dtype for name in Names.MATRICES}

    def _vector(self, layer: int, name: str) -> Tensor:
        return self._weights.vector(Names.layer(layer, name))
