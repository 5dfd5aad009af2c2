"""The files in deploy/ agree with the server that they are about."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from client.commands.app import app
from client.server import Server
from python_backends.config import from_values
from tests.paths import ROOT

DEPLOY = ROOT / "deploy"
BY_PROMETHEUS = {"instance", "job"}
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}


def queries() -> list[str]:
    """Of the dashboard's panels and the alerts."""
    panels = json.loads((DEPLOY / "grafana/dashboards/wicore.json").read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    for variable, value in VARIABLES.items():
        found = [expression.replace(variable, value) for expression in found]
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return found + [rule["expr"] for group in groups for rule in group["rules"]]


def parts(expression: Any) -> Iterator[Any]:
    """A parsed query and everything in it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs"):
        if (inner := getattr(expression, name, None)) is not None:
            yield from parts(inner)
    for argument in getattr(expression, "args", ()):
        yield from parts(argument)


@pytest.fixture(scope="module")
def scraped(server: Server, http: httpx.Client) -> dict[str, set[str]]:
    """Names of samples that a running server gives, with their labels."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    http.post("/v1/chat/completions", json=body).raise_for_status()
    time.sleep(1.1)  # the gateway asks the decoder every second
    found: dict[str, set[str]] = {"up": set(BY_PROMETHEUS)}
    for text in (http.get("/metrics").text, httpx.get(server.addresses.metrics).text):
        for family in text_string_to_metric_families(text):
            found.setdefault(family.name, set())
            if family.type == "counter":
                found.setdefault(f"{family.name}_total", set())
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("query", queries())
def test_a_query_is_promql_over_metrics_that_there_are(query: str, scraped: dict[str, set[str]]) -> None:
    found = list(parts(promql_parser.parse(query)))
    selectors = [part for part in found if isinstance(part, promql_parser.VectorSelector)]
    assert selectors
    named = {label for part in selectors for label in re.findall(r"(\w+)\s*[!=]~?\s*\"", str(part))}
    named |= {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
    known = set(BY_PROMETHEUS)
    for selector in selectors:
        assert selector.name in scraped, f"there is no metric {selector.name}"
        known |= scraped[selector.name]
    empty = [selector.name for selector in selectors if not scraped[selector.name]]
    assert named <= known or empty, named - known


def test_every_metric_family_of_ours_is_on_the_dashboard_or_left_out_on_purpose(scraped: dict[str, set[str]]) -> None:
    left_out = {
        "wicore_http_request_duration_seconds": "times of answers are shown, those of pages are not",
        "wicore_request_prompt_tokens": "lengths",
        "wicore_request_generation_tokens": "lengths",
        "wicore_gateway_requests_in_flight": "the decoder's own numbers are shown",
        "wicore_cached_prompt_tokens": "wicore_kv_cache_prompt_tokens has the rest as well",
        "wicore_decoder_computed_tokens": "padding",
        "wicore_decoder_drawn_tokens": "wicore_generation_tokens",
        "wicore_decoder_moves": "of slots",
        "wicore_kv_cache_largest_free_bytes": "fragmentation",
        "wicore_kv_cache_lookups": "tokens are shown",
        "wicore_kv_cache_moves": "bytes are shown",
        "wicore_kv_cache_lost": "what was lost is a miss, and misses are shown",
        "wicore_kv_cache_failed_moves": "what they lead to is shown",
        "wicore_kv_cache_bytes_per_second": "what links can, not what they do",
    }
    text = " ".join(queries())
    suffixes = re.compile(r"_(total|bucket|sum|count|created)$")
    ours = {suffixes.sub("", name) for name in scraped if name.startswith("wicore_") and "wicore_kv_" not in name[:10]}
    ours |= {suffixes.sub("", name) for name in scraped if name.startswith("wicore_kv_cache_")}
    shown = {name for name in ours if name in text}
    assert ours - shown <= set(left_out), "neither shown nor left out"
    assert not shown & set(left_out)


def manifests() -> list[dict[str, Any]]:
    text = (DEPLOY / "kubernetes/wicore.yaml").read_text(encoding="utf-8")
    return [document for document in yaml.safe_load_all(text) if document]


def containers() -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Arguments and mounts of whatever runs our image."""
    (workload,) = [each for each in manifests() if each["kind"] == "StatefulSet"]
    pod = workload["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        yield container["args"], container["volumeMounts"]
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    yield json.loads(dockerfile.rpartition("CMD ")[2]), []


def test_the_commands_that_containers_run_are_ours() -> None:
    for arguments, _ in containers():
        told = CliRunner().invoke(app, [arguments[0], "--help"], terminal_width=200).output
        options = [part.partition("=")[0] for part in arguments if part.startswith("--")]
        assert options
        assert all(option in told for option in options), (arguments, told)


def test_the_configuration_in_the_manifest_is_one() -> None:
    (values,) = [json.loads(each["data"]["wicore.json"]) for each in manifests() if each["kind"] == "ConfigMap"]
    config = from_values(values, "the manifest")
    (pod,) = [each["spec"]["template"]["spec"] for each in manifests() if each["kind"] == "StatefulSet"]
    assert pod["terminationGracePeriodSeconds"] > config.drain_s
    mounts = {mount["mountPath"] for _, mounts in containers() for mount in mounts}
    assert {config.nvme_path, "/dev/shm", "/models"} <= mounts


def test_selectors_volumes_and_probes_name_what_there_is(http: httpx.Client) -> None:
    by_kind = {each["kind"]: each for each in manifests()}
    workload, service = by_kind["StatefulSet"]["spec"], by_kind["Service"]["spec"]
    labels = workload["template"]["metadata"]["labels"]
    assert service["selector"] == workload["selector"]["matchLabels"] == labels
    pod = workload["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= ports
    volumes = {each["name"] for each in pod["volumes"]}
    volumes |= {each["metadata"]["name"] for each in workload["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] in ports
        assert http.get(asked["path"]).status_code == 200


def test_compose_mounts_files_that_there_are_and_prometheus_reads_the_rules() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
    scraping = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    assert all((DEPLOY / name).exists() for name in scraping["rule_files"])
    targets = {
        target for job in scraping["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    }
    assert targets == {"wicore:8080", "wicore:8002"}
    assert "wicore" in services


def test_what_the_dockerfile_copies_is_there() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [part for line in lines if line.startswith("COPY ") for part in shlex.split(line)[1:-1]]
    assert copied
    assert all((ROOT / part).exists() for part in copied)
