"""Brevitas as a `Toolkit`: its PTQ flow, with adapters at their place."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from cora_plugin.host import Host, TrainableHost
from cora_plugin.integrations.brevitas.algorithm import apply_cora, save_cora
from cora_plugin.integrations.brevitas.bias import (
    apply_cora_and_correct_biases,
    correct_biases,
)
from cora_plugin.integrations.brevitas.export import (
    export_onnx_qcdq,
    export_qonnx,
    export_torch_qcdq,
)
from cora_plugin.integrations.brevitas.host import BrevitasHost
from cora_plugin.integrations.brevitas.layers import snapshot
from cora_plugin.integrations.brevitas.options import (
    BrevitasOptions,
    QCDQOptions,
    QONNXOptions,
)
from cora_plugin.integrations.brevitas.private import QuantWeightBiasInputOutputLayer
from cora_plugin.integrations.brevitas.recipe import TITLE, logits, quantize_ptq
from cora_plugin.integrations.brevitas.rounding import round_weights
from cora_plugin.integrations.doing import doing
from cora_plugin.integrations.toolkit import (
    ADAPTERS,
    PACKED,
    Export,
    Quantized,
    Toolkit,
    adapters_export,
)
from cora_plugin.report import Report
from cora_plugin.width_plan import WidthPlan


def _packs(options: Mapping[str, Any]) -> tuple[int, ...]:
    """A QCDQ file that is not packed has a byte for every weight, at any width."""
    packed = options.get("packed") or options.get("int8_kernels")
    return PACKED if packed else ()


class BrevitasToolkit(Toolkit[BrevitasOptions]):
    """Brevitas' layerwise PTQ, its weight rounding, its bias correction."""

    name = "brevitas"
    title = TITLE
    options = BrevitasOptions
    exports: ClassVar[Mapping[str, Export]] = {
        ADAPTERS: adapters_export(save_cora),
        "onnx_qcdq": Export(
            export_onnx_qcdq,
            ".onnx",
            QCDQOptions,
            onnxruntime=True,
            forms={
                "QCDQ ONNX": {"dynamic_batch": True},
                "packed ONNX": {"packed": True, "dynamic_batch": True},
                "int8 ONNX": {"int8_kernels": True, "dynamic_batch": True},
            },
            packs=_packs,
        ),
        "qonnx": Export(export_qonnx, ".onnx", QONNXOptions),
        "torch_qcdq": Export(export_torch_qcdq, ".pt"),
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ptq": {},
        "ptq-mse": {"act_range": "mse"},
        "gptq": {"gptq": True},
        "gpfq": {"gpfq": True},
        "qronos": {"qronos": True},
        "learned-round-layer": {"learned_round": "layer"},
        "learned-round-block": {"learned_round": "block"},
    }
    corrects_afterwards = True

    def quantize(
        self, net: nn.Module, loader: Iterable[Any], options: BrevitasOptions
    ) -> Quantized[BrevitasOptions]:
        """PTQ, then GPTQ or the like if it is asked for."""
        model = quantize_ptq(
            net,
            loader,
            weight_bits=options.weight_bits,
            act_bits=options.act_bits,
            depthwise_bits=options.depthwise_bits,
            first_last_bits=options.first_last_bits,
            equalize_iters=options.equalize_iters,
            layer_bits=options.layer_bits,
            act_range=options.act_range,
            traced=_traced(options),
        )
        return _rounded(model, net, loader, options)

    def correct_biases(
        self, quantized: Quantized[BrevitasOptions]
    ) -> Quantized[BrevitasOptions]:
        """A copy with corrected biases, and with adapters if it has them."""
        copied = quantized.copied()
        with doing(TITLE, "correcting the biases"):
            correct_biases(copied.loader, copied.model)
        return copied

    def plainly_rounded(self, options: BrevitasOptions) -> BrevitasOptions:
        """Without GPTQ and the like."""
        return replace(
            options, gptq=False, gpfq=False, qronos=False, learned_round=None
        )

    def at_widths(
        self,
        plain: Quantized[BrevitasOptions],
        bits: Mapping[str, int],
        options: BrevitasOptions,
    ) -> Quantized[BrevitasOptions]:
        """A copy with other weight quantizers, rounded as the options say."""
        if _traced(options) != _traced(plain.options):
            return super().at_widths(plain, bits, options)
        model = plain.copied().model
        BrevitasHost(model).widen(bits)
        return _rounded(model, plain.net, plain.loader, options)

    def adapt(
        self,
        quantized: Quantized[BrevitasOptions],
        config: Any,
        plan: WidthPlan | None = None,
    ) -> Report:
        """Adapters, then bias correction if it is asked for, and helps."""
        biases = quantized.options.bias_correction
        add = apply_cora_and_correct_biases if biases else apply_cora
        return add(quantized.loader, quantized.model, config, quantized.reference, plan)

    def host(
        self,
        model: nn.Module,
        example: Tensor,
        reference: Mapping[str, Tensor] | nn.Module | None = None,
    ) -> Host:
        """The host of a model; Brevitas needs no example."""
        return BrevitasHost(model, reference)

    def trainable(self, model: nn.Module, example: Any = None) -> TrainableHost | None:
        """The host of a model with layers of Brevitas."""
        layers = (
            isinstance(e, QuantWeightBiasInputOutputLayer) for e in model.modules()
        )
        return BrevitasHost(model, carrying=True) if any(layers) else None

    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs in Brevitas' inference mode."""
        return logits(model, images)


def _traced(options: BrevitasOptions) -> bool:
    """Not where blocks are rounded: they are modules, which tracing leaves empty."""
    return options.learned_round != "block"


def _rounded(
    model: nn.Module, net: nn.Module, loader: Iterable[Any], options: BrevitasOptions
) -> Quantized[BrevitasOptions]:
    """A calibrated model, its weights rounded as the options say."""
    floats = snapshot(model)
    with doing(TITLE, "rounding the weights"):
        round_weights(model, loader, options)
    return Quantized(model, net, loader, options, floats)


TOOLKIT = BrevitasToolkit()
