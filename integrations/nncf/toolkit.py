"""NNCF as a `Toolkit`: its PTQ flow, with adapters at their place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cora_plugin.host import Host, TrainableHost
from cora_plugin.integrations.nncf.algorithm import apply_cora, save_cora
from cora_plugin.integrations.nncf.export import export_onnx, export_openvino
from cora_plugin.integrations.nncf.extension import is_compiled, load_extension
from cora_plugin.integrations.nncf.host import NNCFHost
from cora_plugin.integrations.nncf.options import (
    NNCFOptions,
    ONNXOptions,
    OpenVINOOptions,
)
from cora_plugin.integrations.nncf.private import is_wrapped
from cora_plugin.integrations.nncf.recipe import TITLE, quantize_ptq
from cora_plugin.integrations.toolkit import (
    ADAPTERS,
    PACKED,
    Export,
    Quantized,
    Toolkit,
    adapters_export,
)
from cora_plugin.outputs import in_batches
from cora_plugin.report import Report
from cora_plugin.width_plan import WidthPlan


class NNCFToolkit(Toolkit[NNCFOptions]):
    """`nncf.quantize`; with adapters, biases are corrected after them, guarded."""

    name = "nncf"
    title = TITLE
    options = NNCFOptions
    exports: ClassVar[Mapping[str, Export]] = {
        ADAPTERS: adapters_export(save_cora),
        "onnx": Export(
            export_onnx,
            ".onnx",
            ONNXOptions,
            onnxruntime=True,
            forms={"packed ONNX": {}, "int8 ONNX": {"int8_kernels": True}},
            packs=lambda options: PACKED,
        ),
        "openvino": Export(
            export_openvino,
            ".xml",
            OpenVINOOptions,
            forms={"packed IR": {}, "int8 IR": {"int8_kernels": True}},
            packs=lambda options: () if options.get("int8_kernels") else PACKED,
        ),
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ptq": {},
        "ptq-histogram": {"act_range": "histogram"},
        "ptq-mse": {"act_range": "mse"},
        "ptq-minmax": {"act_range": "minmax"},
        "ptq-unclipped": {"weight_quantile": None},
        "smoothquant": {"smooth_quant": 0.5},
    }
    corrects_afterwards = False

    def first_use(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Compile NNCF's C++ extension."""
        if is_compiled():
            return ()
        notice = "NNCF compiles its C++ extension, a minute or two, once"
        return ((notice, load_extension),)

    def quantize(
        self, net: nn.Module, loader: Iterable[Any], options: NNCFOptions
    ) -> Quantized[NNCFOptions]:
        """PTQ without bias correction, which adapters would have to undo."""
        return _quantized(net, loader, options, bias_correction=False)

    def correct_biases(
        self, quantized: Quantized[NNCFOptions]
    ) -> Quantized[NNCFOptions]:
        """Quantized anew, for bias correction is a part of `nncf.quantize`."""
        return _quantized(
            quantized.net, quantized.loader, quantized.options, bias_correction=True
        )

    def at_widths(
        self,
        plain: Quantized[NNCFOptions],
        bits: Mapping[str, int],
        options: NNCFOptions,
    ) -> Quantized[NNCFOptions]:
        """A copy whose quantizers have other widths."""
        copied = plain.copied()
        NNCFHost(copied.model, copied.example, copied.reference).widen(bits)
        return replace(copied, options=options)

    def adapt(
        self,
        quantized: Quantized[NNCFOptions],
        config: Any,
        plan: WidthPlan | None = None,
    ) -> Report:
        """Adapters, then bias correction where it helps, unless it is refused."""
        correct = quantized.options.bias_correction is not False
        return apply_cora(
            quantized.model,
            quantized.loader,
            config,
            bias_correction=correct,
            plan=plan,
        )

    def host(
        self,
        model: nn.Module,
        example: Tensor,
        reference: Mapping[str, Tensor] | nn.Module | None = None,
    ) -> Host:
        """The host of a model."""
        return NNCFHost(model, example, reference)

    def trainable(self, model: nn.Module, example: Any = None) -> TrainableHost | None:
        """The host of a model that `nncf.quantize` returned."""
        return NNCFHost(model, example, carrying=True) if is_wrapped(model) else None

    @torch.no_grad()
    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs of the model."""
        return in_batches(model, images)


def _quantized(
    net: nn.Module, loader: Iterable[Any], options: NNCFOptions, bias_correction: bool
) -> Quantized[NNCFOptions]:
    model = quantize_ptq(
        net,
        loader,
        weight_bits=options.weight_bits,
        act_bits=options.act_bits,
        depthwise_bits=options.depthwise_bits,
        first_last_bits=options.first_last_bits,
        layer_bits=options.layer_bits,
        bias_correction=bias_correction,
        weight_quantile=options.weight_quantile,
        act_range=options.act_range,
        smooth_quant=options.smooth_quant,
    )
    return Quantized(model, net, loader, options)


TOOLKIT = NNCFToolkit()
