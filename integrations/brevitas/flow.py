"""The rest of Brevitas' PTQ flow, around the place of the adapters."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from cora_plugin.adapters.errors import CoRaError


def round_weights(
    model: nn.Module,
    calib_loader: Iterable[Any],
    gptq: bool = False,
    gpfq: bool = False,
    qronos: bool = False,
) -> None:
    """Run one of Brevitas' algorithms that round weights layer by layer, or none.

    In place, channels in the order of their activations; GPFQ and Qronos keep no float
    weights, so take a `snapshot` of the model before.

    Args:
        model: The quantized, calibrated model.
        calib_loader: Yields `(images, targets)`; walked once a layer.
        gptq: Run GPTQ.
        gpfq: Run GPFQ.
        qronos: Run Qronos.

    Raises:
        CoRaError: More than one is asked for.
    """
    if gptq + gpfq + qronos > 1:
        raise CoRaError(
            "ptq: gptq, gpfq and qronos each round the weights; choose one of them"
        )
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    if gptq:
        ptq_common.apply_gptq(
            calib_loader, model, act_order=True, create_weight_orig=True
        )
    elif gpfq:
        ptq_common.apply_gpfq(calib_loader, model, act_order=True)
    elif qronos:
        ptq_common.apply_qronos(model, calib_loader, act_order=True)


def correct_biases(model: nn.Module, calib_loader: Iterable[Any]) -> None:
    """Run Brevitas' bias correction in place, after adapters if there are any."""
    from brevitas_examples.imagenet_classification.ptq.ptq_common import (
        apply_bias_correction,
    )

    apply_bias_correction(calib_loader, model)
