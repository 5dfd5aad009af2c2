"""`wicore doctor`: every check has a section to point to, and what is wrong is found and told."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

from typer.testing import CliRunner

from client.commands.app import app
from client.doctor import checks
from client.doctor.findings import PAGE

ROOT = Path(__file__).resolve().parents[3]


def test_every_check_has_a_section_and_every_section_a_check(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["doctor", "--json", "--repository", str(tmp_path)])
    names = [finding["check"] for finding in json.loads(found.stdout)["findings"]]
    sections = re.findall(r"^## (.+)$", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(sections)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        number = holder.getsockname()[1]
        assert str(number) in checks.ports((number,)).found
    assert checks.ports((number,)).level == "ok"


def test_a_configuration_that_is_refused_is_an_error_with_a_code_to_match(tmp_path: Path) -> None:
    (tmp_path / "wicore.json").write_text('{"max_bach_size": 1}', encoding="utf-8")
    found = CliRunner().invoke(app, ["doctor", "--json", "--repository", str(tmp_path)])
    told = {finding["check"]: finding for finding in json.loads(found.stdout)["findings"]}["configuration"]
    assert found.exit_code == 1
    assert (told["level"], "max_batch_size" in told["advice"]) == ("error", True)
