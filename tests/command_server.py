"""A process that has imported the package and forks for every `slideredit-rt` command of a page.

A command starts in a tenth of a second instead of six, and is otherwise itself: its own process with its own arguments,
environment, folder and streams. A build of embedded files is made once: pages that make the same one get a copy of it.
`serve_commands` yields a folder with a `slideredit-rt` to put first on PATH.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Sends arguments, folder, environment and streams; forwards signals; exits as the command did.
CLIENT = """#!{python} -SEI
import array, json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(request).to_bytes(4, "little")], streams)
    connection.sendall(request)
    process = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    code = connection.recv(1)
sys.exit(code[0] if code else "the command was killed")
"""


@contextmanager
def serve_commands(folder: Path) -> Iterator[Path]:
    """Run the server; yields the folder that holds `slideredit-rt`, and `python` and its like beside it."""
    address = folder / "commands"
    programs = folder / "bin"
    programs.mkdir()
    client = programs / "slideredit-rt"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    for name in ("python", "python3"):
        (programs / name).symlink_to(sys.executable)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE, env=environment) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield programs
        finally:
            server.terminate()


def _receive(connection: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]]:
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i", ancillary[0][2])
    size = int.from_bytes(head, "little")
    argv, folder, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
    return argv, folder, environment, list(streams)


def _kept(argv: list[str], keep: Path) -> tuple[Path, Path] | None:
    """Where a build is kept for other pages, and where this one goes; None for what depends on files of a page."""
    if argv[1:2] != ["build"] or "--out" not in argv[:-1]:
        return None
    place = argv.index("--out")
    rest = [word for word in (*argv[2:place], *argv[place + 2 :]) if word != "--quiet"]
    if any(Path(word).exists() for word in rest):
        return None
    return keep / hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:16], Path(argv[place + 1])


def _carry_out(argv: list[str], keep: Path) -> int:
    from slideredit_rt.cli import main

    kept = _kept(argv, keep)
    if kept is not None and kept[0].exists() and not kept[1].exists():
        shutil.copytree(*kept, symlinks=True)
        return 0
    code = main(argv[1:])
    if kept is not None and code == 0 and not kept[0].exists():
        shutil.copytree(kept[1], kept[0], symlinks=True)
    return code


def _run(connection: socket.socket, keep: Path) -> int:
    """In the forked process: become the command that the connection asks for."""
    argv, folder, environment, streams = _receive(connection)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    connection.sendall(os.getpid().to_bytes(4, "little"))
    try:
        return _carry_out(argv, keep)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _listen(address: str) -> None:
    # Whatever the commands import first; nothing here may start a thread, which a fork would not copy.
    import torch.onnx  # noqa: F401

    import slideredit_rt.editor
    import slideredit_rt.engines
    import slideredit_rt.export.build
    import slideredit_rt.serving.app
    import slideredit_rt.verify  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)  # noqa: T201
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                code = 1
                try:
                    code = _run(connection, Path(address).with_name("kept"))
                finally:
                    with suppress(OSError):
                        connection.sendall(bytes([code & 255]))
                    os._exit(code)
            connection.close()


if __name__ == "__main__":
    _listen(sys.argv[1])
