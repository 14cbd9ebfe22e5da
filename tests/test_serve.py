"""The command `serve`: what it refuses before it listens, and how it starts and stops."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from http_server import RED

from slideredit_rt.cli import main


def test_serve_refuses_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000; give 0 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000: "),
        (["--api-key", "two words"], "choose another one"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--port", "0", "--allowed-host", "http://gpu-box"], "--allowed-host 'http://gpu-box' is not a host name"),
        (["--port", "0", "--allowed-host", "gpu-box:8000"], "give one such as gpu-box.example.com, without a port"),
        (["--port", "0", "--allow-origin", "https://example.com/app"], "is not an origin; give scheme://host[:port]"),
        (["--port", "0", "--allow-origin", "example.com"], "--allow-origin 'example.com' is not an origin"),
        (["--port", "0", "--allow-origin", "http://[::1"], "is not an origin"),
        (["--preview-steps", "0"], "--preview-steps is 0; give at least 1"),
        (["--max-body-mib", "0"], "--max-body-mib is 0; give a number above 0"),
        (["nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_serve_refuses_what_it_cannot_serve(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_serve_names_the_extra_that_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slideredit_rt.serving.run.find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve"]) == 2
    assert "serving needs uvicorn; install them with pip install 'slideredit-rt[serve]'" in capsys.readouterr().err


def test_serve_says_where_it_is_and_stops_at_a_signal(engines: dict[str, Path], tmp_path: Path, png: bytes) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "slideredit_rt.cli",
        "serve",
        engines["st"],
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
    ]
    command += ["--api-key-file", tmp_path / "key", "--allow-origin", "https://example.com"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            with openai.OpenAI(base_url=f"{said['url']}/v1", api_key="s3cret") as ai:
                extra = {"num_inference_steps": 1}
                assert ai.images.edit(image=png, prompt=RED, model=said["model"], extra_body=extra).data
            for origin, status in (("https://example.com", 200), ("https://example.org", 403)):
                assert httpx.get(f"{said['url']}/health", headers={"origin": origin}).status_code == status
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()
