"""The code of Markdown pages: found, checked, and run from top to bottom as a reader would.

A page is run in a folder of its own that holds copies of `docs/`, `examples/` and what else pages read. A comment in front of a
block changes what happens to it:

    <!-- not run: REASON -->    it is parsed, and its commands are, too
    <!-- serving -->            it runs in the background until the page ends or the next one starts; 8000 is a free port
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml  # type: ignore[import-untyped]
from markdown_it import MarkdownIt

from slideredit_rt import cli

ROOT = Path(__file__).parents[1]
SHELLS = ("sh", "bash", "console")
READ_ONLY = ("", "text", "dockerfile", "diff", "ini", "proto")
_ACTIVATE = re.compile(r"(\.|source) \S*bin/activate$")
_MARK = re.compile(r"<!--\s*(not run|serving)\b:?\s*(.*?)\s*-->", re.DOTALL)
_TARGETS = re.compile(r"^([A-Za-z][\w-]*):(?!=)", re.MULTILINE)


class BrokenPage(AssertionError):
    """A block of a page that does not do what it says: names the page and the line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is the page's line of its first line, `mark` is `not run`, `serving` or empty."""

    page: str
    line: int
    language: str
    code: str
    mark: str = ""
    reason: str = ""

    def broken(self, why: str, line: int | None = None) -> BrokenPage:
        return BrokenPage(f"{self.page}:{line or self.line}: {why}")


def blocks_of(page: Path, name: str) -> list[Block]:
    """The fenced blocks of a page, without MyST directives such as `{toctree}`."""
    found, mark = [], ("", "")
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        if token.type == "fence" and not token.info.startswith("{"):
            language = token.info.split()[0] if token.info.split() else ""
            assert token.map is not None
            found.append(Block(name, token.map[0] + 2, language, token.content, *mark))
        comment = _MARK.fullmatch(token.content.strip()) if token.type == "html_block" else None
        mark = (comment[1], comment[2]) if comment else ("", "")
    return found


def quoted_in(page: Path) -> Iterator[tuple[int, str]]:
    """What stands in single backticks on a page, each with the first line of its paragraph."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        for child in token.children or ():
            if child.type == "code_inline":
                yield (token.map or [0])[0] + 1, child.content


def links_of(page: Path) -> Iterator[tuple[int, str]]:
    """Targets of a page's links and images, HTML's included, each with the first line of its paragraph."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        line = (token.map or [0])[0] + 1
        for child in (token, *(token.children or ())):
            if child.type in ("link_open", "image"):
                yield line, str(child.attrs.get("href") or child.attrs.get("src"))
            elif child.type in ("html_block", "html_inline"):
                yield from ((line, target) for target in re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", child.content))


def make_targets() -> set[str]:
    return set(_TARGETS.findall((ROOT / "Makefile").read_text()))


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def shell_code(block: Block) -> str:
    """The commands of a block, line for line; a `console` block's are those after a `$`."""
    if block.language != "console":
        return block.code
    lines, more = [], False
    for line in block.code.splitlines():
        lines.append(line[2:] if line.startswith("$ ") else line if more else "")
        more = bool(lines[-1]) and line.endswith("\\")
    return "\n".join(lines) + "\n"


def logical_lines(code: str) -> Iterator[tuple[int, str]]:
    """Lines with those that a backslash continues, each with its index."""
    start, parts = 0, list[str]()
    for index, line in enumerate(code.splitlines()):
        start = start if parts else index
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield start, " ".join(parts).strip()
            parts = []


def commands_of(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, as words, without assignments in front and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, skip = list[str](), False
    for word in (*lexer, ";"):
        if set(word) <= set(";|&()"):
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words, skip = [], False
        elif set(word) <= set("<>"):
            skip = True
        elif not skip:
            words.append(word)
        else:
            skip = False


def check_command(words: list[str]) -> str | None:
    """What is wrong with a command of ours, of make or of pip; None if nothing is, or it is another one."""
    if words[0] == "slideredit-rt":
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli._parser().parse_args(words[1:])
        except SystemExit as stopped:
            return said.getvalue().strip().splitlines()[-1] if stopped.code else None
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        if unknown := set(targets) - make_targets():
            return f"the Makefile has no target {unknown.pop()!r}"
    elif _is_pip(words):
        named = {
            extra
            for word in words
            for group in re.findall(r"(?:^\.|slideredit-rt)\[([\w,-]+)\]", word)
            for extra in group.split(",")
        }
        if unknown := named - extras():
            return f"pyproject.toml has no extra {unknown.pop()!r}"
    return None


def _is_pip(words: list[str]) -> bool:
    return words[0] in ("pip", "pip3") or words[1:3] == ["-m", "pip"]


def check(block: Block) -> None:
    """Parse a block: its syntax, and every command in it that can be checked without running it.

    Raises:
        BrokenPage: it does not parse, its language is unknown, or it is not run and says no reason.
    """
    if block.mark == "not run" and not block.reason:
        raise block.broken("say why it is not run: <!-- not run: REASON -->")
    if block.mark == "serving" and block.language not in SHELLS:
        raise block.broken(f"only a shell block can be serving, and this one is {block.language!r}")
    if block.language in SHELLS:
        _check_shell(block)
        return
    parsers: dict[str, Any] = {"python": ast.parse, "json": json.loads, "toml": tomllib.loads}
    parsers["yaml"] = lambda text: list(yaml.safe_load_all(text))
    parsers["jsonl"] = lambda text: [json.loads(line) for line in text.splitlines() if line.strip()]
    if block.language not in (*parsers, *READ_ONLY):
        raise block.broken(
            f"unknown language {block.language!r}; there are {', '.join((*SHELLS, *parsers, *filter(None, READ_ONLY)))}"
        )
    try:
        parsers.get(block.language, str)(block.code)
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        line = getattr(error, "lineno", None) or 1
        raise block.broken(f"not {block.language}: {error}", block.line + line - 1) from None


def _check_shell(block: Block) -> None:
    code = shell_code(block)
    parsed = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True)
    if parsed.returncode:
        raise block.broken(parsed.stderr.strip())
    for index, line in logical_lines(code):
        for words in commands_of(line):
            if fault := check_command(words):
                raise block.broken(fault, block.line + index)


def to_run(block: Block) -> str:
    """A shell block as it is run: what installs or builds is checked only, and left out."""
    lines = shell_code(block).splitlines()
    for index, line in logical_lines(shell_code(block)):
        first = next(commands_of(line), None)
        if first and (first[0] == "make" or _is_pip(first) or _ACTIVATE.match(line)):
            count = 1
            while lines[index + count - 1].endswith("\\"):
                count += 1
            lines[index : index + count] = [":"] * count
    return "\n".join(lines) + "\n"


class Page:
    """A page that is being run: a folder, a Python namespace and a server that its blocks share.

    Args:
        folder: an empty folder, which gets copies of what the pages read.
        programs: folders to search for commands first.
        seconds: time limit of a block, and of a server to become healthy.
    """

    def __init__(self, folder: Path, programs: list[Path], *, seconds: float = 300) -> None:
        self.folder, self.seconds = folder, seconds
        self.names: dict[str, Any] = {"__name__": "__main__"}
        # As a reader's shell: conftest.py has Triton interpret its kernels, which then cannot be compiled.
        self.environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.environment["PATH"] = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
        self._server: subprocess.Popen[bytes] | None = None
        self._port: int | None = None

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def run(self, block: Block) -> None:
        """Run a block, after what was run before.

        Raises:
            BrokenPage: it fails, with its output.
        """
        if block.mark == "not run" or block.language not in (*SHELLS, "python"):
            return
        if block.mark == "serving":
            self._serve(block)
        elif block.language == "python":
            self._run_python(block)
        else:
            self._run_shell(block)

    def _text(self, code: str) -> str:
        return code if self._port is None else re.sub(r"\b8000\b", str(self._port), code)

    def _run_python(self, block: Block) -> None:
        # The page's own lines in tracebacks.
        code = compile("\n" * (block.line - 1) + self._text(block.code), block.page, "exec")
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        except (Exception, SystemExit) as error:
            lines, trace = [block.line], error.__traceback__
            while trace is not None:
                lines += [trace.tb_lineno] if trace.tb_frame.f_code.co_filename == block.page else []
                trace = trace.tb_next
            raise block.broken(f"{type(error).__name__}: {error}", lines[-1]) from error
        finally:
            os.chdir(before)

    def _start(self, block: Block, output: Any) -> subprocess.Popen[bytes]:
        """A shell that runs the block, its lines numbered as the page's."""
        trap = f"""set -Eeuo pipefail; trap 'echo "{block.page}:$LINENO: exit code $?" >&2' ERR"""
        script = trap + "\n" * (block.line - 1) + self._text(to_run(block))
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _run_shell(self, block: Block) -> None:
        log = self.folder / ".output"
        with log.open("wb") as output:
            shell = self._start(block, output)
            try:
                code = shell.wait(self.seconds)
            except subprocess.TimeoutExpired:
                os.killpg(shell.pid, signal.SIGKILL)
                code = shell.wait()
        if code:
            said = log.read_text(errors="replace").strip()
            where = re.findall(rf"^{re.escape(block.page)}:(\d+): exit code", said, re.MULTILINE)
            raise block.broken(f"exit code {code}\n{said}", int(where[-1]) if where else None)

    def _serve(self, block: Block) -> None:
        self._stop()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        serving = block.code.replace("slideredit-rt serve", f"slideredit-rt serve --port {self._port}")
        log = self.folder / ".server"
        with log.open("wb") as output:
            self._server = self._start(Block(block.page, block.line, block.language, serving), output)
        end = time.monotonic() + self.seconds
        while not self._healthy():
            if self._server.poll() is not None or time.monotonic() > end:
                raise block.broken(f"the server does not answer\n{log.read_text(errors='replace').strip()}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _stop(self) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGTERM)
            try:
                self._server.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self._server.pid, signal.SIGKILL)
                self._server.wait()
            self._server = None
