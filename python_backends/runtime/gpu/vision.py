"""`VisionRuntime` on a GPU: the tower's plan, recorded once for each number of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from python_backends.runtime.base import Float32, UInt8
from python_backends.runtime.gpu.launch import Device, Recording
from python_backends.runtime.gpu.plan_execution import PlanRunner
from python_backends.runtime.gpu.plans import VISION, PlanIndex


class PlanVision:
    """`VisionRuntime` over a device, which is closed with it. Not thread-safe.

    Args:
        device: where the plan runs.
        folder: of the plan.
        index: the one it is in.

    Raises:
        ArtifactError: the plan cannot be loaded here.
        ConfigError: the device has no room.
    """

    def __init__(self, device: Device, folder: Path, index: PlanIndex) -> None:
        self._device, self._runner = device, PlanRunner(device, folder, index, VISION)
        plan = self._runner.plan
        (pixels,), (features,) = plan.inputs, plan.outputs
        self.max_images = max(profile.shapes[pixels.name][-1][0] for profile in plan.profiles)
        self._pixels = device.allocate(pixels.dtype, self.max_images, *pixels.shape[1:])
        self._features = device.allocate(features.dtype, self.max_images, *features.shape[1:])
        needed = self._runner.scratch_bytes()
        self._runner.use_scratch(device.allocate("u8", max(1, needed)))
        self._recordings: dict[int, Recording] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `VisionRuntime.image_shape`."""
        _, channels, height, width = self._pixels.shape
        return channels, height, width

    def encode(self, pixels: UInt8) -> Float32:
        """See `VisionRuntime.encode`."""
        self._device.activate()
        parts = [self._encode(pixels[at : at + self.max_images]) for at in range(0, len(pixels), self.max_images)]
        return np.concatenate(parts) if parts else np.empty((0, *self._features.shape[1:]), np.float32)

    def recording(self, count: int) -> Recording:
        """The plan over ``count`` images."""
        if count not in self._recordings:
            bindings = {
                tensor.name: buffer.view(0, count, *buffer.shape[1:])
                for tensor, buffer in (
                    (self._runner.plan.inputs[0], self._pixels),
                    (self._runner.plan.outputs[0], self._features),
                )
            }
            self._recordings[count] = self._device.record([self._runner.operation(bindings)])
            self._runner.save()
        return self._recordings[count]

    def close(self) -> None:
        """Free everything on the device."""
        self._device.activate()
        self._device.synchronize()
        self._recordings.clear()
        self._runner.close()
        self._device.close()

    def _encode(self, pixels: UInt8) -> Float32:
        count = len(pixels)
        recording = self.recording(count)
        self._device.write(self._pixels.view(0, *pixels.shape), np.ascontiguousarray(pixels))
        recording.replay()
        found: Float32 = self._device.read(self._features.view(0, count, *self._features.shape[1:]))
        return found
