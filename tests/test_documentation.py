"""README.md and the pages of docs/: their code runs, and the commands, options, files and names that they quote exist."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from command_server import serve_commands
from pages import ROOT, Block, BrokenPage, Page, blocks_of, check, check_command, links_of, make_targets, quoted_in
from test_prose import sub_parsers
from test_rooms import modules

from slideredit_rt import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("docs", "examples", "deploy")
# Options of pip and docker that pages name alone.
OTHER_OPTIONS = {"--extra-index-url", "--gpus", "--index-url", "--no-deps", "--rm"}
_PATH = re.compile(r"(bench|deploy|docs|examples|export|kernels|slideredit_rt|tests)/[\w./-]*")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Folders with `slideredit-rt`, and what else is installed beside this Python; caches are the pages' own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with serve_commands(tmp_path_factory.mktemp("commands")) as commands:
            yield [commands, Path(sys.executable).parent]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copies of what pages read."""
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def run_page(page: Path, name: str, folder: Path, programs: list[Path]) -> list[Block]:
    """Check all blocks of a page, then run those that are to be run."""
    blocks = blocks_of(page, name)
    for block in blocks:
        check(block)
    with Page(folder, programs) as running:
        for block in blocks:
            running.run(block)
    return blocks


@each_page
def test_every_code_block_runs(page: Path, folder: Path, programs: list[Path]) -> None:
    run_page(page, str(page.relative_to(ROOT)), folder, programs)


@cache
def options() -> set[str]:
    parsers = sub_parsers(cli._parser(), "slideredit-rt")
    return OTHER_OPTIONS | {option for _, parser in parsers for action in parser._actions for option in action.option_strings}


@cache
def words_of_commands() -> set[str]:
    return {name for name, _ in sub_parsers(cli._parser(), "slideredit-rt")}


def quotation_fault(text: str) -> str | None:
    """What is wrong with a command, option, file or name that a page quotes; None if nothing is."""
    words = text.split()
    if words[:1] == ["make"] and (unknown := {w for w in words[1:] if re.fullmatch(r"[a-z][\w-]*", w)} - make_targets()):
        return f"the Makefile has no target {unknown.pop()!r}"
    if words[:1] == ["slideredit-rt"]:
        level = [word for word in words[1:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
        known = words_of_commands()
        if level and f"slideredit-rt {level[0]}" not in known:
            return f"there is no command {level[0]!r}"
        two = any(name.startswith(f"slideredit-rt {level[0]} ") for name in known) if level else False
        if two and len(level) == 2 and " ".join(["slideredit-rt", *level]) not in known:
            return f"there is no command {' '.join(level)!r}"
    ours = words[:1] == ["slideredit-rt"] or text.startswith("--")
    if ours and (unknown := set(re.findall(r"(?<!\S)--[a-z][a-z-]*", text)) - options()):
        return f"there is no option {unknown.pop()}"
    if _PATH.fullmatch(text) and not any(ROOT.glob(text.rstrip("/"))):
        return "there is no such file"
    if re.fullmatch(r"slideredit_rt(\.\w+)+", text) and not is_defined(text):
        return "there is no such name"
    return None


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module or a name in one; read, not imported, since some modules need an extra."""
    known, parts = modules(), name.split(".")
    end = max(end for end in range(1, len(parts) + 1) if ".".join(parts[:end]) in known)
    if end == len(parts):
        return True
    source = known[".".join(parts[:end])].read_text()
    return bool(re.search(rf"^(class |def |async def )?{parts[end]}\b|\"{parts[end]}\"", source, re.MULTILINE))


@each_page
def test_what_is_quoted_exists(page: Path) -> None:
    faults = [(line, text, fault) for line, text in quoted_in(page) if (fault := quotation_fault(text))]
    assert faults == []


@each_page
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """Anchors, and links between pages of the site, are Sphinx's to check."""
    files = [(line, to.partition("#")[0]) for line, to in links_of(page) if not re.match(r"\w+:|#|//", to)]
    assert [(line, to) for line, to in files if not (page.parent / to).exists()] == []


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_drawings_are_what_their_script_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    for theme in drawn["THEMES"]:
        assert (ROOT / "docs" / f"architecture-{theme.name}.svg").read_text() == drawn["draw"](theme)
    assert [theme.name for theme in drawn["THEMES"]] == ["light", "dark"]


def written(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_blocks_share_files_names_and_a_server(folder: Path, programs: list[Path]) -> None:
    page = written(
        folder,
        """# A page

```sh
pip install 'slideredit-rt[serve]'   # is not run
slideredit-rt build --base shapes-kontext --adapter shapes-st --out engine
slideredit-rt inspect --help \\
    > help.txt
```

```python
text = open("help.txt").read()
```

<!-- serving -->
```sh
slideredit-rt serve engine
```

```console
$ curl --silent --fail http://127.0.0.1:8000/health \\
    --output health.json
what curl would say
```

<!-- not run: needs a GPU -->
```sh
slideredit-rt build --base FOLDER --adapter my-st.pt --out engine
false
```

```python
assert "ENGINE" in text
assert open("health.json").read()
```
""",
    )
    blocks = run_page(page, "page.md", folder, programs)
    assert [block.line for block in blocks] == [4, 11, 16, 20, 27, 32]
    assert not (ROOT / "help.txt").exists()


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("```sh\ntrue\nls nowhere | sort\ntrue\n```", 5, "No such file"),
        ("```python\nx = 1\n\ny = x / 0\n```", 6, "ZeroDivisionError"),
        ("- a list\n\n  ```python\n  print(undefined)\n  ```", 6, "NameError"),
        ("```sh\nslideredit-rt spans --slider 'make the sun red' --base nowhere\n```", 4, "nowhere"),
        ("<!-- serving -->\n```sh\nslideredit-rt serve nowhere\n```", 5, "the server does not answer"),
        ("<!-- not run -->\n```sh\ntrue\n```", 5, "say why"),
        ("<!-- not run: slow -->\n```sh\nslideredit-rt build --base B \\\n    --adaptor A --out engine\n```", 5, "--adaptor"),
        ("<!-- not run: slow -->\n```sh\nif true\n```", 5, "syntax error"),
        ("<!-- not run: slow -->\n```python\nx = 1\nx = (\n```", 6, "not python"),
        ("```sh\nmake demo\nmake coffee\n```", 5, "no target 'coffee'"),
        ("```sh\npip install 'slideredit-rt[serve,coffee]'\n```", 4, "no extra 'coffee'"),
        ('```json\n{\n  "a": 1,\n}\n```', 6, "not json"),
        ("```yaml\na: [1\n```", 4, "not yaml"),
        ("```pyton\nx = 1\n```", 4, "unknown language 'pyton'"),
    ],
)
def test_a_broken_block_names_its_line(body: str, line: int, message: str, folder: Path, programs: list[Path]) -> None:
    page = written(folder, f"# A page\n\n{body}\n")
    with pytest.raises(BrokenPage, match=rf"(?s)^page\.md:{line}: .*{re.escape(message)}"):
        run_page(page, "page.md", folder, programs)


@pytest.mark.parametrize(
    "text",
    [
        "make coffee",
        "slideredit-rt brew",
        "slideredit-rt adapter brew",
        "--brew",
        "slideredit-rt build --brew hot",
        "docs/coffee.md",
        "slideredit_rt.coffee",
        "slideredit_rt.serving.ray_app.Coffee",
    ],
)
def test_a_quotation_of_what_does_not_exist_is_found(text: str) -> None:
    assert quotation_fault(text) is not None


def test_a_line_is_split_into_commands() -> None:
    assert check_command(["slideredit-rt", "inspect", "engine"]) is None
    page = Block("page.md", 1, "sh", "A=1 slideredit-rt inspect engine > out.txt && slideredit-rt inspekt engine # x\n")
    with pytest.raises(BrokenPage, match="inspekt"):
        check(page)


def test_options_are_read_from_every_command() -> None:
    assert isinstance(cli._parser(), argparse.ArgumentParser)
    assert {"--slider", "--min-replicas", "--weight-budget-mib"} <= options()


def spoken() -> str:
    """Every string of the package, the values in it written as `…`."""
    texts = []
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_the_messages_as_they_are() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [text for bold in re.findall(r"^\*\*(.*?)\*\*", page, re.MULTILINE) for text in re.findall(r"`([^`]+)`", bold)]
    ours, said = [text for text in quoted if "…" in text or "ONNX" in text], spoken()
    assert len(ours) > 15

    def found(text: str) -> bool:
        # A value may be quoted, or stand in brackets that the page leaves out.
        pattern = r"[^\n]{0,60}".join(re.escape(part.strip(" '")) for part in text.split("…"))
        return re.search(pattern, said) is not None

    assert [text for text in ours if not found(text)] == []
