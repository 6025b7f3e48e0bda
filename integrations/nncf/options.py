"""What can be chosen of NNCF's PTQ and of its exports."""

from dataclasses import dataclass
from typing import Literal

from cora_plugin.integrations.ranges import AUTO
from cora_plugin.integrations.toolkit import BITS, NamedOptions, Options, option

CLIPPED = 0.003
"""Better at W4A8 than none, with bias correction and with adapters: see the table of
NNCF in benchmarks/README.md."""


@dataclass(frozen=True, kw_only=True)
class NNCFOptions(Options):
    """Options of `quantize_ptq`."""

    depthwise_bits: int | None = option(
        8, "bit width of depthwise convolutions' weights; null: as the others", **BITS
    )
    first_last_bits: int | None = option(
        8, "bit width of the first and last layer, activations too", **BITS
    )
    weight_quantile: float | None = option(
        CLIPPED,
        "share of a channel's weights that its range may clip, at 4 bits and fewer",
        least=0,
        below=0.5,
    )
    act_range: Literal[
        "auto", "default", "minmax", "mean-quantile", "histogram", "mse"
    ] = option(
        AUTO,
        "how activation ranges are found: auto (by act_bits), default, minmax, "
        "mean-quantile, histogram, mse",
    )
    smooth_quant: float | None = option(
        None,
        "move outliers of activations into weights by SmoothQuant, of linear layers "
        "and convolutions, with this alpha; null: not",
        least=0,
        greatest=1,
    )


@dataclass(frozen=True, kw_only=True)
class ONNXOptions(NamedOptions):
    """Options of `export_onnx`."""

    int8_kernels: bool = option(False, "write a graph that runs in int8 kernels")
    dynamic_batch: bool | None = option(None, "leave the batch size free; null: yes")


@dataclass(frozen=True, kw_only=True)
class OpenVINOOptions(ONNXOptions):
    """Options of `export_openvino`."""

    compress_to_fp16: bool = option(True, "store what is not quantized as float16")
    dynamic_batch: bool | None = option(
        None, "leave the batch size free, and no other; null: all sizes are"
    )
