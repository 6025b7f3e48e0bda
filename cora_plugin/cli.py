"""The command line: `cora-plugin demo`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cora_plugin.adapters.errors import CoRaError


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    top = argparse.ArgumentParser(
        prog="cora-plugin",
        description="Residual adapters for ConvNets quantized with Brevitas or NNCF.",
    )
    top.add_argument("--version", action="version", version=version("cora-plugin"))
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="quantize EfficientNet-Lite0 at 4 bits, repair it, export it",
        description="Quantize a real ImageNet ConvNet at 4 bits, watch it collapse, "
        "give it adapters, export it to ONNX and run that; minutes on a CPU.",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("cora-demo"),
        help="folder for the ONNX file, the report and its picture (%(default)s)",
    )
    demo.add_argument(
        "--cora",
        default="budget=0.05",
        metavar="SETTINGS",
        help="what adapters to add, as flag text (%(default)s)",
    )
    demo.add_argument(
        "--toolkit",
        type=_toolkits,
        default="brevitas",
        help="brevitas, nncf, or both with a comma between (%(default)s)",
    )
    demo.add_argument(
        "--weight-bits", type=int, default=4, choices=range(2, 9), metavar="2..8"
    )
    demo.add_argument(
        "--act-bits", type=int, default=8, choices=range(2, 9), metavar="2..8"
    )
    return top


def _toolkits(text: str) -> list[str]:
    """Read names with commas between."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ("brevitas", "nncf"):
            raise argparse.ArgumentTypeError(f"{name!r} is neither brevitas nor nncf")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = parser().parse_args(argv)
    try:
        from cora_plugin.demo import run_demo

        run_demo(
            options.output,
            options.cora,
            options.weight_bits,
            options.act_bits,
            options.toolkit,
        )
    except (CoRaError, ModuleNotFoundError, OSError) as error:
        print(f"cora-plugin: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
