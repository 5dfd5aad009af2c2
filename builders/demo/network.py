# mypy: disable-error-code="misc, untyped-decorator"
"""The demo model's forward pass for training on packed rows: the numbers of transformers' Gemma-3, in fewer passes.

It reads the parameters of a ``Gemma3ForConditionalGeneration`` in place. Matrix products take bfloat16 inputs (CPUs
with AMX and GPUs multiply those many times faster) while norms, softmax and the residual stream stay float32. The parts
of a layer before, in and after attention are functions for `torch.compile`, compiled once and used by all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration

BLOCKED = -1e9  # a mask's value: exp of it is 0 in every float type used here
Batch = dict[str, Tensor]
Weights = list[Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Gemma's RMS norm over the last axis, in float32: weights count from 1."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The vision tower's norm, in float32."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), 1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _scores_to_output(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised weights ``exp(qk + bias)``, their sums, and the weighted mean of ``v``.

    q (B · groups, heads · L, d), k and v (B · groups, L, d), bias (B, L, L). Scores of normalised queries and keys are
    small, so that no maximum need be subtracted; 60 is out of their reach.
    """
    scores = torch.bmm(q, k.mT)
    batch, length = bias.shape[0], bias.shape[-1]
    shaped = scores.view(batch, -1, bias.shape[-2], length).float().clamp_max(60.0) + bias[:, None]
    weights = torch.exp(shaped)
    sums = weights.sum(-1).view(q.shape[0], -1, 1)
    weights = weights.to(q.dtype).view(scores.shape)
    output = (torch.bmm(weights, v).float() / sums).to(q.dtype)
    return output, weights, sums


def _attention_gradient(grad: Tensor, saved: Weights) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, output, weights, sums = saved
    scaled = (grad.float() / sums).to(q.dtype)
    shift = -(grad.float() * output.float()).sum(-1, keepdim=True) / sums
    scores = ((torch.bmm(scaled, v.mT).float() + shift) * weights.float()).to(q.dtype)
    return torch.bmm(scores, k), torch.bmm(scores.mT, q), torch.bmm(weights.mT, scaled)


class Compiled:
    """The pieces of the forward pass, compiled or (``enabled=False``) as they are."""

    def __init__(self, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        def maybe(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if enabled else function

        forward, backward = maybe(_scores_to_output), maybe(_attention_gradient)

        class Attention(torch.autograd.Function):
            """`_scores_to_output` with its gradient taken from the saved weights instead of computing them again."""

            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                output, weights, sums = forward(q, k, v, bias)
                ctx.save_for_backward(q, k, v, output, weights, sums)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
                return (*backward(grads[0], list(ctx.saved_tensors)), None)

        self.dtype = dtype
        self.attention = Attention.apply
        self.text_before = maybe(_text_before_attention)
        self.text_after = maybe(_text_after_attention)
        self.vision_before = maybe(_vision_before_attention)
        self.vision_after = maybe(_vision_after_attention)


def _text_before_attention(
    x: Tensor, rope: tuple[Tensor, Tensor], w: Weights, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    norm, q_norm, k_norm, wq, wk, wv = w
    batch, length, _ = x.shape
    size = q_norm.shape[0]
    cos, sin = (part[:, :, None] for part in rope)
    fused = rms_norm(x, norm).to(dtype) @ torch.cat((wq, wk, wv)).to(dtype).T
    q, k, v = fused.split((wq.shape[0], wk.shape[0], wv.shape[0]), -1)
    q = _rotate(rms_norm(q.view(batch, length, -1, size), q_norm), cos, sin) * size**-0.5
    k = _rotate(rms_norm(k.view(batch, length, groups, size), k_norm), cos, sin)
    v = v.view(batch, length, groups, size).transpose(1, 2).reshape(batch * groups, length, size)
    q = q.transpose(1, 2).reshape(batch * groups, -1, size)
    k = k.transpose(1, 2).reshape(batch * groups, length, size)
    return q.to(dtype), k.to(dtype), v


def _text_after_attention(x: Tensor, mixed: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    wo, norm_after, norm_before_mlp, norm_after_mlp, gate, up, down = w
    batch, length, _ = x.shape
    size = mixed.shape[-1]
    joined = mixed.view(batch, -1, length, size).transpose(1, 2).reshape(batch, length, -1)
    x = x + rms_norm(joined @ wo.to(dtype).T, norm_after)
    hidden = rms_norm(x, norm_before_mlp).to(dtype)
    opened, passed = (hidden @ torch.cat((gate, up)).to(dtype).T).chunk(2, -1)
    inner = nn.functional.gelu(opened.float(), approximate="tanh") * passed.float()
    return x + rms_norm(inner.to(dtype) @ down.to(dtype).T, norm_after_mlp)


def _vision_before_attention(x: Tensor, w: Weights, heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    scale, shift, wq, bq, wk, bk, wv, bv = w
    batch, length, width = x.shape
    fused = layer_norm(x, scale, shift).to(dtype) @ torch.cat((wq, wk, wv)).to(dtype).T
    fused = fused.float() + torch.cat((bq, bk, bv))
    size = width // heads
    q, k, v = fused.view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    flat = (batch * heads, length, size)
    return (q * size**-0.5).to(dtype).reshape(flat), k.to(dtype).reshape(flat), v.to(dtype).reshape(flat)


def _vision_after_attention(x: Tensor, mixed: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    wo, bo, scale, shift, w1, b1, w2, b2 = w
    batch, length, width = x.shape
    joined = mixed.view(batch, -1, length, mixed.shape[-1]).transpose(1, 2).reshape(batch, length, width)
    x = x + (joined @ wo.to(dtype).T).float() + bo
    hidden = layer_norm(x, scale, shift).to(dtype) @ w1.to(dtype).T
    inner = nn.functional.gelu(hidden.float() + b1, approximate="tanh")
    return x + (inner.to(dtype) @ w2.to(dtype).T).float() + b2


def attention_masks(document: Tensor, feature: Tensor, window: int, per_image: int) -> tuple[Tensor, Tensor]:
    """Additive float32 masks (rows, length, length) of the local and of the global layers for packed rows.

    Within a document attention is causal, in local layers back to ``window`` tokens; within one image it is both ways.
    ``document`` and ``feature`` are (rows, length) as `samples.Packer` lays them out.
    """
    length = document.shape[1]
    index = torch.arange(length, device=document.device)
    back = index[:, None] - index[None, :]
    image = torch.where(feature < 0, -1, feature // per_image)
    same_image = (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, :, None]
    same = document[:, :, None] == document[:, None, :]
    everything = same & ((back >= 0) | same_image)
    near = same & (((back >= 0) & (back < window)) | same_image)
    local, everywhere = (torch.where(mask, 0.0, BLOCKED) for mask in (near, everything))
    return local, everywhere


class PackedNetwork:
    """Runs ``model``'s parameters on packed batches; see the module's text."""

    def __init__(self, model: Gemma3ForConditionalGeneration, pieces: Compiled) -> None:
        self.model, self.pieces = model, pieces
        text = model.config.text_config
        self.groups, self.head = text.num_key_value_heads, text.head_dim
        self.window, self.per_image = text.sliding_window, model.config.mm_tokens_per_image
        self.is_local = [kind == "sliding_attention" for kind in text.layer_types]
        rope = text.rope_parameters
        self.local_rope = (rope["sliding_attention"]["rope_theta"], 1.0)
        self.global_rope = (rope["full_attention"]["rope_theta"], rope["full_attention"].get("factor", 1.0))

    def _rope(self, position: Tensor, theta: float, factor: float) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.head, 2, device=position.device).float() / self.head
        angle = position[..., None].float() * (theta**-exponent / factor)
        return angle.cos(), angle.sin()

    def image_features(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 pictures → (n, image tokens, text width) float32."""
        inner, pieces = self.model.model, self.pieces
        tower = inner.vision_tower
        tower = getattr(tower, "vision_model", tower)
        patch = tower.embeddings.patch_embedding
        count, size = pixels.shape[0], patch.weight.shape[-1]
        grid = pixels.shape[-1] // size
        scaled = pixels.to(torch.float32).div(127.5).sub(1)
        patches = (
            scaled.view(count, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, -1)
        )
        x = (patches.to(pieces.dtype) @ patch.weight.flatten(1).to(pieces.dtype).T).float() + patch.bias
        x = x + tower.embeddings.position_embedding.weight
        heads = self.model.config.vision_config.num_attention_heads
        nothing = x.new_zeros(count, x.shape[1], x.shape[1])
        for layer in tower.encoder.layers:
            attn, mlp = layer.self_attn, layer.mlp
            before: Weights = [layer.layer_norm1.weight, layer.layer_norm1.bias]
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
                before += [linear.weight, linear.bias]
            after: Weights = [
                attn.out_proj.weight,
                attn.out_proj.bias,
                layer.layer_norm2.weight,
                layer.layer_norm2.bias,
            ]
            after += [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
            mixed = pieces.attention(*pieces.vision_before(x, before, heads, pieces.dtype), nothing)
            x = pieces.vision_after(x, mixed, after, pieces.dtype)
        x = layer_norm(x, tower.post_layernorm.weight, tower.post_layernorm.bias)
        side = round(self.per_image**0.5)
        pooled = x.view(count, side, grid // side, side, grid // side, -1).mean((2, 4)).flatten(1, 2)
        projector = inner.multi_modal_projector
        normed = rms_norm(pooled, projector.mm_soft_emb_norm.weight)
        return (normed.to(pieces.dtype) @ projector.mm_input_projection_weight.to(pieces.dtype)).float()

    def hidden(self, batch: Batch, features: Tensor) -> Tensor:
        """The text model's output before the head: (rows, length, width) float32."""
        inner, pieces = self.model.model.language_model, self.pieces
        table = inner.embed_tokens.weight
        index = batch["feature"]
        words = nn.functional.embedding(batch["ids"], table) * table.shape[1] ** 0.5
        flat = features.flatten(0, 1)
        x = torch.where((index >= 0)[..., None], flat[index.clamp_min(0)], words)
        local, everywhere = attention_masks(batch["document"], index, self.window, self.per_image)
        near = (local, self._rope(batch["position"], *self.local_rope))
        far = (everywhere, self._rope(batch["position"], *self.global_rope))
        for layer, is_local in zip(inner.layers, self.is_local, strict=True):
            mask, rope = near if is_local else far
            attn, mlp = layer.self_attn, layer.mlp
            before = [layer.input_layernorm.weight, attn.q_norm.weight, attn.k_norm.weight]
            before += [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
            after = [attn.o_proj.weight, layer.post_attention_layernorm.weight]
            after += [layer.pre_feedforward_layernorm.weight, layer.post_feedforward_layernorm.weight]
            after += [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
            q, k, v = pieces.text_before(x, rope, before, self.groups, pieces.dtype)
            # (batch, heads of a group, queries, keys) needs the mask once for all heads.
            mixed = pieces.attention(q, k, v, mask)
            x = pieces.text_after(x, mixed, after, pieces.dtype)
        return rms_norm(x, inner.norm.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 scores of all tokens for some of `hidden`'s vectors."""
        table = self.model.model.language_model.embed_tokens.weight
        return (hidden.to(self.pieces.dtype) @ table.to(self.pieces.dtype).T).float()
