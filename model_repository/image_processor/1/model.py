"""The stage lives in the package; Triton looks for it here."""

from python_backends.image_processor import TritonPythonModel as TritonPythonModel
