import copy
from argparse import Namespace
from dataclasses import replace

import brevitas.nn as qnn
import pytest
import torch
from brevitas.graph.calibrate import load_quant_model_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.magr import magr_mode
from brevitas.quant import Int8WeightPerChannelFloat
from brevitas.quant_tensor import QuantTensor
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (
    apply_learned_round,
)
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gpfq,
    apply_gptq,
    apply_qronos,
)
from torch import nn
from untouched import untouched

from cora_plugin import CoRa, CoRaError, load_adapters, save_adapters
from cora_plugin.adapters import Operation, make_adapter
from cora_plugin.adapters.factor import Weighting
from cora_plugin.integrations.brevitas import (
    BrevitasHost,
    CoRaTransform,
    apply_cora,
    cora_mode,
    load_cora,
    remove_cora,
    save_cora,
    snapshot,
)
from cora_plugin.integrations.brevitas.insert import corrected

LAYERS = ["stem", "reflect", "depthwise", "pointwise", "same", "dilated", "head"]


@pytest.fixture(params=["layerwise", "fx"])
def model(request, prototypes):
    """In training mode here and there, so that a lost flag is seen."""
    model = copy.deepcopy(prototypes[request.param])
    model.get_submodule("pointwise").train()
    model.get_submodule("head").weight.requires_grad_(False)
    return model


def refuse(model, loader, config, match, **options):
    """Every way to apply CoRa raises, and leaves the model as it was."""
    with untouched(model), pytest.raises(CoRaError, match=match):
        apply_cora(loader, model, config, **options)
    with untouched(model), pytest.raises(CoRaError, match=match):
        CoRaTransform(loader, config, **options).apply(model)
    with (
        untouched(model),
        pytest.raises(CoRaError, match=match),
        cora_mode(model, config, **options) as mode,
    ):
        for item in loader:
            mode.model(item)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda x: x * float("nan"), "item 2 holds NaN"),
        (lambda x: x * float("inf"), "item 2 holds (NaN|inf)"),
        (lambda x: (x * 255).to(torch.uint8), r"item 2 is of \[torch.uint8\]"),
        (lambda x: x.numpy(), "item 2 is a ndarray"),
        (lambda x: {"images": x}, "the model does not run with item 2"),
        (lambda x: ["photo.jpg", x], "the model does not run with item 2"),
        (lambda x: None, "item 2 is a NoneType"),
    ],
)
def test_a_bad_item_is_refused_by_its_number(model, batches, bad, match):
    items = [x for x, _ in batches]
    items[2] = bad(items[2])
    refuse(model, items, 0.1, f"calibration data: {match}")


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        ([], "calibration data: 0 images are too few"),
        ([torch.zeros(0, 3, 16, 16)], "item 0 is .* without a single image"),
    ],
)
def test_an_empty_loader_is_refused(model, loader, match):
    refuse(model, loader, 0.1, match)


def test_too_few_images_are_refused(model, batches):
    refuse(model, [batches[0][0][:3]], 0.1, "calibration data: 3 images leave none")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_layer(model, batches, value):
    model.get_submodule("dilated").weight.data[3, 1, 0, 2] = value
    refuse(model, batches_of(batches), 0.1, r"^dilated: its float weight holds")


def batches_of(batches):
    return [images for images, _ in batches]


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (0, "not a positive amount"),
        (-0.05, "not a positive amount"),
        ("0 bits", "not a positive amount"),
        ("1.01 params", "more than there is to buy"),
        ("100 bits", "more than there is to buy"),
        ("5 macs", "more than there is to buy"),
        ("1e-6 params", "buys no adapter; the cheapest costs"),
        ("1e-6 bits", "buys no adapter; the cheapest costs"),
        ("1e-6 macs", "buys no adapter; the cheapest costs"),
    ],
)
def test_an_impossible_budget_is_refused(model, batches, budget, match):
    refuse(model, batches_of(batches), {"budget": budget}, f"budget: .*{match}")


def test_pinned_ranks_that_cost_more_than_the_budget_are_refused(model, batches):
    config = {"budget": 0.01, "ranks": {"reflect": 8}}
    refuse(model, batches_of(batches), config, "budget: the pinned ranks alone cost")


@pytest.mark.parametrize("unit", ["params", "bits", "macs"])
@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_rank_zero_for_all_is_refused(prototypes, batches, unit, search):
    model = copy.deepcopy(prototypes["layerwise"])
    config = {"ranks": {"*": 0}, "budget": f"0.05 {unit}", "search": search}
    refuse(model, batches_of(batches), config, "rank")


@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_ranks_pinned_for_all_layers_need_no_search(prototypes, batches, search):
    model = copy.deepcopy(prototypes["layerwise"])
    config = {"ranks": {"*": 2}, "budget": 0.9, "search": search}  # 0.9: a mere cap
    report = apply_cora(batches, model, config)
    assert {row.rank for row in report.layers} == {2}


@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_ranks_pinned_for_all_layers_need_no_budget(prototypes, batches, search):
    model = copy.deepcopy(prototypes["layerwise"])
    report = apply_cora(batches, model, {"ranks": {"*": 3}, "search": search})
    assert {row.rank for row in report.layers} == {3}
    assert report.budget_used == report.budget_allowed > 0.05


def test_a_rank_above_the_full_rank_is_refused_by_the_layer(model, batches):
    config = {"ranks": {"*": 3, "dilated": 9}}
    match = r"^dilated: rank 9 exceeds its full rank 8; .*r <= 8"
    refuse(model, batches_of(batches), config, match)


def test_a_pattern_that_fits_no_layer_is_refused_with_the_names(model, batches):
    config = {"ranks": {"blocks.*": 3}}
    refuse(model, batches_of(batches), config, r"ranks: 'blocks\.\*' .*stem, .*head")


def test_a_model_that_is_not_quantized_is_refused(float_net, batches):
    model = copy.deepcopy(float_net)
    refuse(model, batches_of(batches), 0.1, "nothing in it is quantized")


def test_a_model_of_unsupported_layers_is_refused_with_the_reasons(batches):
    model = nn.Sequential()
    model.add_module("scale", qnn.QuantScaleBias(3, bias=True))
    model.add_module("flat", nn.Flatten())
    refuse(model, batches_of(batches), 0.1, "scale: QuantScaleBias is not supported")


def test_an_unsupported_layer_among_others_is_reported(prototypes, batches):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = qnn.QuantScaleBias(3, bias=True)
            self.net = copy.deepcopy(prototypes["layerwise"])

        def forward(self, x):
            return self.net(self.scale(x))

    report = apply_cora(batches, Scaled().eval(), 0.1)
    assert report.skipped == {"scale": "QuantScaleBias is not supported"}
    assert "left alone: scale: QuantScaleBias" in str(report)


def test_a_layer_that_calibration_never_reaches_is_left_alone(model, batches):
    torch.manual_seed(0)
    model.add_module(
        "spare", qnn.QuantConv2d(4, 4, 3, weight_quant=Int8WeightPerChannelFloat)
    )
    report = apply_cora(batches, model, 0.1)
    assert report.skipped["spare"] == "calibration never reached it"
    assert report.after.value < report.before.value


def test_a_model_of_two_outputs_is_adapted(prototypes, batches):
    class Pair(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.net = copy.deepcopy(prototypes["layerwise"])
            self.output = output

        def forward(self, x):
            return self.output(self.net(x))

    for output in (lambda y: (y, y), lambda y: {"a": y, "b": y}):
        report = apply_cora(batches, Pair(output).eval(), 0.1)
        assert report.after.value < report.before.value


def test_float_weights_that_gptq_overwrote_are_refused(model, batches):
    apply_gptq(batches, model, act_order=True)
    match = r"^stem: its float weight is gone.*snapshot.*create_weight_orig"
    refuse(model, batches_of(batches), 0.1, match)


def test_float_weights_that_were_merged_away_are_refused(model, batches):
    for name in LAYERS:
        layer = model.get_submodule(name).eval()
        layer.weight.data.copy_(layer.quant_weight().value)
    refuse(model, batches_of(batches), 0.1, "its float weight is gone")


def test_a_reference_of_another_model_is_refused_by_the_layer(model, batches):
    loader, given = batches_of(batches), snapshot(model)
    missing = {name: w for name, w in given.items() if name != "pointwise"}
    refuse(model, loader, 0.1, "^pointwise: .*no weight", reference=missing)
    cut = given | {"pointwise": given["pointwise"][1:]}
    refuse(model, loader, 0.1, r"^pointwise: .*shape \[31,", reference=cut)
    torch.manual_seed(0)
    strange = given | {"pointwise": torch.randn_like(given["pointwise"]) * 9}
    match = "^pointwise: .*nothing to do with"
    refuse(model, loader, 0.1, match, reference=strange)
    spoilt = given | {"pointwise": given["pointwise"] * float("nan")}
    refuse(model, loader, 0.1, "^pointwise: .*NaN", reference=spoilt)


def test_a_loader_that_fails_midway_leaves_the_model_as_it_was(model, batches):
    def loader():
        yield from batches[:2]
        raise OSError("the disk is gone")

    match = "the disk is gone"
    with untouched(model), pytest.raises(OSError, match=match):
        apply_cora(loader(), model, 0.1)
    with untouched(model), pytest.raises(OSError, match=match):
        with cora_mode(model) as mode:
            for images, _ in loader():
                mode.model(images)
    assert mode.report is None


class FailingGuard(BrevitasHost):
    """Cannot run the model once it has its adapters."""

    def run(self, images):
        if corrected(self.model):
            raise MemoryError("no room for the branches")
        return super().run(images)


def test_a_guard_that_fails_leaves_the_model_as_it_was(model, batches):
    with untouched(model), pytest.raises(MemoryError):
        CoRa(0.1).apply(FailingGuard(model), batches)


def test_an_unknown_configuration_is_refused_before_the_model_is_looked_at(model):
    for value in ("bugdet=0.05", {"search": "best"}, 3j):
        for apply in (apply_cora, lambda loader, m, c: cora_mode(m, c)):
            with untouched(model), pytest.raises(CoRaError):
                apply([], model, value)


# Steps in the wrong order.

ORDER = "the right order is: quantize, calibrate, .* apply_cora, bias correction"


def test_adapters_after_bias_correction_are_refused(model, batches):
    apply_bias_correction(batches, model)
    match = f"^stem: its bias was corrected before there were adapters.*{ORDER}"
    refuse(model, batches_of(batches), 0.1, match)


def test_a_snapshot_tells_bias_correction_of_a_reloaded_state(
    quantize, prototypes, batches
):
    model = copy.deepcopy(prototypes["layerwise"])
    given = snapshot(model)
    apply_bias_correction(batches, model)
    fresh = quantize()
    with load_quant_model_mode(fresh):
        fresh.load_state_dict(model.state_dict())
    match = f"^stem: its bias was corrected.*{ORDER}"
    refuse(fresh, batches_of(batches), 0.1, match, reference=given)


def entered(mode, **options):
    def apply(batches, model):
        with torch.no_grad(), mode(model, **options) as entered:
            for _ in range(entered.num_layers):
                for images, _ in batches:
                    entered.model(images)
                entered.update()

    return apply


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("GPTQ", lambda loader, model: apply_gptq(loader, model, act_order=True)),
        ("GPTQ", entered(gptq_mode, use_quant_activations=True)),
        ("GPFQ", lambda loader, model: apply_gpfq(loader, model, act_order=True)),
        ("Qronos", lambda loader, model: apply_qronos(model, loader)),
        ("MagR", entered(magr_mode, num_steps=2)),
    ],
)
@pytest.mark.parametrize("first", ["stem", "dilated"])
def test_what_moves_weights_is_refused_beside_adapters(
    model, batches, unseen, name, method, first
):
    # What is hooked before the first adapter is reached is let go, too.
    before = LAYERS[: LAYERS.index(first)]
    ranks = dict.fromkeys(before, 0)
    plain = copy.deepcopy(model.eval())
    apply_cora(batches, model, {"budget": 0.2, "ranks": {**ranks, first: 2}})
    match = f"^{first}: carries an adapter.*{name} would change.*remove_cora.*{ORDER}"
    with untouched(model), pytest.raises(CoRaError, match=match):
        method(batches[:1], model)
    with torch.no_grad():
        model(unseen)
        method(batches[:1], remove_cora(model))
        method(batches[:1], plain)
        assert torch.equal(values(model(unseen)), values(plain(unseen)))


def values(output):
    return output.value if isinstance(output, QuantTensor) else output


@pytest.mark.parametrize("form", ["hard_sigmoid", "identity"])
def test_learned_round_is_refused_beside_adapters(prototypes, batches, form):
    settings = Namespace(
        learned_round=form,
        learned_round_mode="layerwise",
        learned_round_loss="mse",
        learned_round_lr=0.1,
        learned_round_lr_scheduler=None,
        learned_round_iters=2,
        learned_round_batch_size=8,
    )
    model = copy.deepcopy(prototypes["layerwise"])
    apply_cora(batches, model, {"budget": 0.3, "ranks": {"stem": 2}})
    model = copy.deepcopy(model)
    match = f"^stem: carries an adapter.*learned round would change.*{ORDER}"
    with untouched(model), pytest.raises(CoRaError, match=match):
        apply_learned_round(model, batches[:1], settings)
    apply_learned_round(remove_cora(model), batches[:1], settings)
    apply_cora(batches, model, 0.3)


# Files.


@pytest.fixture
def saved(prototypes, batches, tmp_path):
    model = copy.deepcopy(prototypes["layerwise"])
    apply_cora(batches, model, 0.3)
    save_cora(tmp_path / "adapters.safetensors", model)
    return tmp_path / "adapters.safetensors"


def test_a_corrupt_or_foreign_file_leaves_the_model_as_it_was(model, saved, tmp_path):
    content = saved.read_bytes()
    for name, spoilt in (("cut", content[:-100]), ("foreign", b"\x89PNG" * 100)):
        (tmp_path / name).write_bytes(spoilt)
        with untouched(model), pytest.raises(CoRaError, match=name):
            load_cora(tmp_path / name, model)
    with untouched(model), pytest.raises(FileNotFoundError, match="missing"):
        load_cora(tmp_path / "missing", model)


def test_adapters_of_another_model_are_refused_by_the_layer(model, tmp_path):
    layers = {layer.name: layer for layer in BrevitasHost(model).layers}
    torch.manual_seed(0)

    def adapter(weight, operation):
        return make_adapter(weight, operation, 1, Weighting())

    right = adapter(layers["stem"].residual, layers["stem"].operation)
    plain = replace(layers["dilated"].operation, groups=1)
    depthwise = replace(layers["dilated"].operation, groups=16)
    for name, other, match in (
        ("blocks.7", right, "no quantized layer of this name"),
        ("relu", right, "no quantized layer of this name"),
        ("reflect", right, r"shape \[16, 3, 3, 3\], the layer's is \[16, 16, 3, 3\]"),
        ("head", adapter(torch.randn(10, 31), Operation()), "shape"),
        ("dilated", adapter(torch.randn(32, 8, 3, 3), plain), "groups"),
        ("dilated", adapter(torch.randn(32, 8, 3, 3), depthwise), "groups"),
    ):
        save_adapters(tmp_path / "other", {"stem": right, name: other})
        match = f"^{name}: .*{match}"
        with untouched(model), pytest.raises(CoRaError, match=match):
            load_cora(tmp_path / "other", model)


def gptq(batches, model):
    apply_gptq(batches[:1], model, act_order=True)


def trained_further(batches, model):
    torch.manual_seed(0)
    for name in LAYERS:
        weight = model.get_submodule(name).weight.data
        weight += 0.1 * weight.std() * torch.randn_like(weight)


@pytest.mark.parametrize(
    ("options", "step", "match"),
    [
        ({"weight_bits": 5}, None, "a weight of 4 bits, not of 5"),
        ({"weight_quant_granularity": "per_tensor"}, None, "a weight whose integers"),
        ({"weight_param_method": "mse"}, None, "a weight of other scales"),
        ({}, gptq, "a weight whose integers are others"),
        ({}, trained_further, "a weight whose integers are others"),
    ],
)
def test_adapters_of_another_recipe_are_refused_by_the_layer(
    quantize, batches, saved, options, step, match
):
    model = quantize(**options)
    if step is not None:
        step(batches, model)
    match = rf"^\w+: the adapter was made for {match}"
    with untouched(model), pytest.raises(CoRaError, match=match):
        load_cora(saved, model)


def test_adapters_fit_where_activations_and_biases_are_others(quantize, batches, saved):
    data = [(1.1 * images + 0.3, target) for images, target in batches]
    model = quantize(data=data, act_quant_type="sym")
    apply_bias_correction(data, model)
    load_cora(saved, model)
    assert corrected(model)


def test_the_settings_travel_with_the_adapters(prototypes, saved, tmp_path):
    model = load_cora(saved, copy.deepcopy(prototypes["layerwise"]))
    save_cora(tmp_path / "again", copy.deepcopy(model))
    _, _, notes = load_adapters(tmp_path / "again")
    assert notes["config"]["budget"] == "0.3 params"
    assert notes["brevitas"]


def test_loading_into_a_model_that_has_adapters_is_refused(prototypes, saved):
    model = load_cora(saved, copy.deepcopy(prototypes["layerwise"]))
    match = "already carries an adapter"
    with untouched(model), pytest.raises(CoRaError, match=match):
        load_cora(saved, model)


def test_a_model_without_adapters_has_nothing_to_save(model, tmp_path):
    with untouched(model), pytest.raises(CoRaError, match="no adapters to save"):
        save_cora(tmp_path / "none", model)
    assert not list(tmp_path.iterdir())
