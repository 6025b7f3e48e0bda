"""Brevitas' bias correction after adapters, kept where it helps."""

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.calibrate import bias_correction_mode
from torch import Tensor, nn

from cora_plugin.calibration import ImageSplit
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.guard import Step
from cora_plugin.integrations.brevitas.algorithm import apply_cora
from cora_plugin.integrations.brevitas.host import BrevitasHost
from cora_plugin.integrations.brevitas.layers import Reference, unpack
from cora_plugin.items import Reader
from cora_plugin.objective import Distance, Sums, decide
from cora_plugin.outputs import Batch, joined, run
from cora_plugin.report import Report
from cora_plugin.width_plan import WidthPlan

log = logging.getLogger(__name__)


@torch.no_grad()
def correct_biases(calib_loader: Iterable[Any], model: nn.Module) -> None:
    """Run Brevitas' bias correction, in place, with whatever the model takes.

    Its example's `apply_bias_correction` takes pairs of images and targets alone, and
    makes floats of tokens.
    """
    model.eval()
    reader = Reader(partial(run, model, unpack=unpack))
    items = iter(calib_loader)
    # Each run counts within the mode, and the reader may run the model to try.
    read = [reader(item) for item in islice(items, 1)]
    with bias_correction_mode(model):
        for batch in chain(read, map(reader, items)):
            run(model, batch, unpack)


def apply_cora_and_correct_biases(
    calib_loader: Iterable[Any],
    model: nn.Module,
    config: AnyConfig = None,
    reference: Reference | None = None,
    plan: WidthPlan | None = None,
) -> Report:
    """`apply_cora`, then Brevitas' bias correction if it helps; in place.

    CoRa corrects biases itself, and Brevitas' correction after it may do harm. So it is
    judged like every other step: tried on a copy with the images that calibrate, and
    measured on those held out. If the distance falls, the model's biases are corrected
    with all images, and the report says so.

    Args:
        calib_loader: Yields `(images, targets)`; walked up to five times, in one order.
        model: The quantized, calibrated model.
        config: As for `apply_cora`.
        reference: As for `apply_cora`.
        plan: As for `apply_cora`.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    settings = CoRaConfig.of(config)
    judge = _Judge(calib_loader, model, settings, reference)
    report = apply_cora(calib_loader, model, settings, reference, plan)
    corrected = copy.deepcopy(model)
    correct_biases(judge.calibrating(), corrected)
    before, each = judge(model)
    after, each_after = judge(corrected)
    step = Step.of("Brevitas' bias correction", before, after, each_after - each)
    if step.kept:
        correct_biases(calib_loader, model)
    else:
        log.warning(
            "%s: left out, for on %d held-out images the model went from %s to %s away "
            "from the float one",
            step.name,
            report.held_out,
            before,
            after,
        )
    return replace(
        report,
        steps=(*report.steps, step),
        after=after if step.kept else report.after,
    )


class _Judge:
    """The distance from the float model on the images that `apply_cora` holds out."""

    def __init__(
        self,
        calib_loader: Iterable[Any],
        model: nn.Module,
        config: CoRaConfig,
        reference: Reference | None,
    ) -> None:
        self._loader = calib_loader
        host = BrevitasHost(model, reference)
        self._reader = Reader(host.run)
        split = ImageSplit(config.held_out, 0, config.seed, most=config.held_out_images)
        with torch.no_grad(), host.prepared(), host.acting(quantized=False):
            for index, item in enumerate(calib_loader):
                batch = self._reader(item)
                if not index:
                    split.learn(host.run, batch)
                split.keep(batch)
            split.close()
            self._split, self._held_out = split, split.held_out()
            self._reference = joined([host.run(batch) for batch in self._held_out])
            channels = len(host.layers[-1].weight) if host.layers else None
            first = self._held_out[0]
            images = first if isinstance(first, Tensor) else None
            choice = decide(config, self._reference, images, channels)
            self._objective = choice.objective

    def calibrating(self) -> Iterator[tuple[Batch, None]]:
        """The other images, as Brevitas takes them."""
        split = self._split.again()
        for item in self._loader:
            images = split.keep(self._reader(item))
            if images is not None:
                yield images, None

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> tuple[Distance, Tensor]:
        with quant_inference_mode(model.eval()):
            run(model, self._held_out[0], unpack)  # caches scales
            outputs = joined([run(model, batch, unpack) for batch in self._held_out])
        sums = Sums(self._objective)
        sums.add(self._reference, outputs)
        return sums.distance, sums.distances
