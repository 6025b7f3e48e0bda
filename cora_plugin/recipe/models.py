"""The float model of a recipe, in eval mode, in layers that a toolkit can read."""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import (
    CoRaError,
    FileError,
    Key,
    ModelError,
    dotted,
)
from cora_plugin.document import Document
from cora_plugin.recipe.folder import expanded
from cora_plugin.recipe.plain import plain_norms, static_padding
from cora_plugin.recipe.schema import Recipe
from cora_plugin.typed import unknown

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys that training scripts put a model's weights under."""


@contextmanager
def own_modules() -> Iterator[None]:
    """Find modules in the working folder too, after all that is installed."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def imported(document: Document, key: Key, name: str) -> Any:
    """What `package.module:factory` names.

    Raises:
        ConfigError: There is no such module, or nothing callable of that name in it.
    """
    module, colon, attribute = name.partition(":")
    identifiers = all(part.isidentifier() for part in module.split("."))
    if not (identifiers and colon and attribute):
        raise document.error(key, f"{name!r}; name it as package.module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    # Whatever the module may raise, and where it ends the process.
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ImportError | AttributeError) else _kind(error)
        problem = f"{name} cannot be imported: {kind}{_line(error)}"
        raise document.error(key, problem) from error
    if not callable(found):
        raise document.error(key, f"{name} is not callable")
    return found


def called(
    document: Document,
    key: Key,
    name: str,
    args: Mapping[str, Any],
    of: type[CoRaError],
) -> Any:
    """What a factory makes.

    Raises:
        CoRaError: Of the class `of`: the factory fails.
    """
    factory = imported(document, key, name)
    try:
        return factory(**args)
    except CoRaError:
        raise
    # Whatever it may raise, and where it ends the process.
    except (Exception, SystemExit) as error:
        problem = f"{name} failed: {_kind(error)}{_line(error)}"
        raise document.error(key, problem, of) from error


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__}: "


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def package(document: Document, key: Key, name: str) -> Any:
    """An optional package.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem = (
            f"{dotted(key)} needs the package {error.name}, which is not installed; "
            'pip install "cora-plugin[cli]"'
        )
        located = document.error((), problem, at=key)
        raise ModuleNotFoundError(str(located), name=error.name) from error


def check_model(recipe: Recipe) -> None:
    """Look whether the model could be loaded, and load nothing.

    Raises:
        ConfigError: A name is unknown.
        FileError: The checkpoint is absent.
        ModuleNotFoundError: A package is not installed.
    """
    section, document = recipe.model, recipe.document
    if section.factory:
        imported(document, ("model", "factory"), section.factory)
    elif section.timm:
        key: Key = ("model", "timm")
        timm = package(document, key, "timm")
        if not timm.is_model(section.timm.partition(".")[0]):
            problem = unknown("model", section.timm, timm.list_models())
            raise document.error(key, problem)
    elif section.torchvision:
        key = ("model", "torchvision")
        names = package(document, key, "torchvision").models.list_models()
        if section.torchvision not in names:
            raise document.error(key, unknown("model", section.torchvision, names))
    if section.checkpoint and not expanded(section.checkpoint).is_file():
        raise document.error(
            ("model", "checkpoint"), f"no file {section.checkpoint}", FileError
        )


def load_model(recipe: Recipe) -> nn.Module:
    """Build the model and give it its weights.

    Raises:
        ModelError: The model cannot be made.
        FileError: The checkpoint cannot be read, or does not fit the model.
    """
    section, document = recipe.model, recipe.document
    source = next(n for n in ("timm", "torchvision", "factory") if getattr(section, n))
    key: Key = ("model", source)
    name = getattr(section, source)
    pretrained = section.pretrained
    if pretrained is None:
        pretrained = section.checkpoint is None
    if source == "factory":
        model = called(document, key, name, section.args, ModelError)
        if not isinstance(model, nn.Module):
            made = type(model).__name__
            raise document.error(key, f"{name} made a {made}, no module", ModelError)
    else:
        library = package(document, key, source)
        try:
            if source == "timm":
                model = library.create_model(
                    name, pretrained=pretrained, **section.args
                )
            else:
                weights = "DEFAULT" if pretrained else None
                model = library.models.get_model(name, weights=weights, **section.args)
        # Whatever a download or a constructor may raise.
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            problem = f"{name} cannot be made: {why}"
            if pretrained and not isinstance(error, TypeError):  # Of wrong args.
                problem += "; to download nothing, name weights in model.checkpoint"
            raise document.error(key, problem, ModelError) from error
    if section.checkpoint:
        _give(document, model, section.checkpoint)
    whole: nn.Module = model
    return whole.eval()


def plain_layers(model: nn.Module, example: Tensor) -> nn.Module:
    """The same function in layers of torch, where timm has its own.

    Raises:
        ModelError: A layer of timm's pads by sizes that are not constant.
    """
    if not any(type(m).__module__.startswith("timm.") for m in model.modules()):
        return model
    try:
        return plain_norms(static_padding(model, example))
    except ModelError as error:
        raise ModelError(f"model: {error}") from error


def _give(document: Document, model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint's weights, of exactly the model's names and shapes."""
    key: Key = ("model", "checkpoint")
    path = expanded(checkpoint)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of the unpickler, zip, safetensors or the file system.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise document.error(
            key,
            f"{checkpoint} holds no plain tensors ({why}); save model.state_dict(), "
            "for nothing else is unpickled",
            FileError,
        ) from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        problem = f"{checkpoint} holds a {type(state).__name__}, no state dict"
        raise document.error(key, problem, FileError)
    # What DataParallel and torch.compile put before every name.
    values = {
        k.removeprefix("module.").removeprefix("_orig_mod."): v
        for k, v in state.items()
        if isinstance(v, Tensor)
    }
    difference = _first_difference(model.state_dict(), values)
    if difference:
        raise document.error(key, f"{checkpoint}: {difference}", FileError)
    model.load_state_dict(values)


def _first_difference(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> str | None:
    for name, value in wanted.items():
        if name not in given:
            return f"no {name}, which the model has"
        if given[name].shape != value.shape:
            return (
                f"{name} is {list(given[name].shape)}, the model's {list(value.shape)}"
            )
    extra = next((name for name in given if name not in wanted), None)
    return None if extra is None else f"{extra} is not in the model"
