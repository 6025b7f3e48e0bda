"""Options of Brevitas' PTQ and of its exports."""

from dataclasses import dataclass
from typing import Literal

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.integrations.ranges import AUTO
from cora_plugin.integrations.toolkit import BITS, NamedOptions, Options, option

OPSETS = {"least": 13, "greatest": 20}
"""From what scales by channel need to what torch's exporter of traced graphs knows."""

ROUNDINGS = ("gptq", "gpfq", "qronos", "learned_round")
"""Brevitas' algorithms that round weights otherwise than to the nearest."""


@dataclass(frozen=True, kw_only=True)
class BrevitasOptions(Options):
    """Options of `quantize_ptq`, of rounding weights, and of bias correction.

    Raises:
        ConfigError: More than one way to round weights is asked for.
    """

    first_last_bits: int = option(
        8, "bit width of the first and last layer, activations too", **BITS
    )
    equalize_iters: int = option(0, "iterations of weight equalization", least=0)
    act_range: Literal["auto", "percentile", "mse"] = option(
        AUTO, "how activation ranges are found: auto (by act_bits), percentile or mse"
    )
    gptq: bool = option(False, "round weights by GPTQ")
    gpfq: bool = option(False, "round weights by GPFQ")
    qronos: bool = option(False, "round weights by Qronos")
    learned_round: Literal["layer", "block"] | None = option(
        None, "learn to round weights, layer by layer (AdaRound) or block (BRECQ)"
    )
    learned_round_blocks: str = option(
        r"layer\d+",
        "blocks of learned_round=block: a regular expression for modules' own names",
    )
    learned_round_iters: int = option(
        1000, "steps of learned_round, for each layer or block", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(bool(getattr(self, name)) for name in ROUNDINGS) > 1:
            raise ConfigError(
                (),
                "gptq, gpfq, qronos and learned_round each round the weights; choose "
                "one of them",
            )


@dataclass(frozen=True, kw_only=True)
class QCDQOptions(NamedOptions):
    """Options of `export_onnx_qcdq`."""

    opset_version: int | None = option(
        None, "ONNX operator set; null: 17, packed 21", **OPSETS
    )
    packed: bool = option(False, "store weights of 4 bits and fewer as INT4 or UINT4")
    int8_kernels: bool = option(False, "write a graph that runs in int8 kernels")
    dynamic_batch: bool = option(False, "leave the batch size free")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset_version and (self.packed or self.int8_kernels):
            raise ConfigError(
                ("opset_version",),
                f"{self.opset_version} with packed or int8_kernels, which need their "
                "own; leave it out",
            )


@dataclass(frozen=True, kw_only=True)
class QONNXOptions(NamedOptions):
    """Options of `export_qonnx`."""

    opset_version: int = option(17, "ONNX operator set", **OPSETS)
    dynamic_batch: bool = option(False, "leave the batch size free")
