"""The literal config.pbtxt files say what contract.py says."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from python_backends import contract
from tests.paths import MODEL_REPOSITORY

NAMES = [contract.ENSEMBLE, *contract.STAGES]


def config_of(name: str) -> model_config_pb2.ModelConfig:
    text = (MODEL_REPOSITORY / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def declared(tensors: object, *, inputs: bool) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    return {
        tensor.name: (
            model_config_pb2.DataType.Name(tensor.data_type),
            tuple(tensor.dims),
            inputs and tensor.optional,
        )
        for tensor in tensors  # type: ignore[attr-defined]
    }


def test_the_repository_holds_the_contracts_models_and_no_other() -> None:
    assert {path.parent.name for path in MODEL_REPOSITORY.glob("*/config.pbtxt")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_names_types_and_dims_agree(name: str) -> None:
    config, model = config_of(name), contract.MODELS[name]
    assert config.name == model.name == name
    assert config.max_batch_size >= 1
    assert declared(config.input, inputs=True) == {t.name: (t.dtype, t.dims, t.optional) for t in model.inputs}
    assert declared(config.output, inputs=False) == {t.name: (t.dtype, t.dims, False) for t in model.outputs}


@pytest.mark.parametrize("name", contract.STAGES)
def test_a_stage_runs_once_on_the_python_backend_and_re_exports_its_class(name: str) -> None:
    config = config_of(name)
    assert config.backend == "python"
    assert [(group.kind, group.count) for group in config.instance_group] == [
        (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    ]
    module = (MODEL_REPOSITORY / name / "1" / "model.py").read_text(encoding="utf-8")
    (line,) = [line for line in module.splitlines() if line.startswith("from ")]
    imported = line.split()[1].split(".")
    assert Path(*imported[:2]).name == name
    assert line.endswith("import TritonPythonModel as TritonPythonModel")


@pytest.mark.parametrize("name", [contract.TOKENIZER, contract.IMAGE_PROCESSOR, contract.VISION_ENCODER])
def test_stages_before_the_decoder_batch_requests_and_answer_once(name: str) -> None:
    config = config_of(name)
    assert config.HasField("dynamic_batching")
    assert config.max_batch_size > 1
    # A decoupled step inside an ensemble may not be joined with the client's own inputs, as the decoder joins them.
    assert not config.model_transaction_policy.decoupled


@pytest.mark.parametrize("name", [contract.TOKENIZER, contract.IMAGE_PROCESSOR])
def test_prompts_with_different_numbers_of_images_share_a_batch(name: str) -> None:
    assert all(tensor.allow_ragged_batch for tensor in config_of(name).input)


def test_the_vision_encoder_alone_has_the_response_cache() -> None:
    assert {name for name in NAMES if config_of(name).response_cache.enable} == {contract.VISION_ENCODER}


def test_the_decoder_alone_streams() -> None:
    assert {name for name in NAMES if config_of(name).model_transaction_policy.decoupled} == {contract.DECODER}


def test_the_ensembles_steps_fit_the_stages() -> None:
    config = config_of(contract.ENSEMBLE)
    known = {tensor.name: tensor.dtype for tensor in contract.MODELS[contract.ENSEMBLE].inputs}
    for step in config.ensemble_scheduling.step:
        model = contract.MODELS[step.model_name]
        inputs = {tensor.name: tensor for tensor in model.inputs}
        assert set(step.input_map) <= set(inputs)
        assert {tensor.name for tensor in model.inputs if not tensor.optional} <= set(step.input_map)
        for name, source in step.input_map.items():
            assert known[source] == inputs[name].dtype, f"{step.model_name} reads {name} from {source}"
        outputs = {tensor.name: tensor.dtype for tensor in model.outputs}
        for name, target in step.output_map.items():
            assert target not in known, f"two tensors named {target}"
            known[target] = outputs[name]
    assert {tensor.name for tensor in contract.MODELS[contract.ENSEMBLE].outputs} <= set(known)


def test_the_ensemble_drops_no_input() -> None:
    config = config_of(contract.ENSEMBLE)
    read = {source for step in config.ensemble_scheduling.step for source in step.input_map.values()}
    assert {tensor.name for tensor in contract.MODELS[contract.ENSEMBLE].inputs} <= read
