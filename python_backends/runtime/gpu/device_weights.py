"""A decoder's weights on a device: one allocation, filled from the weight file front to back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from python_backends.errors import ArtifactError
from python_backends.runtime.gpu.launch import Device, Tensor
from python_backends.runtime.gpu.weights import Entry, GpuWeights, Names

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Matrix:
    """A weight [N, K] in one of the storage types of `python_backends.runtime.gpu.weights`."""

    data: Tensor
    scale: Tensor | None
    """Of quantized weights."""
    columns: int
    """K."""

    @property
    def rows(self) -> int:
        """N."""
        return self.data.shape[0]

    @property
    def num_bytes(self) -> int:
        """What a product reads."""
        return self.data.num_bytes + (self.scale.num_bytes if self.scale else 0)


class DeviceWeights:
    """Tensors by the names of `Names`."""

    def __init__(self, index: GpuWeights, base: Tensor) -> None:
        self.activation = index.activation
        self.epsilon = index.rms_norm_eps
        self.embed_scale = index.embed_scale
        self._index, self._base = index, base

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return self._base.num_bytes

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def vector(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            ArtifactError: there is none of that name.
        """
        return self._tensor(self._index[name])

    def matrix(self, name: str, columns: int) -> Matrix:
        """A weight of ``columns`` columns, with its scales.

        Raises:
            ArtifactError: there is none of that name.
        """
        scale = Names.scale(name)
        return Matrix(self.vector(name), self.vector(scale) if scale in self._index else None, columns)

    def _tensor(self, entry: Entry) -> Tensor:
        return Tensor(self._base.address + entry.offset, entry.dtype, entry.shape)


def load_weights(device: Device, index: GpuWeights, progress: Callable[[int], None] | None = None) -> DeviceWeights:
    """Copy the weight file to the device. ``progress`` is told the bytes of every piece.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: the device has no room for it.
    """
    base = device.allocate("u8", index.num_bytes)
    piece = np.empty(_PIECE_BYTES, np.uint8)
    try:
        with index.path.open("rb", buffering=0) as file:
            for start in range(0, index.num_bytes, _PIECE_BYTES):
                wanted = min(_PIECE_BYTES, index.num_bytes - start)
                done = 0
                while done < wanted:
                    count = file.readinto(piece.data[done:wanted])
                    if not count:
                        raise ArtifactError(f"{index.path} is truncated; build again with `wicore build --force`")
                    done += count
                device.write(base.view(start, wanted), piece[:wanted])
                if progress is not None:
                    progress(wanted)
    except OSError as error:
        raise ArtifactError(f"{index.path} cannot be read: {error.strerror}") from error
    return DeviceWeights(index, base)
