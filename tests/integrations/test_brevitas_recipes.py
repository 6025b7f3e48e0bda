"""Adapters on top of every recipe of Brevitas' ImageNet example."""

import copy
from argparse import Namespace
from functools import partial

import pytest
import torch
from brevitas.graph.magr import magr_mode
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (
    apply_learned_round,
)
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_act_equalization,
    apply_bias_correction,
    apply_gpfq,
    apply_gptq,
    apply_qronos,
)

from cora_plugin.integrations.brevitas import (
    BrevitasHost,
    apply_cora,
    load_cora,
    remove_cora,
    save_cora,
)
from cora_plugin.outputs import only


@torch.no_grad()
def run(model, x):
    y = model(x)
    return getattr(y, "value", y)


def kl(reference, output):
    p, q = reference.log_softmax(1), output.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def magr(batches, model):
    with torch.no_grad(), magr_mode(model, alpha=0.01, num_steps=5) as mode:
        for images, _ in batches:
            mode.model(images)
        mode.update()


def learned_round(batches, model, form="hard_sigmoid", blocks=None):
    """Brevitas' own, in few iterations; blocks are found by a regular expression."""
    settings = Namespace(
        learned_round=form,
        learned_round_mode="layerwise" if blocks is None else "blockwise",
        learned_round_loss="regularised_mse" if blocks is None else "mse",
        learned_round_lr=0.1,
        learned_round_lr_scheduler=None,
        learned_round_iters=4,
        learned_round_batch_size=8,
    )
    apply_learned_round(model, batches[:2], settings, blocks or "")


def after(*steps, **options):
    """PTQ by `options`, then steps as Brevitas' helpers are called."""

    def recipe(quantize, batches):
        prepare = options.get("prepare")
        asked = {**options, "prepare": prepare and partial(prepare, batches)}
        model = quantize(**asked)
        for step in steps:
            step(batches, model)
        return model

    return recipe


gptq = partial(apply_gptq, act_order=True, create_weight_orig=True)
gpfq = partial(apply_gpfq, act_order=True)


def qronos(batches, model):
    apply_qronos(model, batches)


def equalized(layerwise):
    return lambda batches, model: apply_act_equalization(model, batches, layerwise)


RECIPES = {
    "layerwise": after(),
    "fx": after(backend="fx"),
    "flexml": after(backend="flexml"),
    "per tensor": after(weight_quant_granularity="per_tensor"),
    "asymmetric": after(weight_quant_type="asym"),
    "asymmetric, per tensor, fx": after(
        backend="fx", weight_quant_type="asym", weight_quant_granularity="per_tensor"
    ),
    "powers of two": after(scale_factor_type="po2_scale"),
    "minifloat": after(
        quant_format="float",
        act_quant_type="sym",
        weight_mantissa_bit_width=1,
        weight_exponent_bit_width=2,
        bias_bits=None,
    ),
    "dynamic activations": after(act_scale_computation_type="dynamic", bias_bits=None),
    "gptq": after(gptq),
    "gptq, fx": after(gptq, backend="fx", weight_bits=3),
    "gptq, asymmetric": after(gptq, weight_quant_type="asym"),
    "gpfq": after(gpfq),
    "qronos": after(qronos),
    "magr": after(prepare=magr),
    "magr, gptq": after(gptq, prepare=magr),
    "activation equalization": after(prepare=equalized(True)),
    "activation equalization, fx": after(backend="fx", prepare=equalized(False)),
    "learned round by layer": after(learned_round),
    "learned round by block": after(
        partial(learned_round, form="identity", blocks="^(reflect|head)$")
    ),
}


@pytest.fixture(params=RECIPES)
def model(request, quantize, batches):
    return RECIPES[request.param](quantize, batches)


def test_adapters_stand_on_the_recipe(model, batches, float_net, unseen, tmp_path):
    reference = run(float_net, unseen)
    plain = copy.deepcopy(model)

    host = BrevitasHost(plain)
    layers = host.layers
    assert len(layers) == 7 and not host.skipped
    with torch.no_grad(), host.prepared(), host.acting(quantized=False):
        assert (
            kl(reference, only(host.run(unseen))) < 1e-6
        )  # every W is the float net's
    for layer in layers:
        quantized = plain.get_submodule(layer.name).quant_weight().value
        assert torch.equal(layer.dequantized, quantized)
        assert 0 < layer.residual.norm() < layer.weight.norm()

    apply_cora(batches, model, {"budget": 0.3, "adapter_bits": 8})
    output = run(model, unseen)
    assert kl(reference, output) < kl(reference, run(plain, unseen))

    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, unseen), output)
    save_cora(tmp_path / "adapters", copied)
    loaded = load_cora(tmp_path / "adapters", copy.deepcopy(plain))
    assert torch.equal(run(loaded, unseen), output)
    loaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(loaded, unseen), output)
    assert torch.equal(run(remove_cora(copied), unseen), run(plain, unseen))


@pytest.mark.parametrize("recipe", ["layerwise", "gptq, fx"])
def test_bias_correction_leaves_the_branches_alone(recipe, quantize, batches):
    model = RECIPES[recipe](quantize, batches)
    apply_cora(batches, model, 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_bias_correction(batches, model)
    after = model.state_dict()
    assert set(after) - set(before) == {"same.bias"}  # it had none
    moved = [name for name, v in before.items() if not torch.equal(after[name], v)]
    layers = ["stem", "reflect", "depthwise", "pointwise", "dilated", "head"]
    assert sorted(moved) == sorted(f"{layer}.bias" for layer in layers)
