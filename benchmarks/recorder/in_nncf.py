"""What is recorded with NNCF: settings, flags, bit widths, files, exports."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import nncf
from nncf.quantization.advanced_parameters import (
    AdvancedBiasCorrectionParameters,
    AdvancedQuantizationParameters,
    QuantizationParameters,
)
from torch import nn

from cora_plugin import CoRa, CoRaConfig
from cora_plugin.integrations.nncf import (
    CoRaQuantizationParameters,
    NNCFHost,
    allow_bits,
    apply_cora,
    export_onnx,
    export_openvino,
    export_program,
    exportable,
    load_cora,
    quantize_ptq,
    register,
    remove_cora,
    save_cora,
)
from recorder import files
from recorder.entries import Entries, Room, of_adapters
from recorder.nets import BATCHES, UNSEEN, net
from recorder.settings import EVERY_KIND, SETTINGS
from recorder.values import of_model, of_report

EXAMPLE = UNSEEN[:8]
RECIPES: dict[str, dict[str, Any]] = {
    "all at 4 bits": {"depthwise_bits": None, "first_last_bits": None},
    "recipe": {},
    "2 bits": {"weight_bits": 2, "first_last_bits": 4},
    "W8A8": {"weight_bits": 8},
    "W3A4, unclipped": {"weight_bits": 3, "act_bits": 4, "weight_quantile": None},
    "layer_bits": {"layer_bits": {"p*": 5, "dil*": 3, "stem": 4}},
    "histogram": {"act_range": "histogram"},
    "mean-quantile": {"act_range": "mean-quantile"},
    "bias correction": {"bias_correction": True},
}
"""Ways to quantize, as options of `quantize_ptq`."""


@cache
def _quantized(recipe: str) -> nn.Module:
    return quantize_ptq(net(), BATCHES, **RECIPES[recipe])


def fresh(recipe: str = "all at 4 bits") -> nn.Module:
    """A quantized model without adapters."""
    return copy.deepcopy(_quantized(recipe))


def _dataset() -> nncf.Dataset:
    return nncf.Dataset(BATCHES, lambda item: item[0])


def _result(model: nn.Module, report: Any) -> dict[str, Any]:
    return {"report": of_report(report), "outputs": of_model(model, UNSEEN)}


def _applied(settings: dict[str, Any], room: Room) -> dict[str, Any]:
    model = fresh()
    return _result(model, apply_cora(model, BATCHES, settings))


def _recipe(recipe: str, room: Room) -> dict[str, Any]:
    """Without adapters, with them, and after they were taken out."""
    model = fresh(recipe)
    plain = of_model(model, UNSEEN)
    floats = net() if RECIPES[recipe].get("bias_correction") else None
    report = apply_cora(model, BATCHES, "budget=0.3", reference=floats)
    adapted = _result(model, report)
    return {"plain": plain, **adapted, "removed": of_model(remove_cora(model), UNSEEN)}


def _inside(options: dict[str, Any], room: Room) -> dict[str, Any]:
    """`quantize_ptq` with adapters in it."""
    model = quantize_ptq(net(), BATCHES, **options)
    return _result(model, model.cora_report)


def _flag(
    parameters: Callable[..., Any], options: dict[str, Any], room: Room
) -> dict[str, Any]:
    """`nncf.quantize` with the plugin registered."""
    fields = {"weights_quantization_params": QuantizationParameters(num_bits=4)}
    with register(), allow_bits(4):
        model = nncf.quantize(
            net(), _dataset(), advanced_parameters=parameters(**fields), **options
        )
    return _result(model, model.cora_report)


def _corrected_biases(settings: dict[str, Any], room: Room) -> dict[str, Any]:
    """Biases that NNCF corrected, given back by the reference."""
    floats = net()
    parameters = AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(num_bits=4),
        bias_correction_params=AdvancedBiasCorrectionParameters(threshold=float("inf")),
    )
    with allow_bits(4):
        model = nncf.quantize(floats, _dataset(), advanced_parameters=parameters)
    plain = of_model(model, UNSEEN)
    report = apply_cora(model, _dataset(), settings, reference=floats)
    return {"plain": plain, **_result(model, report)}


def _dataset_of_two(room: Room) -> dict[str, Any]:
    model = fresh()
    config = {"budget": 0.3, "metric": "qera-exact"}
    report = apply_cora(model, _dataset(), config, subset_size=2, bias_correction=False)
    return _result(model, report)


def _algorithm(room: Room) -> dict[str, Any]:
    model = fresh()
    host = NNCFHost(model, UNSEEN)
    report = CoRa(CoRaConfig(budget="0.3 params")).apply(host, BATCHES)
    return _result(model, report)


def _files(bits: int, room: Room) -> dict[str, Any]:
    save_cora(room.folder / "own.safetensors", _adapted(bits))

    def loaded(path: Path) -> dict[str, Any]:
        return of_model(load_cora(path, fresh(), EXAMPLE), UNSEEN)

    return of_adapters(room.folder / "own.safetensors", room, loaded)


@cache
def _adapted(bits: int, recipe: str = "all at 4 bits") -> nn.Module:
    """With adapters of every kind; not to be changed."""
    model = fresh(recipe)
    apply_cora(model, BATCHES, {**EVERY_KIND, "adapter_bits": bits})
    return model


def _exported(
    model: Callable[[], nn.Module],
    export: Callable[..., Any],
    options: dict[str, Any],
    room: Room,
) -> dict[str, Any]:
    onnx = export is export_onnx
    path = room.folder / ("model.onnx" if onnx else "model.xml")
    export(model(), EXAMPLE[:2], path, **options)
    return files.of_onnx(path, EXAMPLE) if onnx else files.of_ir(path, EXAMPLE)


def _program(model: Callable[[], nn.Module], room: Room) -> dict[str, Any]:
    return {
        "exportable": of_model(exportable(model()), UNSEEN),
        "program": files.of_program(export_program(model(), EXAMPLE), EXAMPLE),
    }


FORMATS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "onnx": (export_onnx, {}),
    "onnx int8": (export_onnx, {"int8_kernels": True}),
    "ir": (export_openvino, {}),
    "ir int8": (export_openvino, {"int8_kernels": True}),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "no adapters": fresh,
    "4 bits": partial(_adapted, 4),
    "8 bits": partial(_adapted, 8),
    "8 bits, recipe": partial(_adapted, 8, "recipe"),
}


def _typed(cora: Any, **fields: Any) -> Callable[..., Any]:
    return partial(CoRaQuantizationParameters, cora=cora, **fields)


ENTRIES: Entries = {
    **{f"settings/{name}": partial(_applied, s) for name, s in SETTINGS.items()},
    **{f"quantized/{name}": partial(_recipe, name) for name in RECIPES},
    "ways in/nncf.Dataset, two items": _dataset_of_two,
    "ways in/CoRa": _algorithm,
    "ways in/quantize_ptq": partial(_inside, {"cora": "budget=0.3"}),
    "ways in/quantize_ptq, bias correction": partial(
        _inside, {"cora": "budget=0.3", "bias_correction": True, "weight_bits": 3}
    ),
    "flag/typed": partial(_flag, _typed("budget=0.3"), {}),
    "flag/backend_params": partial(
        _flag,
        partial(
            AdvancedQuantizationParameters, backend_params={"cora": {"budget": 0.3}}
        ),
        {},
    ),
    "flag/no bias correction": partial(
        _flag, _typed({"budget": 0.3}, disable_bias_correction=True), {}
    ),
    "flag/bits": partial(
        _flag,
        _typed(
            0.3, first_last_bits=8, depthwise_bits=8, layer_bits={"p*": 6, "same": 3}
        ),
        {},
    ),
    "flag/smooth quant, two items": partial(
        _flag,
        _typed({"budget": 0.3}),
        {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": 2},
    ),
    "corrected biases/default": partial(_corrected_biases, {"budget": 0.3}),
    "corrected biases/closed form": partial(
        _corrected_biases, {"budget": 0.3, "metric": "qera-exact"}
    ),
    **{f"files/{bits} bits": partial(_files, bits) for bits in (4, 8, 32)},
    **{
        f"exports/{kind}, {name}": partial(_exported, model, export, options)
        for kind, (export, options) in FORMATS.items()
        for name, model in MODELS.items()
    },
    "exports/ir float32, 4 bits": partial(
        _exported, MODELS["4 bits"], export_openvino, {"compress_to_fp16": False}
    ),
    **{f"exports/program, {n}": partial(_program, m) for n, m in MODELS.items()},
}
