"""Trains a quantized model on, for those who have no loop of their own."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from cora_plugin import processes
from cora_plugin.adapters.errors import ConfigError, CoRaError, DataError
from cora_plugin.algorithm import CoRa, ordinary_tensors
from cora_plugin.config import CoRaConfig, QATConfig
from cora_plugin.config.objective import AUTO, NAMES
from cora_plugin.guard import Step
from cora_plugin.host import TrainableHost
from cora_plugin.integrations.restored import Saved
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.items import check_loader
from cora_plugin.layer import Correction
from cora_plugin.objective import Choice, decide
from cora_plugin.outputs import device_of, moved
from cora_plugin.qat.held_out import HeldOut, Verdict, answers, batch_of
from cora_plugin.qat.hosted import hosted
from cora_plugin.qat.loop import Loop
from cora_plugin.qat.norms import measure, norms_of
from cora_plugin.qat.report import QATReport
from cora_plugin.qat.state import load_state, on_device, same_everywhere, settle

RESOLVED_IMAGES = 512
"""Training images that adapters are solved again with, at most."""


def finetune(
    model: nn.Module | TrainableHost,
    loader: Any,
    *,
    reference: nn.Module,
    held_out: Iterable[Any],
    config: QATConfig | dict[str, Any] | None = None,
    objective: Any = None,
    cora: Any = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> QATReport:
    """Train a quantized model, with adapters or without, towards the float model.

    >>> report = finetune(model, loader, reference=net, held_out=other, epochs=1)

    The trained model is kept if it is better than before on held-out images, by the
    loss that it was trained with; else, and if anything fails, the model is left
    unchanged. It ends in evaluation mode. Where a checkpoint is named, an interrupted
    training goes on from it, as if it had not been interrupted; begin again with the
    same quantized model.

    In several processes (`torchrun`) each has the same quantized model and its share of
    the data, and all end with the same one: a step follows the mean gradient of all
    samples.

    Args:
        model: What the toolkit quantized, changed in place, or its host.
        loader: Yields images [N, …] or `(images, labels)`; a `DataLoader` or a list.
        reference: The float model, in evaluation mode while it runs.
        held_out: Batches that judge; walked once, and kept.
        config: A `QATConfig`, or a dict of its fields.
        objective: What "near to the float model" means: an `Objective`, or what the
            setting of that name takes. None: what the adapters were made by; without
            adapters, or with a function of one's own, decided by the outputs.
        cora: Settings to solve adapters again with (`adapters="resolve"`); None: those
            that they were made with.
        device: Where to train; None: on a GPU if there is one. The models come back.
        settings: Fields of `QATConfig` in place of those of `config`.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    chosen = QATConfig.of(config, **settings)
    if cora is not None and chosen.adapters != "resolve":
        raise ConfigError(
            ("cora",),
            f"nothing is solved with it where adapters={chosen.adapters}; pass "
            "adapters=resolve, or give the model its adapters before it is trained",
        )
    gpu = "cuda" if torch.cuda.is_available() else None
    inner = model if isinstance(model, nn.Module) else model.model
    place = torch.device(device or gpu or device_of(inner))
    with processes.agreeing(), ordinary_tensors(), on_device([inner, reference], place):
        with evaluation(reference):
            tuner = _Tuner(model, loader, reference, held_out, chosen, objective, cora)
            return tuner.run()


class _Tuner:
    """One training: before, the loop, and what is kept of it."""

    def __init__(
        self,
        model: nn.Module | TrainableHost,
        loader: Any,
        reference: nn.Module,
        held_out: Iterable[Any],
        config: QATConfig,
        objective: Any,
        cora: Any,
    ) -> None:
        self._example = processes.of_first("an example", _first(loader))
        self._host = hosted(model, self._example)
        self._model = self._host.model
        self._model.eval()
        self._loader, self._reference, self._config = loader, reference, config
        choice = self._choice(objective)
        self._objective, self._notes = choice.objective, choice.notes
        self._cora = cora
        self._held_out = HeldOut(held_out, reference, self._objective, config.labels)
        self._adapters = _names(self._host.correction)

    def run(self) -> QATReport:
        host, config = self._host, self._config
        saved = Saved(self._model)
        restore = partial(self._restore, saved, host.correction, host.settings)
        args = self._loader, self._reference, self._held_out, self._objective
        try:
            same_everywhere(self._model)
            before = self._held_out(host)
            made_for = {
                "distance before": float(f"{before.distance.value:.3g}"),
                "adapters": sorted(host.correction.adapters),
            }
            settle(self._model)
            loop = Loop(host, *args, config, made_for)
            with loop.scheduler:
                loop.run()
                transitions = loop.scheduler.transitions()
            after, norms = self._settled(loop)
            pairs = after.losses - before.losses
            verdict = Step.of("qat", before.distance, after.distance, pairs)
        except BaseException:
            restore()
            raise
        if not verdict.kept:
            restore()
            after = before
        return QATReport(
            settings=vars(config).copy(),
            before=before.distance,
            after=after.distance,
            top1=(before.top1, after.top1),
            verdict=verdict,
            transitions=transitions,
            measured=tuple(loop.measured),
            losses=tuple(loop.losses),
            epochs=loop.epochs,
            stopped=loop.stopped,
            norms=norms,
            adapters=self._adapters,
            notes=self._notes,
            seconds=loop.seconds,
            overhead=loop.scheduler.seconds / max(loop.seconds, 1e-9),
        )

    def _choice(self, wanted: Any) -> Choice:
        """The objective that is wanted, or else that of the adapters."""
        if hasattr(wanted, "distance"):
            return Choice(wanted)
        stored = self._host.settings or {}
        axis = stored.get("axis")
        if wanted is None:
            wanted = stored.get("objective", AUTO)
            if isinstance(wanted, str) and wanted not in NAMES:
                wanted = AUTO  # A function, of which settings hold the name alone.
        config = CoRaConfig(objective=wanted, axis=axis)
        return decide(config, answers(self._reference, self._example), self._example)

    def _settled(self, loop: Loop) -> tuple[Verdict, str]:
        """The best state of training, its norms measured and its adapters stored."""
        if loop.best is not None:
            load_state(self._model, loop.best)
        self._model.eval()
        norms = "there are none"
        if norms_of(self._model):
            norms = "their statistics are those of the quantized model (frozen)"
            if self._config.norms == "estimated":
                found = measure(self._model, self._host.run, self._images())
                norms = f"statistics of {found} measured anew after training"
        self._host.renew()
        after = self._held_out(self._host)
        if self._host.correction.adapters or self._cora is not None:
            after = self._solved_again(after)
        return after, norms

    def _solved_again(self, after: Verdict) -> Verdict:
        """The better of the adapters as they are and those solved again, if wanted."""
        config = self._config
        if config.adapters != "resolve":
            self._adapters += ", trained along" if config.adapters == "train" else ""
            return after
        host, kept, standing = self._host, self._host.correction, self._host.settings
        settings = self._cora if self._cora is not None else standing
        host.correct(Correction())
        try:
            report = CoRa(settings, self._objective).apply(
                host.fresh(), list(self._loader_items())
            )
        except processes.ApartError:
            raise
        except CoRaError as error:
            host.renew(kept)
            host.note(standing)
            self._adapters += f", not solved again: {error}"
            return after
        other = hosted(self._model, self._example)
        again, solved = self._held_out(other), other.correction
        what = f"{after.distance} → {again.distance}"
        other.correct(Correction())
        if again.loss < after.loss:
            host.renew(solved)
            host.note(report.config)
            self._adapters = f"{_names(solved)}, solved again: {what}"
            return again
        host.renew(kept)
        host.note(standing)
        self._adapters += f", as they were, for solved again they are no better: {what}"
        return after

    def _restore(self, saved: Saved, standing: Correction, settings: Any) -> None:
        self._host.correct(Correction())
        saved.restore()
        self._host.renew(standing)
        saved.restore()  # Adapters again, to the last bit.
        self._host.note(settings)

    def _images(self) -> Iterator[Any]:
        for item in self._loader:
            yield batch_of(item, "training data", False).images

    def _loader_items(self) -> Iterator[Any]:
        images = len(self._example) * processes.count()
        return islice(iter(self._loader), -(-RESOLVED_IMAGES // images))


def _first(loader: Any) -> Any:
    """An input of the model, on the CPU, from where it is sent to other processes.

    Raises:
        DataError: There is none.
    """
    check_loader(loader, what="training data")
    for item in loader:
        images = batch_of(item, "training data", False).images
        return moved(images, torch.device("cpu"))
    raise DataError("training data: the loader is empty; pass a few batches")


def _names(correction: Correction) -> str:
    count = len(correction.adapters)
    if count == 1:
        return "1 layer has one"
    return f"{count} layers have one" if count else "there are none"
