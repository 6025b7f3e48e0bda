"""What is recorded with Brevitas: settings, ways in, recipes, files, exports."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_gpfq,
    apply_gptq,
    calibrate,
    quantize_model,
)
from torch import nn

from cora_plugin import CoRa, CoRaConfig
from cora_plugin.integrations.brevitas import (
    BrevitasHost,
    CoRaTransform,
    apply_cora,
    cora_mode,
    export_onnx_qcdq,
    export_qonnx,
    export_torch_qcdq,
    load_cora,
    remove_cora,
    save_cora,
    snapshot,
)
from recorder import files
from recorder.entries import Entries, Room, of_adapters
from recorder.nets import BATCHES, UNSEEN, net
from recorder.settings import ALTERNATIONS, EVERY_KIND, SETTINGS
from recorder.values import of_model, of_report

EXAMPLE = UNSEEN[:8]


@cache
def _quantized(backend: str = "layerwise", symmetric: str = "sym") -> nn.Module:
    torch.manual_seed(0)
    prepared = preprocess_for_quantize(net(), equalize_iters=3, merge_bn=True)
    model = quantize_model(
        prepared,
        backend=backend,
        weight_bit_width=4,
        act_bit_width=8,
        bias_bit_width=32,
        act_quant_percentile=99.999,
        weight_quant_granularity="per_channel",
        weight_quant_type=symmetric,
        act_quant_type="asym",
        scale_factor_type="float_scale",
        quant_format="int",
        weight_param_method="stats",
    )
    with torch.no_grad():
        model(BATCHES[0][0])
    calibrate(BATCHES, model)
    return model.eval()


def fresh(backend: str = "layerwise", symmetric: str = "sym") -> nn.Module:
    """A quantized model without adapters, by Brevitas' own means."""
    return copy.deepcopy(_quantized(backend, symmetric))


def _result(model: nn.Module, report: Any) -> dict[str, Any]:
    return {"report": of_report(report), "outputs": of_model(model, UNSEEN)}


def _applied(settings: dict[str, Any], room: Room) -> dict[str, Any]:
    model = fresh()
    return _result(model, apply_cora(BATCHES, model, settings))


def _base(backend: str, symmetric: str, room: Room) -> dict[str, Any]:
    model = fresh(backend, symmetric)
    plain = of_model(model, UNSEEN)
    adapted = _result(model, apply_cora(BATCHES, model, "budget=0.3"))
    return {"plain": plain, **adapted, "removed": of_model(remove_cora(model), UNSEEN)}


def _mode(room: Room) -> dict[str, Any]:
    model = fresh()
    with torch.no_grad(), cora_mode(model, "budget=0.3") as mode:
        for batch, _ in BATCHES:
            mode.model(batch)
    return _result(model, mode.report)


def _transform(room: Room) -> dict[str, Any]:
    transform = CoRaTransform(BATCHES, {"budget": 0.3})
    model = transform.apply(fresh("fx"))
    return _result(model, transform.report)


def _algorithm(room: Room) -> dict[str, Any]:
    model = fresh()
    report = CoRa(CoRaConfig(budget="0.3 params")).apply(BrevitasHost(model), BATCHES)
    return _result(model, report)


def _yaml(room: Room) -> dict[str, Any]:
    path = room.folder / "cora.yaml"
    path.write_text("budget: 20%\nmetric: lqer\nfit: {iterations: 4}\nseed: 1\n")
    model = fresh()
    return _result(model, apply_cora(BATCHES, model, path))


def _checkpoint(room: Room) -> dict[str, Any]:
    """The search stops after 10 iterations and goes on to 20 from its file."""
    reports = []
    for iterations in (10, 20):
        model = fresh()
        learning = {"iterations": iterations, "checkpoint": room.folder / "state"}
        settings = {"budget": 0.3, "search": "butterworth", "butterworth": learning}
        reports.append(of_report(apply_cora(BATCHES, model, settings)))
    return {"reports": reports, "outputs": of_model(model, UNSEEN)}


def _gptq(settings: dict[str, Any], room: Room) -> dict[str, Any]:
    model = fresh()
    apply_gptq(BATCHES, model, act_order=True, create_weight_orig=True)
    rounded = of_model(model, UNSEEN)
    report = apply_cora(BATCHES, model, settings)
    return {"rounded": rounded, **_result(model, report)}


def _referenced(
    rounds: Callable[..., Any], settings: dict[str, Any], room: Room
) -> dict[str, Any]:
    model = fresh()
    floats = snapshot(model)
    rounds(BATCHES, model)
    report = apply_cora(BATCHES, model, settings, reference=floats)
    return _result(model, report)


def _files(bits: int, room: Room) -> dict[str, Any]:
    model = _adapted(bits)
    save_cora(room.folder / "own.safetensors", model)

    def loaded(path: Path) -> dict[str, Any]:
        return of_model(load_cora(path, fresh()), UNSEEN)

    return of_adapters(room.folder / "own.safetensors", room, loaded)


@cache
def _adapted(bits: int, symmetric: str = "sym") -> nn.Module:
    """With adapters of every kind; not to be changed."""
    model = fresh(symmetric=symmetric)
    apply_cora(BATCHES, model, {**EVERY_KIND, "adapter_bits": bits})
    return model


def _exported(
    model: Callable[[], nn.Module],
    export: Callable[..., Any],
    read: Callable[..., dict[str, Any]],
    options: dict[str, Any],
    room: Room,
) -> dict[str, Any]:
    path = room.folder / "model.onnx"
    export(model(), EXAMPLE, path, **options)
    return read(path, EXAMPLE)


FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "qcdq": (export_onnx_qcdq, files.of_onnx, {}),
    "qcdq packed": (export_onnx_qcdq, files.of_onnx, {"packed": True}),
    "qcdq int8": (export_onnx_qcdq, files.of_onnx, {"int8_kernels": True}),
    "qonnx": (export_qonnx, files.of_qonnx, {}),
    "torch": (export_torch_qcdq, files.of_torchscript, {}),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "no adapters": fresh,
    "4 bits": partial(_adapted, 4),
    "8 bits": partial(_adapted, 8),
    "4 bits, asymmetric": partial(_adapted, 4, "asym"),
}

CLOSED = {"budget": 0.3, "metric": "qera-exact"}

ENTRIES: Entries = {
    **{
        f"settings/{name}": partial(_applied, settings)
        for name, settings in (SETTINGS | ALTERNATIONS).items()
    },
    **{
        f"quantized/{backend}, {kind}": partial(_base, backend, kind)
        for backend in ("layerwise", "fx")
        for kind in ("sym", "asym")
    },
    "ways in/cora_mode": _mode,
    "ways in/CoRaTransform": _transform,
    "ways in/CoRa": _algorithm,
    "ways in/YAML file": _yaml,
    "checkpoint": _checkpoint,
    "gptq/default": partial(_gptq, {"budget": 0.3}),
    "gptq/closed form": partial(_gptq, CLOSED),
    "gptq/reference": partial(
        _referenced, partial(apply_gptq, act_order=True), {"budget": 0.3}
    ),
    "gpfq/reference": partial(
        _referenced, partial(apply_gpfq, act_order=True), {"budget": 0.3}
    ),
    "gpfq/reference, closed form": partial(
        _referenced, partial(apply_gpfq, act_order=True), CLOSED
    ),
    **{f"files/{bits} bits": partial(_files, bits) for bits in (4, 8, 32)},
    **{
        f"exports/{kind}, {name}": partial(_exported, model, export, read, options)
        for kind, (export, read, options) in FORMATS.items()
        for name, model in MODELS.items()
    },
}
