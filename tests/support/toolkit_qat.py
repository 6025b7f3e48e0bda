"""What every toolkit owes training; a subclass names the toolkit."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from fashion import batches as fashion_batches
from fashion import resnet
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cora_plugin.adapters.errors import ConfigError, DataError, FileError, ModelError
from cora_plugin.host import TrainableHost
from cora_plugin.layer import Correction
from cora_plugin.qat import TransitionRateScheduler, finetune, hosted, param_groups
from cora_plugin.testing import images
from cora_plugin.testing.checks import assert_same_state

BUDGET = 0.1


def training_batches(count=12, size=16, seed=5):
    return [
        (x, x.mean((1, 2, 3)).gt(0).long())
        for x in images(count * size, seed).split(size)
    ]


class Interrupting(list):
    """A loader whose user presses Ctrl-C at a batch, once."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.left = at

    def __iter__(self):
        for batch in super().__iter__():
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            yield batch


class Augmenting(Interrupting):
    """Changes images at random, by the generators that loaders draw from."""

    def __iter__(self):
        for x, labels in super().__iter__():
            noise = random.random() + np.random.rand() + float(torch.rand(()))
            yield x + 0.1 * noise, labels


class Trains:
    """Models of a toolkit are trained, with adapters and without."""

    toolkit = None
    options = None

    @pytest.fixture(scope="class")
    @classmethod
    def quantized(cls, float_net, batches):
        return cls.toolkit.quantize(float_net, batches, cls.options)

    @pytest.fixture
    def base(self, quantized):
        return quantized.copied()

    @pytest.fixture
    def adapted(self, base):
        self.toolkit.adapt(base, f"budget={BUDGET}")
        return base

    @pytest.fixture
    def other_net(self, float_net):
        """A float net that the quantized one has much to learn of."""
        net = copy.deepcopy(float_net)
        net.head.bias.data += torch.linspace(-1, 1, 10)
        return net

    @pytest.fixture
    def single_process(self, tmp_path):
        meet = f"file://{tmp_path / 'meet'}"
        torch.distributed.init_process_group(
            "gloo", init_method=meet, rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()

    def tune(self, model, float_net, unseen, loader=None, **settings):
        settings = {"lr": 5e-4, "target": 0.02, "epochs": 2, **settings}
        return finetune(
            model,
            training_batches() if loader is None else loader,
            reference=float_net,
            held_out=[(e, torch.zeros(len(e)).long()) for e in unseen.split(16)],
            **settings,
        )

    def test_the_host_is_found(self, base):
        host = hosted(base.model)
        assert isinstance(host, TrainableHost)
        assert host.model is base.model
        assert hosted(host) is host

    def test_levels_are_those_of_the_toolkit(self, base):
        with hosted(base.model).training() as latents:
            assert len(latents) == 7
            for each in latents:
                levels, own = each.levels(), self.own_levels(base.model, each.name)
                assert levels.dtype == torch.int8
                assert levels.shape == each.weight.shape
                # Up to a constant.
                assert len((levels.int() - own.int()).unique()) == 1, each.name
                rounded = each.positions().round()
                assert (rounded - levels).unique().numel() == 1

    def test_every_parameter_is_in_one_group(self, adapted):
        wanted = {p for p in adapted.model.parameters() if p.requires_grad}
        groups = param_groups(adapted.model, latents={"lr": 0.5})
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len({*held})
        assert {*held} >= wanted
        by_name = {group["name"]: group for group in groups}
        assert list(by_name) == [
            "latents",
            "weight_scales",
            "activation_scales",
            "adapters",
            "rest",
        ]
        assert len(by_name["latents"]["params"]) == 7
        assert len(by_name["weight_scales"]["params"]) == 7
        assert by_name["latents"]["lr"] == 0.5

    def test_a_loop_of_ones_own_is_told_to_store_adapters(
        self, adapted, unseen, caplog
    ):
        model = adapted.model
        optimizer = torch.optim.SGD(param_groups(model), 1e-3)
        with TransitionRateScheduler(optimizer, model, steps=2) as scheduler:
            self.plain(model(unseen)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            assert "renew()" not in caplog.text
        assert "renew() before save_cora" in caplog.text

    def test_scales_of_weights_stand_still_while_training(self, base):
        host = hosted(base.model)
        before = {n: p.requires_grad for n, p in base.model.named_parameters()}
        scales = {n for n, role in host.roles.items() if role == "weight_scales"}
        with host.training():
            now = {n: p.requires_grad for n, p in base.model.named_parameters()}
            assert {n for n in before if before[n] and not now[n]} == scales
        after = {n: p.requires_grad for n, p in base.model.named_parameters()}
        assert after == before

    def test_a_wrapped_model_trains_in_either_order(self, quantized, single_process):
        """Scales that stand still are among what DistributedDataParallel waits for."""
        x, labels = training_batches()[0]

        def rates(wrapped_first):
            model = quantized.copied().model
            wrapped = DistributedDataParallel(model) if wrapped_first else model
            groups = param_groups(model)
            optimizer = torch.optim.AdamW(groups, 1e-3, weight_decay=0.1)
            (scales,) = (g["params"] for g in groups if g["name"] == "weight_scales")
            before = [each.detach().clone() for each in scales]
            with TransitionRateScheduler(optimizer, model, 0.02, steps=4) as scheduler:
                if not wrapped_first:
                    wrapped = DistributedDataParallel(model)
                for _ in range(4):
                    functional.cross_entropy(wrapped(x), labels).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
            pairs = zip(scales, before, strict=True)
            assert all(torch.equal(each, was) for each, was in pairs)
            return [each.rate for each in scheduler.transitions().steps]

        expected = rates(wrapped_first=False)
        assert sum(expected) > 0
        assert rates(wrapped_first=True) == expected

    def test_adapters_are_not_trained_apart_in_each_process(
        self, adapted, single_process
    ):
        wrapped = DistributedDataParallel(adapted.model)
        with pytest.raises(ModelError, match=r"param_groups\(model\) first"):
            param_groups(wrapped)
        param_groups(adapted.model)
        assert param_groups(DistributedDataParallel(adapted.model))

    def test_frozen_layers_stay_as_they_are(self, base, float_net, unseen):
        """Those whose weights want no gradients."""
        base.model.stem.weight.requires_grad_(False)
        before = base.model.stem.weight.clone()
        with hosted(base.model).training() as latents:
            assert len(latents) == 6
            assert not base.model.stem.weight.requires_grad
        report = self.tune(base.model, float_net, unseen, epochs=1)
        assert report.kept
        assert torch.equal(base.model.stem.weight, before)
        assert len(report.transitions.layers) == 6

    def test_a_model_that_was_loaded_to_be_run_trains_whole(self, base):
        for parameter in base.model.parameters():
            parameter.requires_grad_(False)
        (group,) = (g for g in param_groups(base.model) if g["name"] == "latents")
        assert len(group["params"]) == 7
        with hosted(base.model).training() as latents:
            assert all(each.weight.requires_grad for each in latents)
        assert not base.model.stem.weight.requires_grad

    def test_a_warmup_longer_than_the_training_is_refused(
        self, base, float_net, unseen
    ):
        with pytest.raises(ConfigError, match=r"warmup: .* fewer than 12 steps"):
            self.tune(base.model, float_net, unseen, epochs=1, warmup=12)

    def test_nearer_to_float_than_before(self, base, float_net, unseen, tmp_path):
        report = self.tune(base.model, float_net, unseen)
        assert report.kept
        assert report.after.value < 0.8 * report.before.value
        assert len(report.transitions.steps) == len(report.losses) == 24
        assert report.transitions.window == 2  # a tenth
        assert len(report.measured) == 2
        assert sum(e.transitions for e in report.transitions.layers) > 0
        assert not base.model.training
        report.save(tmp_path / "qat.json")
        stored = json.loads((tmp_path / "qat.json").read_text())
        assert stored["transitions"]["steps"][3]["rate"] == (
            report.transitions.steps[3].rate
        )
        report.plot(tmp_path / "qat.png")
        assert (tmp_path / "qat.png").stat().st_size > 10_000
        assert f"{report.before} → {report.after}" in str(report)
        outputs = self.toolkit.outputs(base.model, unseen)
        reference = {"": float_net(unseen).detach()}
        from cora_plugin.objective import KL, measure

        found = measure(KL(), reference, {"": outputs}).value
        assert found == pytest.approx(report.after.value, rel=1e-3)

    def test_the_distance_is_that_of_the_adapters(self, quantized, float_net, unseen):
        base = quantized.copied()
        self.toolkit.adapt(base, {"budget": 0.1, "objective": "mse"})
        report = self.tune(base.model, float_net, unseen, epochs=1)
        assert report.before.objective == report.after.objective == "mse"
        report = self.tune(base.model, float_net, unseen, epochs=1, objective="cosine")
        assert report.before.objective == "cosine"

    def test_what_does_harm_is_taken_back(self, base, float_net, unseen):
        before = copy.deepcopy(base.model.state_dict())
        outputs = self.toolkit.outputs(base.model, unseen)
        report = self.tune(
            base.model, float_net, unseen, optimizer="sgd", lr=0.5, other_lr=0.5
        )
        assert not report.kept
        assert report.after == report.before
        assert_same_state(base.model, before)
        assert torch.equal(self.toolkit.outputs(base.model, unseen), outputs)

    @pytest.mark.parametrize("method", ["trs", "lr"])
    def test_interrupted_it_goes_on_where_it_was(
        self, method, quantized, float_net, unseen, tmp_path
    ):
        settings = {"method": method, "epochs": 2, "accumulate": 2, "clip": 1.0}
        whole = quantized.copied().model
        expected = self.tune(whole, float_net, unseen, **settings)
        model = quantized.copied().model
        before = copy.deepcopy(model.state_dict())
        path = tmp_path / "qat.pt"
        loader = Interrupting(training_batches(), 1 + 12 + 8)
        with pytest.raises(KeyboardInterrupt):
            self.tune(model, float_net, unseen, loader, checkpoint=path, **settings)
        assert_same_state(model, before)
        again = quantized.copied().model
        report = self.tune(again, float_net, unseen, checkpoint=path, **settings)
        # Not as a whole, for pytest takes minutes to tell long lists apart.
        pairs = zip(report.losses, expected.losses, strict=True)
        assert all(one == two for one, two in pairs)
        steps = report.transitions.steps, expected.transitions.steps
        assert all(one == two for one, two in zip(*steps, strict=True))
        assert_same_state(again, whole.state_dict())
        assert report.after == expected.after

    def test_random_changes_of_images_go_on_where_they_were(
        self, quantized, float_net, unseen, tmp_path
    ):
        def losses(at, **settings):
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(3)
            model, loader = quantized.copied().model, Augmenting(training_batches(), at)
            return self.tune(model, float_net, unseen, loader, **settings).losses

        expected = losses(0)
        path = tmp_path / "qat.pt"
        with pytest.raises(KeyboardInterrupt):
            losses(1 + 12 + 8, checkpoint=path)
        assert losses(0, checkpoint=path) == expected

    def test_a_checkpoint_of_another_training(self, base, float_net, unseen, tmp_path):
        path = tmp_path / "qat.pt"
        self.tune(base.copied().model, float_net, unseen, epochs=1, checkpoint=path)
        with pytest.raises(FileError, match=r"training with qat\.epochs 1, .* 2"):
            self.tune(base.model, float_net, unseen, epochs=2, checkpoint=path)
        nowhere = tmp_path / "missing" / "qat.pt"
        with pytest.raises(FileNotFoundError, match="does not exist"):
            loader = Interrupting(training_batches(), 2)  # Nothing is trained before.
            self.tune(base.model, float_net, unseen, loader, checkpoint=nowhere)
        path.write_text("no checkpoint")
        with pytest.raises(FileError, match="not a readable checkpoint"):
            self.tune(base.model, float_net, unseen, checkpoint=path)

    def test_it_stops_where_nothing_is_gained(self, base, float_net, unseen):
        small = {"lr": 1e-12, "other_lr": 1e-12, "every": 2, "patience": 2}
        report = self.tune(base.model, float_net, unseen, **small)
        assert report.stopped
        assert len(report.transitions.steps) <= 12

    def test_gradients_are_not_left_to_the_caller(self, base, float_net, unseen):
        with torch.no_grad():
            report = self.tune(base.model, float_net, unseen, epochs=1)
        assert len(report.transitions.steps) == 12

    def test_labels_make_a_part_of_the_loss(self, base, float_net, unseen):
        report = self.tune(base.model, float_net, unseen, labels=1.0, epochs=1)
        # Held-out labels say class 0, of which those of training know as well.
        assert report.top1[0] is not None
        assert report.verdict.difference != pytest.approx(
            report.after.value - report.before.value
        )

    def test_adapters_are_trained_along(
        self, adapted, other_net, unseen, batches, tmp_path
    ):
        plain = adapted.copied()
        standing = dict(hosted(adapted.model, batches[0][0]).correction.adapters)
        report = self.tune(adapted.model, other_net, unseen, other_lr=3e-3)
        assert report.kept
        assert "trained along" in report.adapters
        trained = hosted(adapted.model, batches[0][0]).correction.adapters
        assert trained.keys() == standing.keys()
        for name, adapter in trained.items():
            assert adapter.forms == standing[name].forms
            assert adapter.fingerprint != standing[name].fingerprint
        self.check_files(adapted, plain, batches, unseen, tmp_path)

    def check_files(self, adapted, before, batches, unseen, tmp_path):
        """Adapter files and exports work on a trained model."""
        outputs = self.toolkit.outputs(adapted.model, unseen)
        path = tmp_path / "adapters.safetensors"
        self.toolkit.exports["adapters"].write(adapted.model, unseen[:1], path)
        with pytest.raises(FileError, match="made for a weight"):
            self.load(path, self.bare(before.model), batches)
        bare = self.bare(copy.deepcopy(adapted.model))
        assert not torch.equal(self.toolkit.outputs(bare, unseen), outputs)
        self.load(path, bare, batches)
        assert torch.equal(self.toolkit.outputs(bare, unseen), outputs)
        name, export = self.toolkit.onnxruntime_format()
        file = tmp_path / f"{name}.onnx"
        export.write(adapted.model, unseen[:1], file)
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        (first,) = (each.name for each in session.get_inputs())
        (found,) = session.run(None, {first: unseen[:1].numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), outputs[:1], atol=0.05, rtol=0.05
        )

    @pytest.mark.parametrize("adapters", ["keep", "resolve"])
    def test_adapters_stay_or_are_solved_again(
        self, adapters, adapted, other_net, unseen, batches
    ):
        host = hosted(adapted.model, batches[0][0])
        standing, made_with = host.correction.adapters, host.settings
        report = self.tune(
            adapted.model, other_net, unseen, adapters=adapters, other_lr=3e-3
        )
        after = hosted(adapted.model, batches[0][0])
        now = after.correction.adapters
        assert now and report.kept
        assert after.settings["budget"] == made_with["budget"]
        if adapters == "keep":
            for name, adapter in now.items():
                for key, stored in adapter.tensors.items():
                    other = standing[name].tensors[key]
                    torch.testing.assert_close(stored.dequantize(), other.dequantize())
        else:
            assert "solved again" in report.adapters
            spent = sum(each.parameters for each in now.values())
            allowed = BUDGET * sum(
                each.weight.numel()
                for each in self.toolkit.host(
                    self.bare(adapted.model), batches[0][0]
                ).layers
            )
            assert spent <= allowed * 1.001

    def test_adapters_that_stay_keep_their_settings(
        self, adapted, other_net, unseen, batches
    ):
        report = self.tune(
            adapted.model,
            other_net,
            unseen,
            adapters="resolve",
            cora={"ranks": {"*": 0}},
            other_lr=3e-3,
        )
        assert report.kept
        assert "as they were" in report.adapters or "not solved" in report.adapters
        host = hosted(adapted.model, batches[0][0])
        assert host.correction.adapters
        assert host.settings["budget"] == f"{BUDGET:g} params"

    def test_after_harm_adapters_are_as_before(
        self, adapted, float_net, unseen, batches, tmp_path
    ):
        before = copy.deepcopy(adapted.model.state_dict())
        outputs = self.toolkit.outputs(adapted.model, unseen)
        report = self.tune(
            adapted.model, float_net, unseen, optimizer="sgd", lr=0.5, other_lr=0.5
        )
        assert not report.kept
        assert torch.equal(self.toolkit.outputs(adapted.model, unseen), outputs)
        assert_same_state(adapted.model, before)
        path = tmp_path / "adapters.safetensors"
        self.toolkit.exports["adapters"].write(adapted.model, unseen[:1], path)
        self.load(path, self.bare(adapted.model), batches)

    @pytest.mark.parametrize("harm", [False, True])
    def test_a_host_that_was_passed_knows_what_stands_afterwards(
        self, harm, adapted, other_net, unseen, batches
    ):
        host = hosted(adapted.model, batches[0][0])
        settings = {"other_lr": 3e-3, "adapters": "resolve"}
        if harm:
            settings |= {"optimizer": "sgd", "lr": 0.5, "other_lr": 0.5}
        before = [parameter.requires_grad for parameter in host.model.parameters()]
        report = self.tune(host, other_net, unseen, **settings)
        assert report.kept != harm
        if harm:
            after = [parameter.requires_grad for parameter in host.model.parameters()]
            assert after == before
        outputs = self.toolkit.outputs(host.model, unseen)
        standing = host.correction
        assert standing.adapters
        host.correct(Correction())
        assert not torch.equal(self.toolkit.outputs(host.model, unseen), outputs)
        host.correct(standing)
        assert torch.equal(self.toolkit.outputs(host.model, unseen), outputs)

    def test_switched_off_it_trains_bit_for_bit(self, quantized):
        """Rates are measured, and nothing else is different."""

        def train(model, watched):
            optimizer = torch.optim.SGD(param_groups(model), 1e-3, momentum=0.9)
            scheduler = None
            if watched:
                scheduler = TransitionRateScheduler(
                    optimizer, model, steps=6, enabled=False, window=5
                )
            for x, labels in training_batches(6):
                functional.cross_entropy(self.plain(model(x)), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
            return scheduler

        one, other = quantized.copied().model, quantized.copied().model
        scheduler = train(one, True)
        train(other, False)
        assert_same_state(one, other.state_dict())
        assert scheduler.rate > 0

    def test_rate_follows_the_target_on_fashion(self):
        """Within a fifth, over the second half of a constant target."""
        net = resnet()
        data = fashion_batches(40, 4)
        base = self.toolkit.quantize(net, data[:4], self.fashion_options)
        groups = param_groups(base.model, rest={"lr": 1e-4})
        optimizer = torch.optim.Adam(groups, 3e-4)
        scheduler = TransitionRateScheduler(
            optimizer, base.model, 0.01, steps=40, schedule=lambda _: 1.0
        )
        with scheduler:
            for x, _ in data:
                with torch.no_grad():
                    target = net(x).softmax(1)
                loss = functional.cross_entropy(self.plain(base.model(x)), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            rates = [each.rate for each in scheduler.transitions().steps[20:]]
        mean = sum(rates) / len(rates)
        assert mean == pytest.approx(0.01, rel=0.2), rates

    def test_quantizers_that_are_switched_off(self, base):
        self.switch_off(base.model)
        optimizer = torch.optim.SGD(base.model.parameters(), 0.1)
        with pytest.raises(ModelError, match="stem: its quantizer is switched off"):
            TransitionRateScheduler(optimizer, base.model, steps=3)

    def test_a_loader_without_batches_or_labels(self, base, float_net, unseen):
        with pytest.raises(DataError, match="training data: the loader is empty"):
            self.tune(base.model, float_net, unseen, [])
        with pytest.raises(DataError, match="no labels of integers"):
            bare = [x for x, _ in training_batches()]
            self.tune(base.model, float_net, unseen, bare, labels=0.5)
        with pytest.raises(DataError, match="generator has no length"):
            finetune(
                base.model,
                _endless(),
                reference=float_net,
                held_out=[unseen],
            )

    def test_what_cannot_be_meant(self, base, float_net, unseen):
        with pytest.raises(DataError, match=r"one tensor, \[.*\], and not batches"):
            self.tune(base.model, float_net, unseen, unseen)
        with pytest.raises(DataError, match="held-out data: a NoneType is no loader"):
            finetune(base.model, [unseen], reference=float_net, held_out=None)
        bytes_ = unseen.to(torch.uint8)
        with pytest.raises(DataError, match="held-out data: the model does not run"):
            finetune(base.model, [unseen], reference=float_net, held_out=[bytes_])
        wrong = [(x, labels + 10) for x, labels in training_batches()]
        with pytest.raises(DataError, match=r"labels: \d+ is none of the 10 classes"):
            self.tune(base.model, float_net, unseen, wrong, labels=0.5)
        with pytest.raises(ConfigError, match="pass adapters=resolve"):
            self.tune(base.model, float_net, unseen, cora=f"budget={BUDGET}")
        other = nn.Sequential(nn.Flatten(), nn.Linear(unseen[0].numel(), 7))
        with pytest.raises(ModelError, match=r"\[\d+, 7\] of the float model"):
            self.tune(base.model, other, unseen)

    def test_losses_that_are_not_finite_end_it(self, base, float_net, unseen):
        before = copy.deepcopy(base.model.state_dict())
        broken = copy.deepcopy(float_net)
        nn.init.constant_(broken.head.bias, float("nan"))
        loader = training_batches(30, 4)
        with pytest.raises(ModelError, match="loss has been nan for 20 batches"):
            finetune(base.model, loader, reference=broken, held_out=[unseen])
        lost = [x * float("nan") for x, _ in training_batches(30, 4)]
        with pytest.raises(DataError, match="images hold values that are not finite"):
            finetune(base.model, lost, reference=float_net, held_out=[unseen])
        assert_same_state(base.model, before)

    def test_the_report_is_plain(self, base, float_net, unseen):
        report = self.tune(base.model, float_net, unseen, epochs=1, checkpoint=None)
        assert json.loads(json.dumps(report.transitions.to_dict()))


def _endless():
    while True:
        yield images(4, 0)
