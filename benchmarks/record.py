"""Shows that a refactoring changes no figure: every public path, before and after.

OMP_NUM_THREADS=1 python benchmarks/record.py --json before.json
OMP_NUM_THREADS=1 python benchmarks/record.py --json after.json --against before.json

The first walks every public path on small nets and writes down what came of it: ranks,
divergences, bits and steps of each report, the models' outputs to the last bit, the
bytes and contents of each file. The second does it again, with the code as it is then,
and exits with 1 if a value is not the same to the last digit. Both must run on the same
machine with the same versions of the toolkits.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import ABSENT, Difference, differences, ignored
from recorder.entries import Entry, Room

import cora_plugin

PACKAGES = "torch brevitas nncf onnx onnxruntime openvino qonnx torchvision".split()


def main() -> int:
    """Record, and compare if an earlier record is given."""
    options = _options()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # Read when the libraries are loaded, so that it is too late to set it here.
        print("set OMP_NUM_THREADS=1: the order of sums must be that of one thread")
        return 2
    torch.set_num_threads(1)
    print(f"recording {Path(cora_plugin.__file__).parent}")
    earlier = json.loads(options.against.read_text()) if options.against else None
    record: dict[str, Any] = {"versions": _versions(), "entries": {}}
    old = earlier["entries"] if earlier else {}
    for name, entry in _chosen(options.only):
        start = time.perf_counter()
        values = _values(entry, old.get(name, {}))
        record["entries"][name] = values
        trouble = f", failed: {values['error']}" if "error" in values else ""
        print(f"{name}: {time.perf_counter() - start:.1f} s{trouble}", flush=True)
        options.json.write_text(json.dumps(record, indent=1))
    if not record["entries"]:
        print(f"no entry fits {' '.join(options.only)}")
        return 2
    failed = [n for n, v in record["entries"].items() if "error" in v]
    print(f"{len(record['entries'])} entries in {options.json}, {len(failed)} failed")
    if earlier is None:
        return int(bool(failed))
    return int(_compare(earlier, record, options) or bool(failed))


def _chosen(patterns: list[str]) -> Iterator[tuple[str, Entry]]:
    """The entries that one of the globs fits, in their order."""
    with _quiet():
        from recorder import commands, in_brevitas, in_nncf
    parts = {"brevitas": in_brevitas, "nncf": in_nncf, "commands": commands}
    for part, module in parts.items():
        for name, entry in module.ENTRIES.items():
            whole = f"{part}/{name}"
            if any(fnmatchcase(whole, pattern) for pattern in patterns):
                yield whole, entry


def _values(entry: Entry, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry makes, as JSON holds it, or the error that it ended with."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            made = entry(Room(Path(folder), earlier))
    # A path that fails must not keep the others from being compared.
    except Exception as error:
        message = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {message[0]}"}
    torch.set_num_threads(1)
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return plain


def _compare(earlier: dict[str, Any], record: dict[str, Any], options: Any) -> bool:
    """Print every difference; whether there is one that counts."""
    for name, now in record["versions"].items():
        then = earlier["versions"].get(name, ABSENT)
        if then != now:
            print(f"not the same {name}: {then} -> {now}; figures may differ by that")
    old, new = earlier["entries"], record["entries"]
    if options.only != ["*"]:
        old = {name: values for name, values in old.items() if name in new}
    found = [
        difference
        for name in {**old, **new}
        for difference in differences(
            old.get(name, ABSENT), new.get(name, ABSENT), name
        )
        # The file that was saved before is loaded, not compared.
        if not difference.path.endswith("/content")
    ]
    counted = [d for d in found if not ignored(d, options.ignore)]
    figures = [d for d in counted if not d.is_bytes]
    _print("figures and contents", figures)
    _print("bytes of files", [d for d in counted if d.is_bytes])
    if options.ignore:
        print(f"{len(found) - len(counted)} differences are ignored")
    if not counted:
        print("no difference")
    return bool(counted)


def _print(what: str, found: list[Difference]) -> None:
    if found:
        print(f"\n{len(found)} differences in {what}:")
    for difference in found:
        print(f"  {difference}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the toolkits' progress bars, tables and warnings to themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "processor": _processor(), **found}


def _processor() -> str:
    """The processor's name, by which libraries choose their kernels."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="what to write")
    parser.add_argument("--against", type=Path, help="an earlier record")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="GLOB",
        help="entries by name, such as 'nncf/exports/*'",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="paths whose differences do not count, such as '*/file/*'",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
