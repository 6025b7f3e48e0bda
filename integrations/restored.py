"""A model that is as it was before, whatever ended the work on it, and at any moment.

Toolkits' context managers undo what they note that they did. An interrupt between the
deed and the note, or in the middle of undoing, leaves it done: quantizers that stay
off, or a hook mode that stays on for the whole process. So what the model and torch
were like is recorded before the work, and after a failure that is what they become.
"""

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import (
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from cora_plugin.interrupts import interrupt_behind

_guarded: set[int] = set()
"""Models that are within a `restored` block, by identity."""


class restored:  # noqa: N801, a context manager, in the manner of torch.no_grad
    """Within it, any failure leaves a model exactly as it was on entering.

    That is each module's class, attributes and hooks, each tensor's values and its
    place in memory, whether it takes gradients, and torch's modes of this thread. In a
    block of the same model, another one does nothing.

    It takes memory of the model's size. Not a generator, for an interrupt may end one
    between two of its instructions, and then its clean-up waits for the collector.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: Saved | None = None

    def __enter__(self) -> None:
        """Record what the model is like."""
        if id(self._model) in _guarded:
            return
        try:
            self._saved = Saved(self._model)
            _guarded.add(id(self._model))
        except BaseException:  # No exit follows, which would take it out again.
            _guarded.discard(id(self._model))
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After a failure, make it so again."""
        if self._saved is None:
            return
        while error is not None:
            try:
                self._saved.restore()
                break
            except KeyboardInterrupt:  # Again: the first is under way already.
                continue
        _guarded.discard(id(self._model))
        if error is None:
            return
        interrupt = interrupt_behind(error)
        if interrupt is not None and interrupt is not error:
            raise interrupt from None  # Clean-up failed after it.


class Saved:
    """What a model and torch's modes are like, at any moment.

    Args:
        model: The model, whose tensors are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, type(module), {k: _Own(v) for k, v in vars(module).items()})
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [
            (tensor, tensor.data, tensor.data.clone(), tensor.requires_grad)
            for tensor in tensors
            if not is_lazy(tensor) and not tensor.is_meta
        ]
        self._gradients = torch.is_grad_enabled()
        self._modes = _get_current_function_mode_stack()

    def restore(self) -> None:
        """Make everything so again; can be done anew when it was interrupted."""
        # First, for what follows calls torch.
        while _get_current_function_mode_stack():
            _pop_mode()
        for mode in self._modes:
            _push_mode(mode)
        torch.set_grad_enabled(self._gradients)
        for module, cls, attributes in self._modules:
            module.__class__ = cls
            values = {name: own.restored() for name, own in attributes.items()}
            vars(module).update(values)
            for name in vars(module).keys() - values.keys():
                del vars(module)[name]
        for tensor, place, content, gradients in self._tensors:
            if tensor.data_ptr() != place.data_ptr() or tensor.shape != place.shape:
                tensor.data = place
            if not torch.equal(place, content):
                place.copy_(content)
            if tensor.requires_grad != gradients:
                tensor.requires_grad_(gradients)


class _Own:
    """An attribute of a module, and what was in it if it is a container."""

    def __init__(self, value: Any) -> None:
        self._value = value
        plain = isinstance(value, dict | list | set)
        self._content = value.copy() if plain else None

    def restored(self) -> Any:
        """The attribute, the same object, with what was in it."""
        value, content = self._value, self._content
        if isinstance(content, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)
        return value
