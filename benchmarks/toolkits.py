"""What the benchmarks' command lines share: which network, in which toolkit, how."""

import argparse
import json
from pathlib import Path
from typing import Any

from zoo import MODELS

from cora_plugin.adapters.files import whole_file
from cora_plugin.integrations.toolkit import Options, Toolkit, toolkits


def network_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which network is quantized, and how: see `ptq_options`."""
    parser.add_argument("--model", choices=sorted(MODELS), default="lite0")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--depthwise-bits", type=int, help="default: as the others")
    parser.add_argument("--act-range", help="estimator; default: by --act-bits")
    parser.add_argument("--equalize-iters", type=int, help="Brevitas only")


def run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a benchmark that works on one network in one toolkit."""
    network_flags(parser)
    known = toolkits()
    parser.add_argument("--toolkit", choices=known, default=known[0])
    parser.add_argument("--json", type=Path, help="write what was measured here, too")


def write_json(path: Path | None, measured: Any) -> None:
    """Write what was measured to where `--json` says, if it does."""
    if path is not None:
        with whole_file(path) as temporary:
            Path(temporary).write_text(json.dumps(measured, indent=2))


def ptq_options(toolkit: Toolkit[Any], flags: Any, **more: Any) -> Options:
    """A toolkit's options as `network_flags` and `more` have them."""
    given = {"depthwise_bits": flags.depthwise_bits}
    for flag in ("weight_bits", "act_bits", "act_range", "equalize_iters"):
        value = getattr(flags, flag)
        if value is not None:
            given[flag] = value
    options: Options = toolkit.options(**given, **more)
    return options


def weights(flags: Any) -> str:
    """Bit widths of weights and activations, such as W4A8."""
    return f"W{flags.weight_bits}A{flags.act_bits}"
