"""The stage lives in the package; Triton looks for it here."""

from python_backends.vision_encoder import TritonPythonModel as TritonPythonModel
