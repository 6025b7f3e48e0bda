"""Pages from outside docs/ for the site, and links led to where things are in it.

The pages are written to be read in the repository, where links between folders work.
"""

import ast
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.pages")

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/searches.md": "benchmarks/searches.md",
    "benchmarks/searches.svg": "benchmarks/searches.svg",
    "benchmarks/qat.svg": "benchmarks/qat.svg",
}
"""Files of the repository by their path, and where the site has them."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that are not in docs/."""
    for source, place in OUTSIDE.items():
        content = (ROOT / source).read_bytes()
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links from where the page stands in the repository to where it is in the site.

    Files that the site does not have, such as scripts, are named without a link.
    """
    places = {place: source for source, place in OUTSIDE.items()}
    place = page.file.src_uri
    folder = posixpath.dirname(places.get(place, f"docs/{place}"))

    def led(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        source = posixpath.normpath(posixpath.join(folder, target))
        found = OUTSIDE.get(source, source.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            return text
        here = posixpath.relpath(found, posixpath.dirname(place) or ".")
        return f"{image}[{text}]({here}{anchor})"

    return LINK.sub(led, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Warn of public names that the reference lacks; a strict build fails then."""
    shown = set(re.findall(r'id="([\w.]+)"', html))
    for module in re.findall(r"^::: ([\w.]+)$", page.markdown or "", re.M):
        for name in _public(module):
            if not any(each.endswith(f".{name}") for each in shown):
                log.warning("%s: %s has no %s", page.file.src_uri, module, name)
    return html


def _public(module: str) -> list[str]:
    """The names in a module's `__all__`, none without; it is read, not run."""
    folders = module.split(".")
    # The folders adapters and integrations stand beside the package.
    start = 1 if folders[1:2] and folders[1] in ("adapters", "integrations") else 0
    path = ROOT.joinpath(*folders[start:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.exists():
        return []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []
