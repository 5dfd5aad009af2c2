"""The stage lives in the package; Triton looks for it here."""

from python_backends.tokenizer import TritonPythonModel as TritonPythonModel
