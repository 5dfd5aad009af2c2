"""Where the configuration comes from: a file, another file, the environment; one object reaches every process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from python_backends.config import CONFIG_NAME, ENV_CONFIG, Config, from_values, load, load_file
from python_backends.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / CONFIG_NAME


def test_variables_go_before_the_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"max_batch_size": 3, "max_queue": 9}', encoding="utf-8")
    variables = {"WICORE_MAX_BATCH_SIZE": "5", "WICORE_ENABLE_HMT": "true", "WICORE_NVME_PATH": "/x"}
    wanted = Config(max_batch_size=5, max_queue=9, enable_hmt=True, nvme_path="/x")
    assert load(tmp_path, variables) == wanted


def test_the_configuration_of_one_process_is_that_of_another(tmp_path: Path) -> None:
    """What `wicore serve` hands to the stages: whole, and whatever their folder holds."""
    (tmp_path / CONFIG_NAME).write_text('{"max_batch_size": 3}', encoding="utf-8")
    made = Config(max_batch_size=7, drain_s=3, body_timeout_s=1.5, idle_timeout_s=1, image_hosts="a,b")
    assert load(tmp_path, {ENV_CONFIG: made.to_json()}) == made


def test_a_file_elsewhere_takes_the_place_of_the_repositorys(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"max_batch_size": 3}', encoding="utf-8")
    other = tmp_path / "other.json"
    other.write_text('{"max_queue": 4}', encoding="utf-8")
    assert load(tmp_path, {ENV_CONFIG: str(other)}) == Config(max_queue=4)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, {ENV_CONFIG: str(tmp_path / "none.json")})


REFUSED = [
    ({"WICORE_MAX_BACH_SIZE": "3"}, "did you mean WICORE_MAX_BATCH_SIZE"),
    ({"WICORE_MAX_BATCH_SIZE": "many"}, "must be of type int"),
    ({"WICORE_ENABLE_HMT": "perhaps"}, "true or false"),
    ({"WICORE_MAX_BATCH_SIZE": "0"}, "at least 1"),
    ({"WICORE_GPU_MEMORY_GB": "0"}, "above 0"),
    ({"WICORE_TRT_PRECISION": "int3"}, "choose one of auto"),
]


@pytest.mark.parametrize(("variables", "reason"), REFUSED)
def test_a_variable_that_cannot_be_meant_is_refused_by_name(
    tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path, variables)


def test_variables_of_others_are_left_alone(tmp_path: Path) -> None:
    """Kubernetes gives containers such ones for a service named wicore."""
    foreign = {"WICORE_PORT_8080_TCP_ADDR": "10.0.0.1", "WICORE_SERVICE_HOST": "10.0.0.1", "WICORE_DEBUG": "1"}
    assert load(tmp_path, foreign) == Config()


CONTRARY = [
    {"max_tokens": 512, "max_context_length": 512},
    {"queue_timeout_ms": 2000, "deadline_ms": 1000},
    {"idle_timeout_s": 3, "body_timeout_s": 2},
    {"max_image_bytes": 900, "max_body_bytes": 1000},
    {"nvme_path": "/cache", "enable_hmt": False},
]


@pytest.mark.parametrize("values", CONTRARY)
def test_keys_that_contradict_each_other_are_both_named(values: dict[str, object]) -> None:
    first, second = values
    with pytest.raises(ConfigError, match=f"{first} and {second} contradict"):
        from_values(values, "here")


def test_a_default_bends_to_what_is_set() -> None:
    assert from_values({"max_context_length": 200}, "here").max_tokens == Config().max_tokens


def test_the_example_names_every_key_and_says_the_defaults() -> None:
    found = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert set(found) == {field.name for field in dataclasses.fields(Config)}
    changed = {"model_path", "enable_hmt", "nvme_path"}
    assert load_file(EXAMPLE, {}) == dataclasses.replace(Config(), **{name: found[name] for name in changed})
