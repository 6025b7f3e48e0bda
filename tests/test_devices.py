"""The algorithm runs where the model is: on a GPU, or on what behaves like one."""

import copy

import pytest
import torch
from device_checks import agree, all_settings, devices, found
from other_device import moved, other_device
from plain_host import PlainHost, load_correction, quantized_copy, read_correction
from small_net import batches, net

from cora_plugin import CoRa, load_adapters, save_adapters
from cora_plugin.adapters import exact
from cora_plugin.objective import Custom
from cora_plugin.outputs import in_batches
from cora_plugin.widths import plan_widths

ALTERNATION = {"budget": 0.3, "alternations": 2}


def applied(model, settings, objective=None):
    return CoRa(settings, objective).apply(PlainHost(model), batches())


@all_settings
def test_another_device_finds_the_same(settings):
    expected = applied(net(), settings)
    with other_device():
        model = quantized_copy(moved(net()))
        report = applied(model, settings)
        assert devices(model) == {"meta"}
        branch = next(e.plain.branch for e in model.modules() if hasattr(e, "plain"))
        assert {buffer.device.type for buffer in branch.buffers()} == {"meta"}
    assert found(report) == found(expected)


@all_settings
def test_a_device_without_float64_leaves_that_to_the_cpu(settings, monkeypatch):
    monkeypatch.setattr(exact, "WITHOUT_FLOAT64", frozenset({"meta"}))
    expected = applied(net(), settings)
    with other_device(lacks=torch.float64):
        report = applied(moved(net()), settings)
    # The trained factors are rounded to float32 on their way.
    assert [row.rank for row in report.layers] == found(expected)[0]
    assert report.after.kl == pytest.approx(expected.after.kl, rel=0.2)


def test_alternation_on_another_device():
    expected = applied(net(), ALTERNATION)
    with other_device():
        assert found(applied(moved(net()), ALTERNATION)) == found(expected)


def test_widths_are_planned_on_another_device():
    config = {"budget": "1.0 ptq", "menu": [2, 3, 4, 6, 8]}
    expected = plan_widths(PlainHost(net()), batches(), config)
    with other_device():
        plan = plan_widths(PlainHost(moved(net())), batches(), config)
    assert plan.layer_bits == expected.layer_bits


def test_a_tensor_made_without_the_device_is_found():
    def forgetful(reference, outputs):
        each = (outputs - reference).square().mean(1)
        return each + torch.zeros(len(each))

    applied(net(), {"budget": 0.3}, Custom(forgetful))
    with other_device(), pytest.raises(RuntimeError, match="on the same device"):
        applied(moved(net()), {"budget": 0.3}, Custom(forgetful))


def test_float64_on_a_device_without_it_is_found():
    with (
        other_device(lacks=torch.float64),
        pytest.raises(TypeError, match=r"no torch\.float64"),
    ):
        applied(moved(net()), {"budget": 0.3})


def test_images_go_to_the_device_batch_by_batch():
    model, images, seen = net(), torch.randn(10, 3, 12, 12), []
    expected = in_batches(model, images)
    with other_device(), torch.no_grad():
        there = moved(copy.deepcopy(model))
        there.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        outputs = in_batches(there, images, 4)
    assert [(len(x), x.device.type) for x in seen] == [(n, "meta") for n in (4, 4, 2)]
    assert outputs.device.type == "cpu"
    torch.testing.assert_close(outputs, expected)


@pytest.mark.cuda
@all_settings
def test_a_gpu_finds_the_same(settings, cuda):
    expected = applied(net(), settings)
    model = quantized_copy(net().to(cuda))
    agree(expected, applied(model, settings))
    assert devices(model) == {"cuda"}


@pytest.mark.cuda
def test_alternation_on_a_gpu(cuda):
    agree(applied(net(), ALTERNATION), applied(net().to(cuda), ALTERNATION))


@pytest.mark.cuda
def test_images_may_be_on_the_gpu(cuda):
    host = PlainHost(net().to(cuda))
    report = CoRa("budget=0.3").apply(host, [x.to(cuda) for x in batches()])
    agree(applied(net(), "budget=0.3"), report)


@pytest.mark.cuda
@pytest.mark.parametrize("way", [("cuda", "cpu"), ("cpu", "cuda")])
def test_adapters_of_one_device_load_on_the_other(way, cuda, tmp_path):
    one, other = (quantized_copy(net().to(device)) for device in way)
    applied(one, {"budget": 0.3})
    kept = read_correction(one)
    save_adapters(tmp_path / "file", kept.adapters, kept.shifts)
    adapters, shifts, _ = load_adapters(tmp_path / "file")
    load_correction(other, adapters, {n: e.to(way[1]) for n, e in shifts.items()})
    x = batches(1, seed=9)[0]
    with torch.no_grad():
        outputs = [in_batches(model, x) for model in (one, other)]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("side", [8, exact.SMALL + 1])
def test_eigenvectors_come_back_to_the_gpu(side, cuda):
    torch.manual_seed(0)
    root = torch.randn(2, side, side, dtype=torch.float64, device=cuda)
    gram = root @ root.mT
    vectors, values = exact.eigenvectors(gram), exact.eigenvalues(gram)
    assert vectors.device.type == values.device.type == "cuda"
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, gram)
