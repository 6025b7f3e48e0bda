"""Write the figures of the pages anew, from what the benchmarks measured.

python benchmarks/readme.py

A page says in a comment which table stands below it and with what arguments, quoted as
in a shell; or `text` and a piece of prose with names of figures. What is between it and
the comment "end" is made of results/ and searches/, where `--json` of a new run goes.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

import file_tables as files
import network_tables as networks
from figures import text
from peer_tables import compared
from qat_table import training
from seed_tables import seeds
from task_tables import tasks

from cora_plugin.adapters.errors import CoRaError, FileError
from cora_plugin.adapters.files import whole_file

ROOT = Path(__file__).parent.parent
PAGES = (
    "benchmarks/README.md",
    "README.md",
    "docs/brevitas.md",
    "docs/exports.md",
    "docs/methods.md",
    "docs/w4a4.md",
)

TABLES = {
    each.__name__: each
    for each in (
        *(networks.accuracy, networks.peers, networks.rounding, networks.learned),
        *(networks.butterworth, networks.demo, networks.brings, networks.budgets),
        *(files.exports, files.latency, files.divergence, files.merged),
        *(files.formats, files.cost, files.growth),
        *(tasks, seeds, training, compared),
    )
}
"""Tables by the names that pages call them by."""

BEGIN, END = "<!-- figures:", "<!-- end -->"
# What is between them does not reach into another block.
BLOCK = re.compile(
    rf"^( *){BEGIN}((?:(?!-->).)*)-->$(?:(?!{BEGIN}).)*?^ *{END}$", re.M | re.S
)


def filled(page: str) -> str:
    """A page with the figures that its comments ask for.

    Raises:
        FileError: A block has no end, asks for a table that there is not, or for a
            figure that no file has.
    """
    made, found = BLOCK.subn(_block, page)
    if not found == page.count(BEGIN) == page.count(END):
        raise FileError(
            f"{page.count(BEGIN)} comments ask for figures, {page.count(END)} end a "
            f"block, {found} are pairs, each on lines of its own; make them as many"
        )
    return made


def _block(block: re.Match[str]) -> str:
    indent, asked = block.groups()
    kind, rest = [*asked.split(maxsplit=1), ""][:2]
    if kind == "text":
        made = text(rest.rstrip())
    elif kind in TABLES:
        made = TABLES[kind](*shlex.split(rest))
    else:
        known = ", ".join(["text", *TABLES])
        raise FileError(f"no figures are called {kind!r}; there are {known}")
    lines = "\n".join(indent + line if line else "" for line in made.split("\n"))
    comment = f"{indent}{BEGIN}{asked}-->"
    return f"{comment}\n\n{lines}\n\n{indent}{END}"


def main() -> None:
    """Write every page, or check that each stands as it would be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if a page would change"
    )
    flags = parser.parse_args()
    stale = []
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        try:
            made = filled(page)
        except CoRaError as error:
            sys.exit(f"{name}: {error}")
        if made != page:
            stale.append(name)
            if not flags.check:
                with whole_file(ROOT / name) as temporary:
                    Path(temporary).write_text(made, encoding="utf-8")
    verb = "would change" if flags.check else "written"
    print("\n".join(f"{name}: {verb}" for name in stale) or "every page is up to date")
    sys.exit(bool(flags.check and stale))


if __name__ == "__main__":
    main()
