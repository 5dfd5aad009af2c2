"""Model repositories of a few lines, loaded by a real tritonserver."""

from __future__ import annotations

from pathlib import Path

CONFIG = """
backend: "python"
max_batch_size: 1
model_transaction_policy { decoupled: true }
instance_group [ { kind: KIND_CPU count: 1 } ]
input [ { name: "number" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "next" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""

COUNTER = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            start = pb_utils.get_input_tensor_by_name(request, "number").as_numpy()
            sender = request.get_response_sender()
            for step in range(PIECES):
                tensor = pb_utils.Tensor("next", (start + step).astype(np.int32))
                sender.send(pb_utils.InferenceResponse([tensor]))
                time.sleep(0.01)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

FAILING = """
from python_backends.errors import ArtifactError

class TritonPythonModel:
    def initialize(self, args):
        raise ArtifactError("weights.bin is corrupt; run `wicore build`")
"""


def add_model(repository: Path, name: str, code: str, config: str = CONFIG) -> None:
    """Write one Python model."""
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config, encoding="utf-8")
    (repository / name / "1" / "model.py").write_text(code, encoding="utf-8")


def add_counter(repository: Path, name: str = "counter", pieces: int = 3) -> None:
    """A model that streams ``pieces`` numbers."""
    add_model(repository, name, COUNTER.replace("PIECES", str(pieces)))
