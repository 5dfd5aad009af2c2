"""The vision tower and projector as a TensorRT plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from python_backends.errors import InternalError
from python_backends.runtime.base import Float32, UInt8
from python_backends.runtime.gpu.cuda import CudaDevice
from python_backends.runtime.gpu.execution import LoadedPlan
from python_backends.runtime.gpu.plans import VISION, PlanIndex

PIXELS, FEATURES = "pixels", "image_features"


class PlanVision:
    """`VisionRuntime` over the plan. Not thread-safe; closes the device.

    Args:
        device: with memory for the plan's scratch and the images of a run.
        folder: of the plan.
        index: it is in.

    Raises:
        ArtifactError: a plan of another version or for another GPU.
        ConfigError: the GPU's memory does not suffice.
    """

    def __init__(self, device: CudaDevice, folder: Path, index: PlanIndex) -> None:
        self._device = device
        plan = index[VISION]
        self._loaded = LoadedPlan(device, folder, index, plan)
        self._most = max(profile.shapes[PIXELS][-1][0] for profile in plan.profiles)
        (_, channels, height, width), (_, tokens, hidden) = plan.inputs[0].shape, plan.outputs[0].shape
        self._image_shape = (channels, height, width)
        self._pixels = device.allocate("u8", self._most, channels, height, width)
        self._features = device.allocate("fp32", self._most, tokens, hidden)
        self._is_saved = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return self._image_shape

    def encode(self, pixels: UInt8) -> Float32:
        """[N, 3, H, W] uint8 RGB → [N, tokens_per_image, D] float32, as many images at once as the plan takes.

        Raises:
            InternalError: another shape, or a failure of TensorRT or the driver.
        """
        if pixels.shape[1:] != self._image_shape or pixels.dtype != np.uint8:
            raise InternalError(f"pixels {pixels.dtype}{list(pixels.shape)}; wanted uint8 [N, {self._image_shape}]")
        self._device.activate()
        features = np.empty((len(pixels), *self._features.shape[1:]), np.float32)
        for start in range(0, len(pixels), self._most):
            self._run(pixels[start : start + self._most], features[start : start + self._most])
        if not self._is_saved:
            self._loaded.save_kernels()
            self._is_saved = True
        return features

    def _run(self, pixels: UInt8, into: Float32) -> None:
        count = len(pixels)
        source = self._pixels.view(0, count, *self._pixels.shape[1:])
        target = self._features.view(0, count, *self._features.shape[1:])
        self._device.write(source, pixels)
        self._loaded.execution({PIXELS: source, FEATURES: target}).issue(self._device.stream)
        self._device.read(target, into)

    def close(self) -> None:
        """Free everything on the GPU."""
        self._device.close()
