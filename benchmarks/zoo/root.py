"""Where fetch.sh has put the packages."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("ZOO") or Path(__file__).parent.parent / "zoo-data")


def fetched(path: str) -> Path:
    """A fetched file or folder, by its path under the zoo's root.

    Raises:
        FileNotFoundError: it is not there; the message says how to fetch it.
    """
    found = ROOT / path
    if not found.exists():
        raise FileNotFoundError(
            f"{found} is not there: run benchmarks/zoo/fetch.sh, or set ZOO to the "
            "folder that it filled"
        )
    return found
