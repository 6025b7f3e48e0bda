"""The command line: `cora-plugin demo`, `run`, `compare` and `brevitas-ptq`."""

import argparse
import io
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from cora_plugin.adapters.errors import ConfigError, CoRaError, FileError
from cora_plugin.integrations.points import toolkits
from cora_plugin.interrupts import Ended, interrupt_behind, interruptible


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    top = argparse.ArgumentParser(
        prog="cora-plugin",
        description="Residual adapters for ConvNets quantized with Brevitas or NNCF.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=version("cora-plugin"))
    commands = top.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_init(commands)
    _add_run(commands)
    _add_compare(commands)
    commands.add_parser(
        "brevitas-ptq",
        allow_abbrev=False,
        # It has a parser of its own, which imports Brevitas.
        add_help=False,
        help="Brevitas' ImageNet PTQ script, with all its flags, and --cora",
    )
    return top


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="quantize EfficientNet-Lite0 at 4 bits, repair it, export it",
        description="Quantize a real ImageNet ConvNet at 4 bits, watch it collapse, "
        "give it adapters, export it to ONNX and run that; minutes on a CPU.",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("cora-demo"),
        help="folder for the ONNX file, reports and pictures (%(default)s)",
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
        default=toolkits()[:1],
        metavar="NAMES",
        help=f"of {', '.join(toolkits())}, with commas between; the first by default",
    )
    demo.add_argument(
        "--weight-bits", type=int, default=4, choices=range(2, 9), metavar="2..8"
    )
    demo.add_argument(
        "--act-bits", type=int, default=8, choices=range(2, 9), metavar="2..8"
    )


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="quantize, repair and export a model of yours, as a YAML recipe says",
        description="Quantize a model, add adapters, compare with the float model, "
        "export and report, as a YAML recipe says.",
    )
    run.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        help="the YAML file; left out, the flags of init say what to do",
    )
    _add_model(run)
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace a value of the recipe, such as data.images=24; may be repeated",
    )
    run.add_argument(
        "--check", action="store_true", help="say whether it could run, and stop"
    )
    much = run.add_mutually_exclusive_group()
    much.add_argument("--quiet", action="store_true", help="print errors alone")
    much.add_argument(
        "--verbose", action="store_true", help="print what the toolkit prints, too"
    )
    run.add_argument(
        "--log", type=Path, metavar="FILE", help="a file for what the toolkit prints"
    )


def _add_init(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    init = commands.add_parser(
        "init",
        allow_abbrev=False,
        help="write a first recipe",
        description="Write a first recipe for a model and a folder of images.",
    )
    init.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        default=Path("recipe.yaml"),
        help="the YAML file (%(default)s)",
    )
    _add_model(init)


def _add_model(command: argparse.ArgumentParser) -> None:
    """The flags that say in place of a recipe what to do."""
    flags = command.add_argument_group("in place of a recipe")
    flags.add_argument("--timm", metavar="NAME", help="a model of timm")
    flags.add_argument("--torchvision", metavar="NAME", help="a model of torchvision")
    flags.add_argument(
        "--factory", metavar="MODULE:FUNCTION", help="what makes a model of yours"
    )
    flags.add_argument("--images", metavar="FOLDER", help="images to calibrate with")
    flags.add_argument("--toolkit", choices=toolkits(), help="what quantizes")
    flags.add_argument("--weight-bits", type=int, metavar="2..8")
    flags.add_argument("--act-bits", type=int, metavar="2..8")
    flags.add_argument("--cora", metavar="SETTINGS", help="as flag text: budget=5%%")
    flags.add_argument(
        "--formats", nargs="+", metavar="FORMAT", help="what to export, as adapters"
    )
    flags.add_argument("--output", metavar="FOLDER", help="where the results go")


def _add_compare(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="measure a model in toolkits × recipes × bits × methods × budgets",
        description="Measure every combination that the `compare` section of a YAML "
        "recipe lists, each in a process of its own; write tables and a page. The "
        "same command goes on where a comparison stopped.",
    )
    compare.add_argument("recipe", type=Path, help="the YAML file")
    compare.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace a value of the recipe; may be repeated",
    )
    compare.add_argument(
        "--jobs",
        type=_positive,
        help="cells at once (1; with --ray as many as there is room for)",
    )
    compare.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run cells on a Ray cluster; without an address on one that runs here, or "
        "a new one of this machine; write it behind the recipe",
    )
    compare.add_argument("--yes", action="store_true", help="take any number of cells")
    compare.add_argument(
        "--retry", action="store_true", help="measure failed cells again"
    )
    compare.add_argument(
        "--check", action="store_true", help="say whether it could run, and stop"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _toolkits(text: str) -> list[str]:
    """Read names with commas between."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in toolkits():
            known = ", ".join(toolkits())
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    It is 2 when the command did not do its work, 3 when an export of several failed,
    128 and the signal's number when it was interrupted.
    """
    flags = parser()
    options, rest = flags.parse_known_args(argv)
    if rest and options.command != "brevitas-ptq":
        flags.error(f"unrecognized arguments: {' '.join(rest)}")
    for stream in (sys.stdout, sys.stderr):
        _encodable(stream)
    interrupts = None
    try:
        with interruptible() as interrupts:
            failures = _run(options, rest)
    except BaseException as error:
        interrupt = interrupt_behind(error)
        if interrupt is None and interrupts is not None:
            interrupt = interrupts.first  # The error came of it, and does not say so.
        if interrupt is not None:
            by = interrupt.signal if isinstance(interrupt, Ended) else signal.SIGINT
            print("cora-plugin: interrupted", file=sys.stderr)
            return 128 + by
        if isinstance(error, CoRaError | ModuleNotFoundError | OSError):
            print(f"cora-plugin: {error}", file=sys.stderr)
            return 2
        raise
    for failure in failures:
        print(f"cora-plugin: {failure}", file=sys.stderr)
    return 3 if failures else 0


def _encodable(stream: TextIO) -> None:
    """Let a stream that cannot write a character write a question mark.

    In the C locale Python's streams only let through what came from undecodable bytes.
    """
    refuses = "strict", "surrogateescape"
    if isinstance(stream, io.TextIOWrapper) and stream.errors in refuses:
        stream.reconfigure(errors="replace")


def _run(options: argparse.Namespace, rest: list[str]) -> Sequence[CoRaError]:
    """Run a command; return what failed of it while the rest was done."""
    # Each command imports what it needs, and no other toolkit.
    if options.command == "demo":
        from cora_plugin.demo import run_demo

        run_demo(
            options.output,
            options.cora,
            options.weight_bits,
            options.act_bits,
            options.toolkit,
        )
    elif options.command == "run":
        return _run_recipe(options)
    elif options.command == "compare":
        from cora_plugin.grid import compare

        compare(
            options.recipe,
            options.overrides,
            jobs=options.jobs,
            yes=options.yes,
            retry=options.retry,
            only_check=options.check,
            ray=options.ray,
        )
    elif options.command == "init":
        from cora_plugin.recipe import (
            Recipe,
            check_names,
            document,
            first_recipe,
            write_first,
        )

        first = first_recipe(_model_flags(options))
        check_names(Recipe.of(document(first)))  # Refuses what `run` would refuse.
        write_first(options.recipe, first)
        print(f"{options.recipe}: written; cora-plugin run {options.recipe} runs it")
    else:
        try:
            from cora_plugin.integrations.brevitas.cli import main as brevitas_ptq
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"brevitas-ptq needs the package {error.name}, which is not installed; "
                'pip install "cora-plugin[brevitas,cli]"',
                name=error.name,
            ) from error
        brevitas_ptq(rest)
    return ()


def _run_recipe(options: argparse.Namespace) -> Sequence[CoRaError]:
    from cora_plugin.recipe import Recipe, check, document, first_recipe, run

    if options.recipe is None:
        recipe = Recipe.of(
            document(first_recipe(_model_flags(options))), options.overrides
        )
    else:
        flags = {name: getattr(options, name) for name in MODEL_FLAGS}
        for name in (name for name, value in flags.items() if value is not None):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                (), f"{flag}: the recipe says it; use --set, or no recipe"
            )
        recipe = Recipe.read(options.recipe, options.overrides)
    if options.check:
        check(recipe)
        print(f"{options.recipe or 'these flags'}: ready to run")
        return ()
    with ExitStack() as stack:
        sink = sys.stderr if options.verbose else None
        if options.log is not None:
            try:
                sink = stack.enter_context(options.log.open("w", encoding="utf-8"))
            except OSError as error:
                problem = f"--log {options.log}: cannot be written: {error.strerror}"
                raise FileError(problem) from error
        from rich.console import Console

        from cora_plugin.progress import told

        stack.enter_context(told(sink))
        console = Console(file=sys.stdout, quiet=options.quiet)
        return run(recipe, console).failures


MODEL_FLAGS = (
    "timm",
    "torchvision",
    "factory",
    "images",
    "toolkit",
    "weight_bits",
    "act_bits",
    "cora",
    "formats",
    "output",
)
"""The flags that stand in place of a recipe."""


def _model_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Their values, once those that are needed are there.

    Raises:
        ConfigError: One is not.
    """
    flags = {name: getattr(options, name) for name in MODEL_FLAGS}
    models = [name for name in ("timm", "torchvision", "factory") if flags[name]]
    if len(models) != 1:
        raise ConfigError(
            (), "name a recipe, or one model by --timm, --torchvision or --factory"
        )
    for name, what in {
        "images": "a folder of images by --images",
        "toolkit": f"a toolkit by --toolkit, {' or '.join(toolkits())}",
    }.items():
        if not flags[name]:
            raise ConfigError((), f"name {what}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
