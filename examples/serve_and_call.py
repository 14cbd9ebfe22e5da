"""Start a server and edit an image through it with the OpenAI client: sliders are one more field of the request.

    pip install 'slideredit-rt[serve]' openai
    python examples/serve_and_call.py

Builds `engine/` in the current folder, unless it is there, and writes `served.png`. The server stops at the end.
"""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from openai import OpenAI

from slideredit_rt.export.build import build_engine

ENGINE = Path("engine")
PORTRAIT = Path(__file__).parents[1] / "docs" / "portrait.png"


def call(address: str) -> None:
    """Edit the sample portrait through the server at `address`."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    sliders = [
        {"instruction": "make the hair red", "strength": 0.5},
        {"instruction": "make the person smile", "strength": 1.0},
    ]
    edited = client.images.edit(
        model="shapes",
        image=PORTRAIT.open("rb"),
        prompt="make the hair red and make the person smile",
        extra_body={"sliders": json.dumps(sliders)},
    )
    Path("served.png").write_bytes(base64.b64decode(edited.data[0].b64_json))
    print("wrote served.png")


def main() -> None:
    """Serve the engine on a free port for as long as the call takes."""
    if not ENGINE.exists():
        build_engine("portraits-kontext", "portraits-st", ENGINE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", str(ENGINE), "--model", "shapes", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "slideredit_rt.cli", *command])
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        call(address)
    finally:
        server.terminate()  # accepted edits are finished first
        server.wait()


if __name__ == "__main__":
    main()
