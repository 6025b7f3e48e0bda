"""Brevitas' PTQ flow, with the place of the adapters in it."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.integrations.brevitas.algorithm import apply_cora
from cora_plugin.integrations.brevitas.bias import (
    apply_cora_and_correct_biases,
    correct_biases,
)
from cora_plugin.integrations.brevitas.layers import Reference, snapshot
from cora_plugin.integrations.brevitas.recipe import logits, quantize_ptq
from cora_plugin.integrations.ptq import AbstractPTQ, options_of
from cora_plugin.report import Report


def round_weights(
    model: nn.Module,
    calib_loader: Iterable[Any],
    gptq: bool = False,
    gpfq: bool = False,
    qronos: bool = False,
) -> None:
    """Run one of Brevitas' algorithms that round weights layer by layer, or none.

    In place, channels in the order of their activations. For adapters behind it, take a
    `snapshot` of the model before.

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


class PTQ(AbstractPTQ):
    """Brevitas' layerwise PTQ, its weight rounding, its bias correction."""

    title = "Brevitas"
    onnx_exporter = "export_onnx_qcdq"
    hints = (
        options_of(quantize_ptq) | options_of(round_weights) | {"bias_correction": bool}
    )
    _floats: Reference | None = None

    def quantize(self) -> nn.Module:
        """PTQ, then GPTQ or the like if it is asked for."""
        quantizing, rounding = (
            {k: v for k, v in self.options.items() if k in options_of(step)}
            for step in (quantize_ptq, round_weights)
        )
        model = quantize_ptq(self.net, self.loader, **quantizing)
        self._floats = snapshot(model)
        round_weights(model, self.loader, **rounding)
        return model

    def corrected(self, model: nn.Module) -> nn.Module:
        """A copy with corrected biases, and with adapters if it has them."""
        copied = copy.deepcopy(model)
        correct_biases(self.loader, copied)
        return copied

    def adapt(self, model: nn.Module, config: Any) -> Report:
        """Adapters, then bias correction if it is asked for, and helps."""
        biases = self.options.get("bias_correction")
        add = apply_cora_and_correct_biases if biases else apply_cora
        return add(self.loader, model, config, self._floats)

    @staticmethod
    def logits(model: nn.Module, images: Tensor) -> Tensor:
        """Outputs in Brevitas' inference mode."""
        return logits(model, images)
