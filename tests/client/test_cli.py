"""The `wicore` command as its users run it, against the protocol double."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.client.triton_double import Response, endless, piece, serving

WICORE = [sys.executable, "-m", "client.cli"]


def wicore(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WICORE, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def repeating(values: dict[str, Any]) -> Iterator[Response]:
    """Answers with the last turn's text, the number of turns and of pictures."""
    messages = json.loads(values["messages"].item())
    last = messages[-1]["content"][-1]["text"]
    pictures = values["image"].size if "image" in values else 0
    yield piece(f"{last} ")
    yield piece(f"turns={len(messages)} pictures={pictures}", (1,), "stop")


def refusing(values: dict[str, Any]) -> Iterator[Response]:
    """What a server says of a picture that is none."""
    yield Response(error_message="in ensemble 'gemma3', invalid_image: not a readable PNG")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_help_names_every_command_and_is_quick() -> None:
    begin = time.monotonic()
    done = wicore("--help")
    assert time.monotonic() - begin < 5  # 0.3 s where nothing else runs; transformers or torch alone take longer
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("build", "serve", "chat", "describe", "demo", "bench"))


@pytest.mark.parametrize("module", ["torch", "transformers", "onnx", "onnxruntime", "rich.progress"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, client.commands.app; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["describe"], ["serve", "--http-port", "many"], ["chat", "--wrong"]]
)
def test_wrong_usage_is_code_2(arguments: list[str]) -> None:
    done = wicore(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_describe_prints_the_answer_alone(picture: Path) -> None:
    with serving(repeating) as server:
        done = wicore("describe", str(picture), "What is it?", "--address", server.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "What is it? turns=1 pictures=1\n", "")


@pytest.mark.parametrize(("language", "question"), [("en", "Describe the picture."), ("zh", "描述一下这张图。")])
def test_describe_has_a_question_of_its_own(picture: Path, language: str, question: str) -> None:
    with serving(repeating) as server:
        done = wicore("describe", str(picture), "--lang", language, "--json", WICORE_ADDRESS=server.address)
    answer = json.loads(done.stdout)
    assert answer["text"] == f"{question} turns=1 pictures=1"
    assert answer["usage"]["prompt_tokens"] == 3


def test_describe_reads_a_picture_from_a_pipe(picture: Path) -> None:
    seen: list[bytes] = []

    def keep(values: dict[str, Any]) -> Iterator[Response]:
        seen.append(values["image"].item())
        yield piece("red", (1,), "stop")

    with serving(keep) as server, picture.open("rb") as stdin:
        command = [*WICORE, "describe", "-", "--address", server.address]
        done = subprocess.run(command, stdin=stdin, capture_output=True, timeout=60, check=False)
    assert done.stdout == b"red\n"
    assert seen == [picture.read_bytes()]


def test_a_failure_is_one_line_and_code_1(picture: Path) -> None:
    with serving(refusing) as server:
        done = wicore("describe", str(picture), "--address", server.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "wicore: not a readable PNG\n"


def test_a_failure_is_json_where_json_was_asked_for(picture: Path) -> None:
    with serving(refusing) as server:
        done = wicore("describe", str(picture), "--json", "--address", server.address)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout) == {"error": {"code": "invalid_image", "message": "not a readable PNG"}}


def test_the_debug_variable_shows_where(picture: Path) -> None:
    with serving(refusing) as server:
        done = wicore("describe", str(picture), "--address", server.address, WICORE_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_no_server_and_no_file_are_said_plainly(picture: Path) -> None:
    assert "wicore serve" in wicore("describe", str(picture), "--address", "127.0.0.1:1").stderr
    assert "nothing.png" in wicore("describe", "nothing.png", "--address", "127.0.0.1:1").stderr


def test_a_piped_chat_keeps_its_turns_and_pictures(picture: Path) -> None:
    lines = f"first\n\nsecond\n/image {picture}\nthird\nfourth\n/reset\nfifth\n/quit\nnever\n"
    with serving(repeating) as server:
        done = wicore("chat", "--address", server.address, stdin=lines)
    assert done.stdout.splitlines() == [
        "first turns=1 pictures=0",
        "second turns=3 pictures=0",
        "third turns=5 pictures=1",
        "fourth turns=7 pictures=1",
        "fifth turns=1 pictures=0",
    ]
    assert done.returncode == 0


def test_a_chat_begins_with_its_system_message_and_picture(picture: Path) -> None:
    with serving(repeating) as server:
        options = ["--system", "Be brief.", "--image", str(picture), "--json", "--address", server.address]
        done = wicore("chat", *options, stdin="Hi\n")
    assert json.loads(done.stdout)["text"] == "Hi turns=2 pictures=1"


def test_a_piped_chat_ends_at_its_first_failure() -> None:
    with serving(refusing) as server:
        done = wicore("chat", "--address", server.address, stdin="one\ntwo\n")
    assert done.returncode == 1
    assert done.stderr.count("not a readable PNG") == 1


class Terminal:
    """A `wicore chat` on a pseudo-terminal."""

    def __init__(self, address: str, home: Path) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb", "NO_COLOR": "1"}
        command = [*WICORE, "chat", "--address", address]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, after: int = 0) -> int:
        """Wait until ``text`` is shown behind ``after``; returns where it ends."""
        deadline = time.monotonic() + 20
        while text not in self.shown[after:]:
            assert time.monotonic() < deadline, self.shown
            if not select.select([self._master], [], [], 1)[0]:
                continue
            try:
                self.shown += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the other end has gone
                break
        assert text in self.shown[after:], self.shown
        return self.shown.index(text, after) + len(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_person_can_talk_stop_an_answer_and_leave(tmp_path: Path, picture: Path) -> None:
    def either(values: dict[str, Any]) -> Iterator[Response]:
        text = json.loads(values["messages"].item())[-1]["content"][-1]["text"]
        return endless(values) if text == "count" else repeating(values)

    with serving(either) as server:
        terminal = Terminal(server.address, tmp_path)
        try:
            terminal.expect("> ")
            terminal.type("hello\n")
            at = terminal.expect("hello turns=1 pictures=0")
            terminal.type(f"/image {picture}\n")
            at = terminal.expect("1 picture for your next message", at)
            terminal.type("/image nothing.png\n")
            at = terminal.expect("cannot read the image nothing.png", at)
            terminal.type("/wrong\n")
            at = terminal.expect("There is no /wrong", at)
            terminal.type("count\n")
            at = terminal.expect("3 4 5", at)
            terminal.process.send_signal(signal.SIGINT)
            at = terminal.expect("(stopped)", at)
            assert server.stop_seen.wait(10)
            # The turn that was stopped is forgotten, its picture is not.
            terminal.type("again\n")
            at = terminal.expect("again turns=3 pictures=1", at)
            at = terminal.expect("> ", at)
            time.sleep(0.5)  # the prompt is shown a moment before the line is read
            terminal.process.send_signal(signal.SIGINT)
            terminal.expect("> ", at)
            terminal.type("\x04")
            assert terminal.process.wait(20) == 0
        finally:
            terminal.close()
    history = tmp_path / "wicore" / "chat_history"
    assert "hello" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_request_and_is_code_130(picture: Path) -> None:
    with serving(endless) as server:
        command = [*WICORE, "describe", str(picture), "--address", server.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stderr is not None
            assert b"Traceback" not in process.stderr.read()
        assert server.stop_seen.wait(10)


def test_a_reader_that_has_enough_ends_the_answer_quietly(picture: Path) -> None:
    with serving(endless) as server:
        command = f"{sys.executable} -m client.cli describe {picture} --address {server.address} | head -c 5"
        done = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False)
        assert done.stdout == b"0 1 2"
        assert done.stderr == b""
        assert server.stop_seen.wait(10)
