"""Example inputs of exports: whatever a model takes, as the arguments of a tracer."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import CoRaError, DataError
from cora_plugin.batches import samples, tensors
from cora_plugin.outputs import Batch, named, suited

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A model's example inputs by their place, and the outputs that they give.

    `names` are those of the arguments in the model's forward; `outputs` by name.
    """

    args: tuple[Any, ...]
    names: tuple[str, ...]
    outputs: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: nn.Module,
        batch: Batch,
        unpack: Callable[[Any], Any] = lambda value: value,
    ) -> "Example":
        """Run a model on its example inputs.

        Args:
            model: The model, on the device and of the type that it is exported with.
            batch: A tensor, a tuple of arguments, or a mapping of keywords.
            unpack: Turns an output of the toolkit's own type into a tensor.

        Raises:
            DataError: The model does not run with them.
        """
        try:
            args, names = _placed(model.forward, batch)
            args = suited(model, args)
            outputs = named(model(*args), unpack)
        except Exception as error:
            if isinstance(error, CoRaError):
                raise
            raise DataError(
                "args: the model cannot be run with this example input, "
                f"{_described(batch)}: {error}; pass images, a tuple of arguments or a "
                "mapping of keywords as the model takes them"
            ) from error
        plain = {name: value.detach() for name, value in outputs.items()}
        return cls(args, names, plain)

    @property
    def input_names(self) -> list[str]:
        """Names of the tensors, `input` where there is one."""
        flat = [
            name if len(parts) == 1 else f"{name}.{index}"
            for name, value in zip(self.names, self.args, strict=True)
            for parts in [list(tensors(value))]
            for index, _ in enumerate(parts)
        ]
        return ["input"] if len(flat) == 1 else flat

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors in the order of their names."""
        return list(tensors(self.args))

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, `output` where there is one."""
        if len(self.outputs) == 1:
            return ["output"]
        return [f"output.{n}" if n.isdecimal() else n for n in self.outputs]

    def named(
        self,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> tuple[list[str], list[str]]:
        """Names of the inputs and the outputs of a file.

        Args:
            inputs: Those that are wanted; None: `input_names`.
            outputs: Likewise; None: `output_names`.

        Raises:
            CoRaError: There are too many or too few, or one is there twice.
        """
        found = []
        for key, wanted, own in (
            ("input_names", inputs, self.input_names),
            ("output_names", outputs, self.output_names),
        ):
            if wanted is not None and len(wanted) != len(own):
                raise CoRaError(
                    f"{key}: {list(wanted)} are {len(wanted)}, and the model has "
                    f"{len(own)}; name each, in their order"
                )
            found.append(list(own if wanted is None else wanted))
        both = [*found[0], *found[1]]
        twice = next((name for name in both if both.count(name) > 1), None)
        if twice is not None and not (inputs is None and outputs is None):
            raise CoRaError(
                f"input_names, output_names: {twice!r} is there twice; every input and "
                "output needs a name of its own"
            )
        return found[0], found[1]

    def dynamic_axes(
        self, inputs: Sequence[str], outputs: Sequence[str]
    ) -> dict[str, dict[int, str]]:
        """The first axis of what has as many rows as the first input, left free."""
        count = samples(self.args)
        pairs = [
            *zip(inputs, self.inputs, strict=False),
            *zip(outputs, self.outputs.values(), strict=False),
        ]
        return {
            name: {0: "batch"}
            for name, value in pairs
            if value.ndim and len(value) == count
        }


def in_float32(model: nn.Module) -> nn.Module:
    """A copy that is about to be traced, in float32, in place.

    Tracers of quantizers know no other type. What is quantized is stored as integers
    all the same; the rest of the file computes in float32.
    """
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for dtype in types - {torch.float32}:
        log.info("the model is of %s; the file computes in float32", dtype)
    for module in model.modules():  # Brevitas' scales are of the type noted here.
        noted = vars(module).get("dtype")
        if isinstance(noted, torch.dtype) and noted.is_floating_point:
            vars(module)["dtype"] = torch.float32
    return model.float()


def flattened(
    forward: Callable[..., Any],
    names: Sequence[str],
    unpack: Callable[[Any], Any] = lambda value: value,
) -> Callable[..., Any]:
    """A forward that returns a tensor, or a tuple of an answer's tensors.

    Tracers take tensors and tuples; mappings and dataclasses they refuse.

    Args:
        forward: A model's.
        names: Of the arguments that it is traced with, in their order.
        unpack: As for `Example.of`.
    """

    def flat(*args: Any, **keywords: Any) -> Any:
        answer = forward(*args, **keywords)
        if isinstance(unpack(answer), Tensor):
            return answer
        found = tuple(named(answer, unpack).values())
        return found[0] if len(found) == 1 else found

    # NNCF finds what quantizes an input by its name. Arguments that are not given would
    # become inputs of the file.
    signature = inspect.signature(forward)
    if all(name in signature.parameters for name in names):
        given = [signature.parameters[name] for name in names]
        vars(flat)["__signature__"] = signature.replace(parameters=given)
    return flat


def _placed(
    forward: Callable[..., Any], batch: Batch
) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Arguments by their place, and their names.

    Raises:
        DataError: The model has no such arguments.
    """
    signature = inspect.signature(forward)
    try:
        if isinstance(batch, Mapping):
            bound = signature.bind(**batch)
        elif isinstance(batch, tuple | list) and not isinstance(batch, Tensor):
            bound = signature.bind(*batch)
        else:
            bound = signature.bind(batch)
    except TypeError as error:
        raise DataError(
            f"args: the model does not take {_described(batch)}: {error}; pass a tuple "
            "of its arguments or a mapping of its keywords"
        ) from error
    given = set(bound.arguments)
    bound.apply_defaults()
    names = [*bound.arguments]
    last = max((i for i, name in enumerate(names) if name in given), default=-1)
    args, called = [], []
    for name in names[: last + 1]:
        kind = signature.parameters[name].kind
        value = bound.arguments[name]
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args += value
            called += [f"{name}.{index}" for index in range(len(value))]
        elif kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            if name in given:
                raise DataError(
                    f"args: {name} can be given to the model by its name alone, which "
                    "tracers cannot; wrap the model so that it takes it by its place"
                )
        else:
            args.append(value)
            called.append(name)
    return tuple(args), tuple(called)


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return str(list(batch.shape))
    if isinstance(batch, Mapping):
        return f"keywords {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        parts = map(_described, batch)
        return f"({', '.join(parts)})"
    return type(batch).__name__
