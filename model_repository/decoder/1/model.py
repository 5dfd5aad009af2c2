"""The stage lives in the package; Triton looks for it here."""

from python_backends.decoder.backend import TritonPythonModel as TritonPythonModel
