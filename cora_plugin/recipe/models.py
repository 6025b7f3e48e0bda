"""The float model of a recipe, in eval mode, in layers that a toolkit can read."""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.demo_model import plain_norms, static_padding
from cora_plugin.document import Document, Key, dotted, unknown
from cora_plugin.recipe.schema import Recipe

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
        CoRaError: There is no such module, or nothing callable of that name in it.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        message = f"{dotted(key)}: {name!r}; name it as package.module:function"
        raise document.error(key, message)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        message = f"{dotted(key)}: {name} cannot be imported: {error}"
        raise document.error(key, message) from error
    if not callable(found):
        raise document.error(key, f"{dotted(key)}: {name} is not callable")
    return found


def package(document: Document, key: Key, name: str) -> Any:
    """An optional package.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = (
            f"{dotted(key)} needs the package {error.name}, which is not installed; "
            'pip install "cora-plugin[cli]"'
        )
        located = document.error(key, message)
        raise ModuleNotFoundError(str(located), name=error.name) from error


def check_model(recipe: Recipe) -> None:
    """Look whether the model could be loaded, and load nothing.

    Raises:
        CoRaError: A name is unknown or a file absent.
        ModuleNotFoundError: A package is not installed.
    """
    section, document = recipe.model, recipe.document
    if section.factory:
        imported(document, ("model", "factory"), section.factory)
    elif section.timm:
        key: Key = ("model", "timm")
        timm = package(document, key, "timm")
        if not timm.is_model(section.timm.partition(".")[0]):
            message = unknown("model", section.timm, timm.list_models(), "model.timm")
            raise document.error(key, message)
    elif section.torchvision:
        key = ("model", "torchvision")
        names = package(document, key, "torchvision").models.list_models()
        if section.torchvision not in names:
            message = unknown("model", section.torchvision, names, "model.torchvision")
            raise document.error(key, message)
    if section.checkpoint and not _path(section.checkpoint).is_file():
        raise document.error(
            ("model", "checkpoint"),
            f"model.checkpoint: no file {section.checkpoint}",
        )


def load_model(recipe: Recipe) -> nn.Module:
    """Build the model and give it its weights.

    Raises:
        CoRaError: The weights cannot be had, or do not fit the model.
    """
    section, document = recipe.model, recipe.document
    source = next(n for n in ("timm", "torchvision", "factory") if getattr(section, n))
    key: Key = ("model", source)
    name = getattr(section, source)
    pretrained = section.pretrained
    if pretrained is None:
        pretrained = section.checkpoint is None
    if source == "factory":
        model = imported(document, key, name)(**section.args)
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise document.error(key, f"{dotted(key)}: {name} made a {kind}, no module")
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
            raise document.error(
                key, f"{dotted(key)}: {name} cannot be made: {why}"
            ) from error
    if section.checkpoint:
        _give(document, model, section.checkpoint)
    made: nn.Module = model
    return made.eval().requires_grad_(False)


def plain_layers(model: nn.Module, example: Tensor) -> nn.Module:
    """The same function in layers of torch, where timm has its own.

    Raises:
        CoRaError: A layer of timm's pads by sizes that are not constant.
    """
    if not any(type(m).__module__.startswith("timm.") for m in model.modules()):
        return model
    try:
        return plain_norms(static_padding(model, example))
    except CoRaError:
        raise
    except ValueError as error:
        raise CoRaError(f"model: {error}") from error


def _give(document: Document, model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint's weights, of exactly the model's names and shapes."""
    key: Key = ("model", "checkpoint")
    path = _path(checkpoint)
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
            f"model.checkpoint: {checkpoint} holds no plain tensors ({why}); save "
            "model.state_dict(), for nothing else is unpickled",
        ) from error
    for name in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise document.error(
            key, f"model.checkpoint: {checkpoint} holds a {kind}, no state dict"
        )
    # What DataParallel and torch.compile put before every name.
    values = {
        k.removeprefix("module.").removeprefix("_orig_mod."): v
        for k, v in state.items()
        if isinstance(v, Tensor)
    }
    problem = _first_difference(model.state_dict(), values)
    if problem:
        raise document.error(key, f"model.checkpoint: {checkpoint}: {problem}")
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


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()
