"""`cora-plugin brevitas-ptq`: the flags and YAML keys of Brevitas' ImageNet script.

They are those of `brevitas_ptq_imagenet_val`, and `--cora` with a `--cora-…` for each
setting. What neither knows is an error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cora_plugin.adapters.errors import ConfigError, CoRaError
from cora_plugin.config import CoRaConfig
from cora_plugin.config.cora import as_document
from cora_plugin.config.declared import described
from cora_plugin.config.old import RENAMED
from cora_plugin.document import Document, parse_value
from cora_plugin.integrations.brevitas.imagenet import ptq_imagenet, stock_script
from cora_plugin.typed import unknown

PROGRAM = "cora-plugin brevitas-ptq"


def parser() -> argparse.ArgumentParser:
    """Brevitas' own parser with CoRa's flags added."""
    with stock_script() as script:
        flags: argparse.ArgumentParser = script.create_args_parser()
    flags.prog = PROGRAM
    flags.usage = "%(prog)s [flags]\n       %(prog)s --help  # lists them"
    flags.description = "Brevitas' ImageNet PTQ script, with residual adapters."
    group = flags.add_argument_group(
        "CoRa", "residual adapters after PTQ, before bias correction"
    )
    group.add_argument(
        "--cora",
        nargs="?",
        const=True,
        metavar="SETTINGS",
        help="add adapters, with settings as flag text such as budget=0.05 if wanted; "
        "any --cora-… flag says so too",
    )
    group.add_argument(
        "--no-cora", dest="cora", action="store_false", help="add none, whatever is set"
    )
    group.add_argument(
        "--cora-report",
        type=Path,
        metavar="FILE",
        help="where the report goes as JSON (cora_report.json in --export-dir)",
    )
    for path, text in _settings().items():
        group.add_argument(
            _flag(path),
            type=_value,
            metavar=path[-1].upper(),
            help=text.replace("`", "").replace("%", "%%"),
        )
    flags.set_defaults(cora=None)
    return flags


def main(argv: Sequence[str]) -> None:
    """Run the script on a command line.

    Raises:
        CoRaError: A flag, a key or its value is wrong.
        ModuleNotFoundError: A package that the script needs is not installed.
        OSError: A file cannot be written.
    """
    flags = parser()
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config")
    given = early.parse_known_args(argv)[0].config
    if given is not None:
        flags.set_defaults(**read_defaults(Document.read(given), flags))
    options, others = flags.parse_known_args(argv)
    if others:
        known = [flag for action in flags._actions for flag in action.option_strings]
        raise ConfigError((), unknown("flag", others[0].partition("=")[0], known))
    config = _config(options)
    report = options.cora_report or Path(options.export_dir, "cora_report.json")
    result = ptq_imagenet(options, config, report)
    if result.report is not None:
        print(result.report)
        print(f"report: {report}")


def read_defaults(document: Document, flags: argparse.ArgumentParser) -> dict[str, Any]:
    """The values of a YAML file, by the names of the flags that they stand for.

    Raises:
        ConfigError: A key is unknown, or a value is none that its flag can have.
    """
    actions = {
        action.dest: action
        for action in flags._actions
        if action.dest not in ("help", "config")
    }
    defaults = {}
    for key, value in document.values.items():
        name = key.replace("-", "_")
        if name not in actions:
            raise document.error((), unknown("key", key, actions), at=(key,))
        problem = _problem(actions[name], value)
        if problem:
            raise document.error((key,), f"{value!r} is {problem}")
        defaults[name] = Path(value) if name == "cora_report" and value else value
    return defaults


def _problem(action: argparse.Action, value: Any) -> str | None:
    """Why a flag cannot have a value that was not read from a command line."""
    if action.dest.startswith("cora"):
        return None  # CoRaConfig says.
    if action.nargs == 0:
        return None if isinstance(value, bool) else "neither true nor false"
    if action.choices is not None:
        known = list(action.choices)
        close = ", ".join(map(str, known[:12])) + (", …" if len(known) > 12 else "")
        return None if value in known or value == action.default else f"none of {close}"
    if value is None and action.default is None:
        return None
    if isinstance(action.default, float) or action.type is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        return None if right else "not a number"
    if action.type is int:
        right = isinstance(value, int) and not isinstance(value, bool)
        return None if right else "not a whole number"
    return None if isinstance(value, str) else "not text"


def _config(options: argparse.Namespace) -> CoRaConfig | None:
    """The settings of `--cora` with those of `--cora-…` over them; None is off."""
    given = {path: getattr(options, "cora_" + "_".join(path)) for path in _settings()}
    given = {path: value for path, value in given.items() if value is not None}
    if options.cora is False or (options.cora is None and not given):
        return None
    document = as_document(options.cora)
    for path, value in given.items():
        document.put(path, value, _flag(path))
    return CoRaConfig.read(document)


def _settings() -> dict[tuple[str, ...], str]:
    """Each setting that has a flag, and what the flag does; old names come last."""
    flags = {
        path: f"{text} ({'none' if default in ({}, ()) else default})"
        for path, default, text in described(CoRaConfig)
    }
    for old, now in RENAMED.items():
        for path in list(flags):
            if path[0] == now:
                flags[(old, *path[1:])] = f"the old name of {_flag(path)}"
    return flags


def _flag(path: tuple[str, ...]) -> str:
    return "--cora-" + "-".join(path).replace("_", "-")


def _value(text: str) -> Any:
    try:
        return parse_value(text)
    except CoRaError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
