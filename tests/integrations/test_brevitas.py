import copy
from dataclasses import replace

import pytest
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from brevitas.quant_tensor import QuantTensor
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gptq,
    calibrate,
)
from host_checks import kl, run
from torch import Tensor, nn
from untouched import untouched

from cora_plugin import CoRa, CoRaConfig, CoRaError, load_adapters
from cora_plugin.adapters import Adapter, QuantizedTensor
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
from cora_plugin.integrations.brevitas.fast import (
    fast_range_searches,
    fused_activations,
)
from cora_plugin.integrations.brevitas.insert import read_correction
from cora_plugin.layer import Correction
from cora_plugin.outputs import only
from cora_plugin.testing import LAYERS
from cora_plugin.testing.checks import factored, float_weights, whole

BACKENDS = ["layerwise", "fx"]


def adapters_in(model: nn.Module) -> dict[str, Adapter]:
    return dict(read_correction(model).adapters)


def arguments_of(model: nn.Module, x: Tensor) -> dict[str, tuple]:
    """What each layer is called with while the model runs."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args})
        )
        for name in LAYERS
    ]
    run(model, x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(params=BACKENDS)
def model(request, prototypes):
    return copy.deepcopy(prototypes[request.param])


@pytest.fixture(params=BACKENDS)
def exact(request, exact_prototypes):
    """With float biases."""
    return copy.deepcopy(exact_prototypes[request.param])


def output_of(layer, module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output by the formula of its operation."""
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias
    return layer.operation(x, weight) + bias.view(-1, *[1] * layer.operation.dimensions)


# Reading the model.


def test_every_layer_is_handed_over_with_both_weights(model):
    layers = {layer.name: layer for layer in BrevitasHost(model).layers}
    assert list(layers) == list(LAYERS)
    for name, layer in layers.items():
        module = model.get_submodule(name)
        assert torch.equal(layer.weight, module.weight)
        assert torch.equal(layer.dequantized, module.quant_weight().value)
        levels = layer.dequantized[0].unique().numel()
        assert levels <= 2**layer.weight_bits
        assert layer.scale_bits == 32 * len(layer.weight)


def test_the_operation_and_the_quantized_weight_make_the_hosts_own_output(
    exact, unseen
):
    host = BrevitasHost(exact)
    layers = {layer.name: layer for layer in host.layers}
    seen = []

    def compare(name, x, y):
        layer, module = layers[name], exact.get_submodule(name)
        expected = output_of(layer, module, x, layer.dequantized)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        floats = output_of(layer, module, x, layer.weight)
        assert not torch.allclose(y, floats, rtol=1e-4, atol=1e-4)
        seen.append(name)

    with torch.no_grad(), host.prepared(), host.observe(compare):
        host.run(unseen)
    assert seen == list(LAYERS)


def test_with_float_weights_the_layers_see_quantized_inputs(exact, unseen):
    host = BrevitasHost(exact)
    layers = {layer.name: layer for layer in host.layers}
    seen = []

    def compare(name, x, y):
        layer, module = layers[name], exact.get_submodule(name)
        expected = output_of(layer, module, x, layer.weight)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert x.unique().numel() <= 256
        seen.append(name)

    with torch.no_grad(), host.prepared(), float_weights(host), host.observe(compare):
        host.run(unseen)
    assert seen == list(LAYERS)


def test_the_float_model_is_the_float_network(model, float_net, unseen):
    host = BrevitasHost(model)
    with torch.no_grad(), host.prepared(), host.acting(quantized=False):
        output = only(host.run(unseen))
    torch.testing.assert_close(output, run(float_net, unseen), rtol=1e-3, atol=1e-4)


def test_preparing_a_host_does_not_change_its_outputs(model, unseen):
    before = run(model, unseen)
    host = BrevitasHost(model)
    with torch.no_grad(), host.prepared():
        inside = only(host.run(unseen))
    assert torch.equal(run(model, unseen), before)
    assert torch.equal(inside, before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_fused_activations_are_brevitas_own_in_values_and_gradients(
    quantize, kind, bits
):
    model = quantize(act_quant_type=kind, act_bits=bits).eval()
    found = list(fused_activations(model))
    assert len(found) == len(LAYERS)
    random = torch.Generator().manual_seed(0)
    for quantizer, fused in found:
        _, scale, _, width = quantizer(torch.zeros(1, 1, 1, 1))
        span = 2 * float(scale.detach()) * 2 ** float(width)
        x = (torch.rand(4, 3, 8, 8, generator=random) - 0.5) * span
        x.requires_grad_()
        slope = torch.randn(x.shape, generator=random)
        (expected, *_), (answer, *_) = quantizer(x), fused(x)
        assert torch.equal(answer, expected)
        gradients = [torch.autograd.grad(y, x, slope)[0] for y in (answer, expected)]
        torch.testing.assert_close(*gradients)
        assert 0.2 < gradients[0].eq(0).double().mean() < 0.9, "some are clipped"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_fast_searches_find_brevitas_own_ranges(quantize, batches, kind, bits):
    options = {
        "act_quant_type": kind,
        "act_bits": bits,
        "act_param_method": "mse",
        "uint_sym_act_for_unsigned_values": False,
    }
    expected = quantize(**options)
    model = quantize(calibrated=False, **options)
    with fast_range_searches(model):
        calibrate(batches, model)
    found = scales(model)
    assert len(found) == 2 * len(LAYERS)
    torch.testing.assert_close(found, scales(expected), rtol=1e-6, atol=0)
    zeros = [zero for _, zero in zip(*[iter(found)] * 2, strict=True)]
    assert any(zeros) == (kind == "asym"), "some zero points are sought"
    for part in model.modules():
        assert not {"evaluate_loss", "_mse_search"} & {*vars(part)}


def scales(model):
    """Scale and zero point of each activation, one after the other."""
    return [
        float(value.detach())
        for proxy in model.eval().modules()
        if isinstance(proxy, ActQuantProxyFromInjectorBase) and proxy.is_quant_enabled
        for value in (proxy.scale(), proxy.zero_point())
    ]


# What adapters do.


@pytest.mark.parametrize("build", [whole, factored])
def test_full_rank_restores_every_float_layer(exact, unseen, build):
    plain = copy.deepcopy(exact)
    host = BrevitasHost(exact)
    with host.prepared():
        adapters = build(host)
    host.correct(Correction(adapters))
    arguments = arguments_of(exact, unseen)
    with torch.no_grad(), float_weights(BrevitasHost(plain)):
        for name in LAYERS:
            restored = exact.get_submodule(name)(*arguments[name])
            expected = plain.get_submodule(name)(*arguments[name])
            values = [
                y.value if isinstance(y, QuantTensor) else y
                for y in (restored, expected)
            ]
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_full_ranks_asked_for_restore_the_network_with_float_weights(
    exact, batches, unseen
):
    host = BrevitasHost(exact)
    ranks = {layer.name: layer.full_rank for layer in host.layers}
    before = kl_of_weights(copy.deepcopy(exact), run(exact, unseen), unseen)
    # The regression would go beyond float weights.
    config = {"ranks": ranks, "adapter_bits": 32, "budget": 1, "metric": "qera-exact"}
    report = apply_cora(batches, exact, config)
    assert {row.name: row.rank for row in report.layers} == ranks
    plain = remove_cora(copy.deepcopy(exact))
    assert kl_of_weights(plain, run(exact, unseen), unseen) < 1e-3 * before


def kl_of_weights(plain, output, x):
    host = BrevitasHost(plain)
    with torch.no_grad(), host.prepared(), float_weights(host):
        return kl(only(host.run(x)), output)


def test_rank_zero_leaves_a_layer_as_it_is(model, batches, unseen):
    plain = copy.deepcopy(model)
    report = apply_cora(batches, model, {"ranks": {"head": 0, "s*": 0}, "budget": 0.1})
    assert set(report.skipped) == {"head", "stem", "same"}
    assert all("rank 0" in why for why in report.skipped.values())
    assert set(adapters_in(model)).isdisjoint({"head", "stem", "same"})
    for name in ("head", "stem", "same"):
        assert type(model.get_submodule(name)) is type(plain.get_submodule(name))


@pytest.mark.parametrize("budget", ["0.1 params", "0.8 bits", "0.15 macs", 0.3])
@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_adapters_lower_the_divergence_within_the_budget(
    model, batches, float_net, unseen, budget, search
):
    reference = run(float_net, unseen)
    before = kl(reference, run(model, unseen))
    report = apply_cora(batches, model, {"budget": budget, "search": search})
    if search == "spectral":
        assert kl(reference, run(model, unseen)) < before
    assert report.after.kl < report.before.kl
    assert 0 < report.budget_used <= report.budget_allowed
    adapters = adapters_in(model)
    assert set(adapters) == {row.name for row in report.layers if row.rank}
    counted = {
        "params": sum(a.parameters for a in adapters.values()),
        "bits": sum(a.stored_bits for a in adapters.values()),
        "macs": sum(row.macs for row in report.layers),
    }
    unit = CoRaConfig(budget=budget).budget.unit
    assert report.budget_used == counted[unit]
    weights = sum(model.get_submodule(name).weight.numel() for name in LAYERS)
    if unit == "params":
        assert counted["params"] <= CoRaConfig(budget=budget).budget.amount * weights
    added = report.equivalent_bits - report.equivalent_bits_before
    assert added == pytest.approx(counted["bits"] / weights)
    if unit == "bits":
        assert added <= 0.8
    assert report.bytes * 8 == pytest.approx(report.equivalent_bits * weights, abs=8)


@pytest.mark.parametrize("metric", ["svd", "lqer", "qera-approx", "qera-exact"])
@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_every_metric_and_search_lowers_the_error(prototypes, batches, metric, search):
    model = copy.deepcopy(prototypes["layerwise"])
    config = {"metric": metric, "search": search, "budget": 0.3}
    report = apply_cora(batches, model, config)
    assert report.steps[0].kept
    for row in report.layers:
        if not row.rank:
            assert row.error_after == row.error_before
        elif search == "uniform":  # errors are measured in the metric itself
            assert row.error_after < row.error_before
    errors = [(row.error_before, row.error_after) for row in report.layers]
    before, after = map(sum, zip(*errors, strict=True))
    assert after < before


def test_the_branch_gives_what_the_merged_weight_would(model, batches, unseen):
    plain = copy.deepcopy(model)
    apply_cora(batches, model, {"budget": 0.3})
    layers = {layer.name: layer for layer in BrevitasHost(plain).layers}
    arguments = arguments_of(model, unseen)
    seen = {}
    host = BrevitasHost(plain)
    with torch.no_grad(), host.prepared():
        with host.observe(lambda name, x, _: seen.update({name: x})):
            for name, args in arguments.items():
                plain.get_submodule(name)(*args)
    adapters = adapters_in(model)
    assert len(adapters) >= 4
    for name, adapter in adapters.items():
        layer = layers[name]
        with torch.no_grad():
            (share,) = model.get_submodule(name).cora(seen[name])
        expected = layer.operation(seen[name], adapter.merged())
        torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-5)


def test_branches_are_built_once_for_the_same_terms(exact, unseen):
    host = BrevitasHost(exact)
    adapters = factored(host)
    name = host.layers[1].name
    module = exact.get_submodule(name)
    host.correct(Correction(adapters))
    built, before = module.cora, run(exact, unseen)
    host.correct(Correction())
    shift = {name: torch.ones(len(module.weight))}
    host.correct(Correction(adapters, shift))
    assert module.cora is built
    assert not torch.equal(run(exact, unseen), before)
    halves = {n: each.scaled(0.5) for n, each in adapters.items()}
    host.correct(Correction(halves))
    assert module.cora is not built
    host.correct(Correction(adapters))
    assert module.cora is built
    assert torch.equal(run(exact, unseen), before)


def test_the_same_seed_gives_the_same_adapters(prototypes, batches, tmp_path):
    saved = []
    for name in ("a", "b"):
        model = copy.deepcopy(prototypes["fx"])
        torch.manual_seed(hash(name) % 1000)
        apply_cora(batches, model, {"budget": 0.1, "seed": 5})
        save_cora(tmp_path / name, model)
        saved.append(load_adapters(tmp_path / name)[0])
    first, second = saved
    assert list(first) == list(second)
    for name, adapter in first.items():
        assert torch.equal(adapter.merged(), second[name].merged())


def test_mode_transform_and_helper_give_the_same(model, batches, unseen):
    config = {"budget": 0.1}
    models = [copy.deepcopy(model) for _ in range(3)]
    reports = [apply_cora(batches, models[0], config)]
    with torch.no_grad(), cora_mode(models[1], config) as mode:
        for images, _ in batches:
            assert mode.model(images) is None
    reports.append(mode.report)
    transform = CoRaTransform(batches, config)
    assert transform.apply(models[2]) is models[2]
    reports.append(transform.report)
    expected = run(models[0], unseen)
    assert not torch.equal(expected, run(model, unseen))
    for other, report in zip(models, reports, strict=True):
        assert torch.equal(run(other, unseen), expected)
        assert report.layers == reports[0].layers


def test_a_loader_is_walked_only_once(model, batches):
    report = apply_cora(iter(batches), model, 0.1)
    assert report.images + report.held_out == 64


def test_images_alone_are_as_good_as_tuples(prototypes, batches, unseen):
    models = [copy.deepcopy(prototypes["layerwise"]) for _ in range(2)]
    apply_cora(batches, models[0], 0.1)
    apply_cora([images for images, _ in batches], models[1], 0.1)
    assert torch.equal(run(models[0], unseen), run(models[1], unseen))


def test_it_works_within_no_grad_and_inference_mode(prototypes, batches, unseen):
    models = [copy.deepcopy(prototypes["layerwise"]) for _ in range(4)]
    apply_cora(batches, models[0], 0.1)
    with torch.no_grad():
        apply_cora(batches, models[1], 0.1)
    with torch.inference_mode():
        apply_cora(batches, models[2], 0.1)
    with torch.inference_mode(), cora_mode(models[3], 0.1) as mode:
        for images, _ in batches:
            mode.model(images)
    for model in models[1:]:
        assert not any(value.is_inference() for value in model.state_dict().values())
        assert torch.equal(run(model, unseen), run(models[0], unseen))


def test_training_mode_and_gradients_are_as_they_were(model, batches):
    model.train()
    model.get_submodule("head").eval()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    apply_cora(batches, model, 0.1)
    assert (
        wanted.items()
        <= {name: p.requires_grad for name, p in model.named_parameters()}.items()
    )
    assert modes.items() <= {n: m.training for n, m in model.named_modules()}.items()


def test_the_hosts_own_weights_are_not_touched(model, batches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_cora(batches, model, 0.1)
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


# The float weights.


def test_gptq_keeps_the_float_weights_that_adapters_need(
    prototypes, batches, float_net, unseen
):
    plain = prototypes["layerwise"]
    model = copy.deepcopy(plain)
    apply_gptq(batches, model, act_order=True, create_weight_orig=True)
    for layer in BrevitasHost(model).layers:
        module = model.get_submodule(layer.name)
        assert torch.equal(layer.weight, plain.get_submodule(layer.name).weight)
        assert not torch.equal(layer.weight, module.weight)
        assert torch.equal(layer.dequantized, module.quant_weight().value)
    reference = run(float_net, unseen)
    before = kl(reference, run(model, unseen))
    config = {"budget": 0.3, "metric": "qera-exact", "adapter_bits": 8}
    apply_cora(batches, model, config)
    assert kl(reference, run(model, unseen)) < before


def test_without_them_a_snapshot_or_the_float_model_serves(
    quantize, prototypes, batches, unseen
):
    model = copy.deepcopy(prototypes["layerwise"])
    floats = copy.deepcopy(model)
    given = snapshot(model)
    kept = copy.deepcopy(model)
    apply_gptq(batches, kept, act_order=True, create_weight_orig=True)
    apply_gptq(batches, model, act_order=True)
    models = [kept, model, copy.deepcopy(model)]
    for other, reference in zip(models, (None, given, floats), strict=True):
        apply_cora(batches, other, 0.3, reference=reference)
    outputs = [run(other, unseen) for other in models]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_snapshot_does_not_follow_the_model(prototypes):
    model = copy.deepcopy(prototypes["layerwise"])
    given = snapshot(model)
    before = {name: weight.clone() for name, weight in given.items()}
    assert list(given) == [f"{n}{end}" for n in LAYERS for end in ("", ".bias")]
    for name in LAYERS:
        model.get_submodule(name).weight.data.zero_()
        model.get_submodule(name).bias = None
    assert all(torch.equal(given[name], before[name]) for name in given)


# Living with Brevitas.


def test_taking_adapters_out_restores_the_model_bit_for_bit(model, batches, unseen):
    before, keys = run(model, unseen), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    apply_cora(batches, model, 0.3)
    assert not torch.equal(run(model, unseen), before)
    assert remove_cora(model) is model
    assert torch.equal(run(model, unseen), before)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes


def test_adapters_can_be_found_again_after_they_were_taken_out(model, batches, unseen):
    apply_cora(batches, model, 0.1)
    first = run(model, unseen)
    remove_cora(model)
    apply_cora(batches, model, 0.1)
    assert torch.equal(run(model, unseen), first)


def test_a_deepcopy_gives_the_same_and_lives_its_own_life(model, batches, unseen):
    apply_cora(batches, model, 0.1)
    expected = run(model, unseen)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, unseen), expected)
    remove_cora(other)
    assert not torch.equal(run(other, unseen), expected)
    assert torch.equal(run(model, unseen), expected)


def test_saved_adapters_give_the_same_in_a_freshly_quantized_model(
    quantize, model, batches, unseen, tmp_path, request
):
    backend = request.node.callspec.params["model"]
    apply_cora(batches, model, 0.3)
    save_cora(tmp_path / "adapters.safetensors", model)
    fresh = load_cora(tmp_path / "adapters.safetensors", quantize(backend))
    assert torch.equal(run(fresh, unseen), run(model, unseen))


def test_a_state_dict_goes_strictly_into_a_model_with_the_same_adapters(
    quantize, model, batches, unseen, tmp_path, request
):
    backend = request.node.callspec.params["model"]
    apply_cora(batches, model, 0.3)
    save_cora(tmp_path / "adapters.safetensors", model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other_data = [(x + 1, y) for x, y in batches]
    fresh = quantize(backend, data=other_data)
    load_cora(tmp_path / "adapters.safetensors", fresh)
    assert not torch.equal(run(fresh, unseen), run(model, unseen))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(run(fresh, unseen), run(model, unseen))


def test_quant_inference_mode_gives_the_same(model, batches, unseen):
    apply_cora(batches, model, 0.3)
    expected = run(model, unseen)
    with torch.no_grad(), quant_inference_mode(model):
        run(model, unseen[:1])
        inside = run(model, unseen)
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)


def test_bias_correction_after_adapters_keeps_them_and_does_no_harm(
    model, batches, float_net, unseen
):
    apply_cora(batches, model, 0.1)
    reference = run(float_net, unseen)
    before = kl(reference, run(model, unseen))
    adapters = adapters_in(model)
    biases = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name.endswith("bias")
    }
    apply_bias_correction(batches, model)
    assert adapters_in(model).keys() == adapters.keys()
    after = model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in biases.items())
    assert kl(reference, run(model, unseen)) < 1.5 * before


def test_adapters_are_off_where_brevitas_runs_its_float_reference(
    model, batches, float_net, unseen
):
    from brevitas.graph.calibrate import quantization_status_manager

    apply_cora(batches, model, 0.3)
    with quantization_status_manager(
        model,
        disable_act_quant=True,
        disable_weight_quant=True,
        disable_bias_quant=True,
        is_training=False,
    ):
        output = run(model, unseen)
    torch.testing.assert_close(output, run(float_net, unseen), rtol=1e-3, atol=1e-4)


# The guard.


class NegatedAdapters(BrevitasHost):
    """Plants adapters that double the residuals instead of removing them."""

    def correct(self, correction):
        planted = {}
        for name, adapter in correction.adapters.items():
            (term,) = adapter.terms
            a = term.tensors["a"]
            negated = QuantizedTensor(-a.values, a.scale, a.bits)
            term = replace(term, tensors={**term.tensors, "a": negated})
            planted[name] = Adapter((term,))
        super().correct(Correction(planted))


def test_a_step_that_does_harm_is_rolled_back_and_reported(model, batches, unseen):
    before = run(model, unseen)
    config = {"budget": 0.3, "bias_correction": "off"}
    report = CoRa(config).apply(NegatedAdapters(model), batches)
    assert torch.equal(run(model, unseen), before)
    assert not adapters_in(model)
    names = [
        f"{step}{share}"
        for step in ("adapters", "regression")
        for share in ("", " × 0.5", " × 0.25")
    ]
    assert [step.name for step in report.steps] == names
    for step in report.steps:
        assert not step.kept
        assert step.after.kl > step.before.kl
    assert report.after == report.before
    assert report.budget_used == 0
    assert report.adapter_parameters == 0
    assert report.equivalent_bits == report.equivalent_bits_before
    assert all(row.kind == "none" and row.rank == 0 for row in report.layers)
    assert "rolled back" in str(report)


def test_a_second_helping_is_refused(model, batches):
    apply_cora(batches, model, 0.1)
    match = "already carries .*remove_cora"
    with untouched(model), pytest.raises(CoRaError, match=match):
        apply_cora(batches, model, 0.1)
