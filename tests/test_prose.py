"""The English of what people read: help strings, docstrings, error messages, pages. CONTRIBUTING.md has the rules in words."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from slideredit_rt import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("slideredit_rt", "kernels", "export", "bench")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# A phrase that starts with one of these leans on a noun that is not there: "of the engine", "whether it is open".
LEANING = re.compile(
    r"(as|by|for|from|how|like|not|of|so|such|that|until|what|when|where|whether|which|while|who|whose|with)\b", re.IGNORECASE
)
# Words of our own for things that the field has a word for, and turns of phrase that English lacks.
UNUSUAL = {
    r"\bpictures?\b(?! \{)": "image",
    r"\banew\b": "again",
    r"\btwice is once\b": "idempotent",
    r"\bcalled like\b": "named after",
    r"\bbut for\b": "except",
    r"\bno more than\b": "at most",
    r"(?<!there )\b(is|are) no (?!longer\b|more\b|less\b)[a-z]": "is not a",
    r"\bsays nothing\b": "is empty, is unset",
    r"\bputs? out of\b": "removes",
}


def sub_parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A parser and every parser below it, each with the words that reach it."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from sub_parsers(below, f"{name} {word}")


def help_strings() -> Iterator[tuple[str, str]]:
    for name, parser in sub_parsers(cli._parser(), "slideredit-rt"):
        if parser.description:
            yield name, parser.description
        for group in parser._action_groups:
            yield f"{name} ({group.title})", group.title or ""
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action._choices_actions:
                    yield f"{name} {choice.dest}", choice.help or ""
            elif action.help != argparse.SUPPRESS:
                yield f"{name} {'/'.join(action.option_strings) or action.dest}", action.help or ""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def entries(text: str) -> Iterator[tuple[str, str]]:
    """What a docstring says of each argument, field and error: the name and the first line."""
    section = re.compile(r"^(Args|Attributes|Raises):\n((?:^(?: .*)?\n?)*)", re.MULTILINE)
    for _, body in section.findall(text):
        yield from re.findall(r"^    (\*{0,2}[\w., `*/]+?)(?: \([^)]*\))?: *(.*)$", body, re.MULTILINE)


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Every string with a space in it, docstrings included, and every comment."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    for number, line in enumerate(source.splitlines(), 1):
        if found := re.search(r"(?:^|\s)# (.*)", line):
            yield number, found[1]


def test_every_help_string_stands_alone() -> None:
    found = dict(help_strings())
    assert len(found) > 150
    assert [name for name, text in found.items() if not text] == []
    assert [(name, text) for name, text in found.items() if LEANING.match(text)] == []
    assert [(name, text) for name, text in found.items() if text.endswith(".") and ". " not in text] == []


def faults(source: str) -> list[tuple[int, str, str]]:
    """The sentences of a file to mend: line, text, what to say instead."""
    wrong = []
    for line, text in docstrings(source):
        phrases = [text.splitlines()[0], *(phrase for _, phrase in entries(text))]
        wrong += [(line, phrase, "begin with a verb or a noun") for phrase in phrases if LEANING.match(phrase)]
    for line, text in sentences(source):
        wrong += [
            (line, text.strip()[:90], f"say {better!r}")
            for pattern, better in UNUSUAL.items()
            if re.search(pattern, text, re.IGNORECASE)
        ]
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_comments_and_messages_are_plain_english(file: Path) -> None:
    assert faults(file.read_text()) == []


def test_the_check_sees_what_it_should() -> None:
    source = '''
def draw(path, size):
    """Of the picture.

    Args:
        path: that is written to; if it exists, it is replaced.
        size (int): Width and height, in pixels.

    Raises:
        ValueError: `size` is no positive number.
    """
    # Begin anew.
    raise ValueError(f"{size} is no size")
'''
    assert [(line, better) for line, _, better in faults(source)] == [
        (2, "begin with a verb or a noun"),
        (2, "begin with a verb or a noun"),
        (3, "say 'image'"),
        (3, "say 'is not a'"),
        (13, "say 'is not a'"),
        (12, "say 'again'"),
    ]
    assert faults(source[: source.index("Of the")] + 'Draw a square."""\n    return f"{path} has no room"\n') == []
