"""The residual stream's first value: rows of the embedding table, or of an image's features."""

from __future__ import annotations

from python_backends.runtime.gpu.device_weights import Matrix
from python_backends.runtime.gpu.kernels.lang import jit, power_of_two, tl
from python_backends.runtime.gpu.launch import Launch, Tensor
from python_backends.runtime.gpu.weights import GROUP


@jit
def embed_kernel(
    ids,
    table,
    table_scale,
    image_index,
    features,
    stream,
    FACTOR: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUP: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Grid (M,). STORAGE: "float", "row" (a scale per row) or "int4" (two values a byte, a scale per group)."""
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    row = tl.load(ids + token).to(tl.int64)
    if STORAGE == "int4":
        packed = tl.load(table + row * ((D + 1) // 2) + columns // 2, mask=inside, other=0).to(tl.int32)
        scale = tl.load(table_scale + row * ((D + GROUP - 1) // GROUP) + columns // GROUP, mask=inside, other=0.0)
        values = (((packed >> (columns % 2 * 4)) & 15) - 8).to(tl.float32) * scale.to(tl.float32)
    else:
        values = tl.load(table + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        if STORAGE == "row":
            values *= tl.load(table_scale + row)
    values *= FACTOR
    if IMAGES:
        image = tl.load(image_index + token).to(tl.int64)
        is_image = image >= 0
        found = tl.load(features + tl.maximum(image, 0) * D + columns, mask=inside & is_image, other=0.0)
        values = tl.where(is_image, found, values)
    tl.store(stream + token.to(tl.int64) * D + columns, values, mask=inside)


def embed(
    ids: Tensor,
    table: Matrix,
    stream: Tensor,
    *,
    scale: float,
    image_index: Tensor | None = None,
    features: Tensor | None = None,
) -> Launch:
    """``stream[token] = table[ids[token]] · scale``, or a row of ``features`` where ``image_index`` names one.

    Args:
        ids: int32 [B, S]; padding too must be a token.
        table: [V, D], in any storage.
        stream: float32 [M, D].
        scale: the square root of D.
        image_index: int32 [B, S], −1 for text; None for a chunk without image.
        features: float32 [*, D]; not scaled.
    """
    tokens, columns = stream.shape
    images = image_index is not None and features is not None
    storage = "float" if table.scale is None else "int4" if table.data.dtype == "u8" else "row"
    return Launch(
        "embed.embed_kernel",
        (tokens, 1, 1),
        (ids, table.data, table.scale, image_index if images else None, features if images else None, stream),
        {
            "FACTOR": scale,
            "D": columns,
            "BLOCK": power_of_two(columns),
            "STORAGE": storage,
            "GROUP": GROUP,
            "IMAGES": images,
        },
        num_warps=8 if columns > 2048 else 4,
    )
