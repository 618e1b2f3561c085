"""The examples of README and guide: Python runs as it stands, and commands have such options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flaxtransfer.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "experiments/guide.md")}
BLOCKS = [
    (name, *block)
    for name, text in PAGES.items()
    for block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
]
EXAMPLES = [pytest.param(text, id=name) for name, language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for _, language, text in BLOCKS
    for line in text.splitlines()
    if not language and line.startswith("flaxtransfer ")
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_the_commands(command):
    parse(shlex.split(command, comments=True)[1:])


def test_the_links_lead_somewhere():
    """To files, and to headings of the guide."""
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-")
        for line in PAGES["experiments/guide.md"].splitlines()
        if line.startswith("## ")
    }
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = link.partition("#")
            assert ((ROOT / page).parent / path).exists(), link
            assert not heading or heading in headings, link


def test_there_are_examples():
    assert (len(EXAMPLES), len(COMMANDS)) == (6, 13)
