"""What every toolkit owes models on other devices; a subclass names the toolkit."""

import copy
from importlib.util import find_spec

import onnxruntime
import pytest
import torch
from device_checks import agree, all_settings, devices, found
from other_device import moved, other_device

from cora_plugin.integrations.toolkit import ADAPTERS
from cora_plugin.qat import finetune


class OnDevices:
    """Both kinds of tests: on a device in disguise, and on a GPU."""

    toolkit = None

    def load(self, path, model, example):
        """Put the adapters of a file into a model."""
        raise NotImplementedError

    def apply(self, model, batches):
        """Give a model adapters, without a bias correction of the toolkit's."""
        raise NotImplementedError

    def quantized(self, net, batches):
        return self.toolkit.quantize(net, batches, self.toolkit.options())

    def compared(self, there, unseen, batches, settings):
        """A run on the CPU and one where the second network is."""
        reports, outputs = [], []
        for net in there:
            given = self.quantized(net, batches)
            reports.append(self.toolkit.adapt(given, settings))
            outputs.append(self.toolkit.outputs(given.model, unseen))
        return reports, outputs, given

    @all_settings
    def test_another_device_finds_the_same(self, settings, float_net, unseen, batches):
        one = self.quantized(float_net, batches)
        expected = self.toolkit.adapt(one, settings)
        with other_device():
            other = self.quantized(moved(copy.deepcopy(float_net)), batches)
            report = self.toolkit.adapt(other, settings)
            assert devices(other.model) == {"meta"}
            outputs = self.toolkit.outputs(other.model, unseen)
        assert found(report) == found(expected)
        assert outputs.device.type == "cpu"
        assert torch.equal(outputs, self.toolkit.outputs(one.model, unseen))

    def test_widths_are_planned_alike_on_another_device(
        self, float_net, batches, unseen
    ):
        config = {"budget": "1.0 ptq", "menu": (2, 3, 4, 6, 8)}
        base = self.quantized(float_net, batches)
        here, expected = self.toolkit.adapted(base, config)
        with other_device():
            base = self.quantized(moved(copy.deepcopy(float_net)), batches)
            adapted, report = self.toolkit.adapted(base, config)
            assert devices(adapted.model) == {"meta"}
            outputs = self.toolkit.outputs(adapted.model, unseen)
        assert found(report) == found(expected)
        one, other = (
            [row.weight_bits for row in each.layers] for each in (expected, report)
        )
        assert one == other
        assert torch.equal(outputs, self.toolkit.outputs(here.model, unseen))

    def test_training_on_another_device_finds_the_same(
        self, float_net, batches, unseen
    ):
        few = batches[:2], unseen[:16]
        expected = self.trained(float_net, *few)
        with other_device():
            there = moved(copy.deepcopy(float_net))
            report = self.trained(there, *few)
            assert devices(there) == {"meta"}
        assert [*report.losses] == [*expected.losses]
        assert report.before.value == expected.before.value
        assert report.after.value == expected.after.value

    def trained(self, net, batches, unseen):
        """The report of a short training with adapters."""
        given = self.quantized(net, batches)
        self.toolkit.adapt(given, "budget=0.1,metric=svd,bias_correction=off")
        held_out = [(unseen, torch.zeros(len(unseen)).long())]
        settings = {"lr": 5e-4, "target": 0.02, "epochs": 1}
        return finetune(
            given.model, batches, reference=net, held_out=held_out, **settings
        )

    @pytest.mark.cuda
    @all_settings
    def test_a_gpu_finds_the_same(self, settings, cuda, float_net, batches, unseen):
        nets = [float_net, copy.deepcopy(float_net).to(cuda)]
        (one, other), outputs, given = self.compared(nets, unseen, batches, settings)
        agree(one, other)
        assert devices(given.model) == {"cuda"}
        assert outputs[1].device.type == "cpu"
        same = outputs[0].argmax(1) == outputs[1].argmax(1)
        assert same.double().mean() > 0.9

    @pytest.mark.cuda
    def test_a_model_may_move_after_it_was_quantized(
        self, cuda, float_net, batches, unseen
    ):
        given = self.quantized(float_net, batches)
        other = given.copied()
        other.model.to(cuda)
        reports = [self.toolkit.adapt(each, "budget=0.3") for each in (given, other)]
        agree(*reports)
        expected = self.toolkit.outputs(other.model, unseen)
        back = self.toolkit.outputs(other.model.cpu(), unseen)
        assert (expected.argmax(1) == back.argmax(1)).double().mean() > 0.9

    @pytest.mark.cuda
    @pytest.mark.parametrize("way", [("cuda", "cpu"), ("cpu", "cuda")])
    def test_adapters_of_one_device_load_on_the_other(
        self, way, cuda, float_net, batches, unseen, tmp_path
    ):
        bare = self.quantized(float_net, batches).model
        one, other = (copy.deepcopy(bare).to(device) for device in way)
        self.apply(one, batches)
        path = tmp_path / "adapters"
        self.toolkit.exports[ADAPTERS].write(one, unseen[:2], path)
        self.load(path, other, unseen[:2])
        assert devices(other) == {way[1]}
        one, other = (self.toolkit.outputs(model, unseen) for model in (one, other))
        assert (one.argmax(1) == other.argmax(1)).double().mean() > 0.9

    @pytest.mark.cuda
    def test_every_file_of_a_gpus_model(
        self, cuda, float_net, batches, unseen, tmp_path
    ):
        given = self.quantized(copy.deepcopy(float_net).to(cuda), batches)
        self.toolkit.adapt(given, "budget=0.3")
        expected = self.toolkit.outputs(given.model, unseen[:2])
        for name, export in self.toolkit.exports.items():
            if missing(name):
                continue
            path = tmp_path / f"{name}{export.suffix}"
            export.write(given.model, unseen[:2].to(cuda), path)
            assert path.stat().st_size
            if export.onnxruntime:
                session = onnxruntime.InferenceSession(
                    path, providers=["CPUExecutionProvider"]
                )
                outputs = run(session, unseen[:2])
                torch.testing.assert_close(outputs, expected, atol=0.1, rtol=0.1)
        assert devices(given.model) == {"cuda"}


def run(session, images):
    feeds = {session.get_inputs()[0].name: images.numpy()}
    return torch.from_numpy(session.run(None, feeds)[0])


def missing(name):
    """Whether the package is absent that a format needs."""
    needed = {"openvino": "openvino", "qonnx": "onnxoptimizer"}
    return name in needed and find_spec(needed[name]) is None
