"""What the documents say is so: messages that there are, examples that run."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from plain_host import PlainHost
from small_net import batches, distance, net

from cora_plugin.cli import parser
from cora_plugin.search import STRATEGIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page):
    return re.findall(r"(?s)```python\n(.*?)```", (DOCS / page).read_text())


def texts():
    """Every text of the sources, those of f-strings and joined lines as one."""
    found = []
    for folder in ("cora_plugin", "adapters", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            part.value if isinstance(part, ast.Constant) else "…"
                            for part in node.values
                        )
                    )
    return found


def test_every_message_is_one():
    page = (DOCS / "troubleshooting.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    messages = [row[0].removeprefix("| ") for row in rows if row[0] != "| message"]
    messages = [each for each in messages if not each.startswith("---")]
    assert len(messages) > 20
    known = texts()
    parts = [part.strip(" …") for each in messages for part in re.split("…|, ", each)]
    assert [p for p in parts if not any(p in text for text in known)] == []


def test_settings_are_read_as_the_page_has_them():
    examples = blocks("settings.md")
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "example", "exec"), {})


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "uniform", STRATEGIES["uniform"])
    host = PlainHost(net())
    before = distance(host, batches(1, seed=9)[0])
    names = {"host": host, "loader": batches()}
    (example,) = blocks("adding-a-method.md")
    exec(compile(example, "example", "exec"), names)
    assert 0 < names["report"].budget_used <= names["report"].budget_allowed
    assert distance(host, batches(1, seed=9)[0]) < before


def commands():
    """Folder and line of every command in a page, but those of Brevitas' own flags."""
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *DOCS.rglob("*.md")]
    for path in sorted(pages):
        for block in re.findall(r"(?s)```\n(.*?)```", path.read_text("utf-8")):
            for folder, line in re.findall(
                r"(?m)^(?:cd (\S+) && |.* && )?cora-plugin (.*)$", block
            ):
                if not line.startswith("brevitas-ptq"):
                    yield folder, line


@pytest.mark.parametrize("folder, line", [*dict.fromkeys(commands())])
def test_every_command_can_be_read(folder, line):
    flags = parser().parse_args(shlex.split(line, comments=True))
    recipe = getattr(flags, "recipe", None)
    assert recipe in (None, Path("recipe.yaml")) or (ROOT / folder / recipe).exists()


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_every_page_is_in_the_site(path):
    nav = (DOCS / "site" / "mkdocs.yml").read_text()
    assert f": {path.relative_to(DOCS).as_posix()}\n" in nav
