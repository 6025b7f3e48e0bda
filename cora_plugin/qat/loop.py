"""The training loop of `finetune`: epochs, steps, measurements, checkpoints."""

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin import processes
from cora_plugin.adapters.errors import ConfigError, DataError, ModelError
from cora_plugin.config import QATConfig
from cora_plugin.host import TrainableHost
from cora_plugin.objective import Objective
from cora_plugin.outputs import device_of
from cora_plugin.progress import counter
from cora_plugin.qat import checkpoint
from cora_plugin.qat.checks import finite
from cora_plugin.qat.held_out import HeldOut, answers, batch_of, beside, losses
from cora_plugin.qat.norms import average, train_mode
from cora_plugin.qat.optimizers import groups_of, optimizer_of
from cora_plugin.qat.report import Measured
from cora_plugin.qat.schedule import cosine
from cora_plugin.qat.scheduler import TransitionRateScheduler
from cora_plugin.qat.state import load_state, state_of
from cora_plugin.training import add_gradients_up

LOST = 20
"""After so many losses in a row that are not finite, training is given up."""


class Loop:
    """Trains a host's model; `best` is the state that judged best, once it has run.

    Args:
        host: The host of the model.
        loader: Yields training batches; its length must be known.
        reference: The float model.
        held_out: Judges in the course of training.
        objective: What "near to the float model" means.
        config: The settings.
        made_for: What a checkpoint must have been made for, beside the settings.
    """

    def __init__(
        self,
        host: TrainableHost,
        loader: Any,
        reference: nn.Module,
        held_out: HeldOut,
        objective: Objective,
        config: QATConfig,
        made_for: dict[str, Any],
    ) -> None:
        self._host, self._loader, self._reference = host, loader, reference
        self._held_out, self._objective, self._config = held_out, objective, config
        self._own = getattr(loader, "generator", None)
        batches = _length(loader)
        self._steps = config.epochs * math.ceil(batches / config.accumulate)
        self._batches = batches
        groups = groups_of(host, config)
        self.optimizer = optimizer_of(config, groups)
        self.scheduler = TransitionRateScheduler(
            self.optimizer,
            host,
            config.target,
            steps=self._steps,
            schedule=config.schedule,
            warmup=config.warmup,
            momentum=config.rate_momentum,
            eta=config.eta,
            enabled=config.method == "trs",
            window=_window(config.window, self._steps),
        )
        self._others = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            [
                _kept if self.scheduler.enabled and group["name"] == "latents" else fall
                for group in groups
                for fall in [partial(_fallen, self._steps)]
            ],
        )
        settings = {f"qat.{name}": value for name, value in vars(config).items()}
        del settings["qat.checkpoint"]
        self._made_for = {
            **made_for,
            **settings,
            "batches": batches,
            "processes": processes.count(),
        }
        _check_alike(self._made_for)
        self.step = self.epoch = self._batch = self._since = 0
        self.stopped = False
        self.losses: list[float] = []
        self._part: list[float] = []
        self._samples = 0
        self.measured: list[Measured] = []
        self.best: dict[str, Tensor] | None = None
        self._best_loss = math.inf
        self._lost = self.nonfinite = 0
        self.seconds = 0.0
        self._whole = True
        self._begun = self._now = checkpoint.randomness(self._own)

    @property
    def epochs(self) -> float:
        """Passes over the data, in part."""
        return self.epoch + self._batch / self._batches

    def run(self) -> None:
        """Train to the end, from where a checkpoint left it.

        Raises:
            CoRaError: The loss is not finite again and again, or a checkpoint is of
                another training.
        """
        resumed = self._resume()
        start = time.perf_counter() - self.seconds
        progress = counter("qat", "step", self._steps, self.step)
        try:
            with progress:
                while self.epoch < self._config.epochs and not self.stopped:
                    self._run_epoch(resumed, progress, start)
                    resumed = False
        except KeyboardInterrupt:
            self.seconds = time.perf_counter() - start
            # Of several processes this one alone may be interrupted.
            if self._whole and processes.count() == 1:
                self._save()
            raise
        self.seconds = time.perf_counter() - start
        self._save()

    def _run_epoch(self, resumed: bool, progress: Any, start: float) -> None:
        config, now = self._config, self._now
        if resumed:
            checkpoint.set_randomness(self._begun, self._own)
        else:
            self._begun, self._batch = checkpoint.randomness(self._own), 0
        _set_epoch(self._loader, self.epoch)
        skipped, group = self._batch if resumed else 0, 0
        train_mode(self._host.model, config.norms == "frozen")
        for number, item in enumerate(self._loader):
            if number < skipped:
                if number == skipped - 1:  # Before the loader draws the next batch.
                    checkpoint.set_randomness(now, self._own)
                continue
            group += 1
            last = number + 1 == self._batches
            size = config.accumulate
            if number >= self._batches // size * size:
                size = self._batches % size  # of the last group, which is smaller
            loss = self._backward(item, size)
            if group < config.accumulate and not last:
                continue
            group = 0
            self._whole = False
            self._update()
            self._batch = number + 1
            self.seconds = time.perf_counter() - start
            if config.every and self.step % config.every == 0 and not last:
                self._measure()
            self._now = checkpoint.randomness(self._own) if config.checkpoint else {}
            self._whole = True
            if config.every and self.step % config.every == 0 and not last:
                self._save()
            self._show(progress, loss)
            if self.stopped:
                return
        if self._batch != self._batches:
            raise DataError(
                f"training data: the loader gave {self._batch} batches, and its length "
                f"is {self._batches}; both must be the same"
            )
        self._measure()
        self.epoch += 1
        self._batch = 0
        self._now = self._begun = checkpoint.randomness(self._own)
        self._save()

    @torch.enable_grad()
    def _backward(self, item: Any, size: int) -> float:
        """Add the gradients of a batch, as a part of a step of `size` batches."""
        config, host = self._config, self._host
        batch = batch_of(item, "training data", config.labels > 0)
        target = beside(answers(self._reference, batch.images), host.model)
        device = device_of(host.model).type
        # Not every device knows it, so it is named only where it is wanted.
        half = torch.autocast(device, torch.bfloat16) if config.autocast else None
        with half or nullcontext():
            outputs = host.run(batch.images)
        outputs = {name: value.float() for name, value in outputs.items()}
        each = losses(self._objective, config.labels, target, outputs, batch.labels)
        loss = each.mean()
        value = float(loss.detach())
        self._part.append(value)
        self._samples += len(each)
        self._lost = 0 if math.isfinite(value) else self._lost + 1
        if self._lost >= LOST:
            if not batch.images.isfinite().all():
                raise DataError(
                    "training data: images hold values that are not finite, of "
                    f"{LOST} batches in a row; see how they are preprocessed"
                )
            raise ModelError(
                f"qat: the loss has been {value} for {LOST} batches, up to step "
                f"{self.step}: lower lr ({config.first_lr:g}) or target "
                f"({config.target:g})"
            )
        (loss / size).backward()
        return value

    def _update(self) -> None:
        """Make a step, unless gradients are not finite."""
        config, optimizer = self._config, self.optimizer
        loss = self._shared(sum(self._part) / len(self._part))
        if config.clip is not None:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(held, config.clip)
        if self.scheduler.enabled or finite(optimizer):
            optimizer.step()
        else:
            self.nonfinite += 1
        optimizer.zero_grad()
        self.scheduler.step()
        self._others.step()
        self.step += 1
        self.losses.append(loss)

    def _shared(self, loss: float) -> float:
        """Average the gradients of a step over the samples of all processes.

        Args:
            loss: The mean loss of this process's samples; returns that of all.
        """
        count = self._samples
        self._part.clear()
        self._samples = 0
        if processes.count() == 1:
            return loss
        sums = add_gradients_up("qat", self.optimizer, [count, loss * count], count)
        samples, total = sums
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(samples)
        return total / samples

    def _measure(self) -> None:
        """Judge the model on held-out images; keep it, or stop, by what they say."""
        if self._config.norms != "frozen":
            average(self._host.model)
        self._host.model.eval()
        found = self._held_out(self._host)
        train_mode(self._host.model, self._config.norms == "frozen")
        value = found.distance.value
        self.measured.append(Measured(self.step, found.loss, value, found.top1))
        if found.loss < self._best_loss:
            self._best_loss, self._since = found.loss, 0
            self.best = state_of(self._host.model)
        else:
            self._since += 1
            self.stopped = self._since >= self._config.patience

    def _show(self, progress: Any, loss: float) -> None:
        figures = {"loss": f"{loss:.4g}"}
        last = self.scheduler.last
        if last is not None:
            figures["rate"] = f"{last.running:.2g}"
            if last.target is not None:
                figures["target"] = f"{last.target:.2g}"
        progress.update()
        progress.set_postfix(figures)

    def _save(self) -> None:
        path = self._config.checkpoint
        if path is None:
            return
        drawn = self._begun, self._now or self._begun
        begun, now = zip(*processes.gathered("randomness", drawn), strict=True)
        if processes.rank():
            return
        state = {
            "model": state_of(self._host.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "others": _plain(self._others.state_dict()),
            "best": self.best,
            "begun": [*begun],
            "now": [*now],
            "measured": [vars(each).copy() for each in self.measured],
            **{name: getattr(self, name) for name in _PLAIN},
        }
        checkpoint.save(path, self._made_for, state)

    def _resume(self) -> bool:
        path, rank = self._config.checkpoint, processes.rank()
        if path is None:
            return False
        state = None if rank else checkpoint.load(path, self._made_for)
        state = processes.of_first("a checkpoint", state)
        if state is None:
            return False
        load_state(self._host.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._others.load_state_dict({**self._others.state_dict(), **state["others"]})
        self.best = state["best"]
        self._begun, self._now = state["begun"][rank], state["now"][rank]
        self.measured = [Measured(**each) for each in state["measured"]]
        for name in _PLAIN:
            setattr(self, name, state[name])
        return True


_PLAIN = (
    "step",
    "epoch",
    "_batch",
    "_since",
    "stopped",
    "losses",
    "_best_loss",
    "_lost",
    "nonfinite",
    "seconds",
)
"""What of a loop is plain values, to be stored as it is."""


def _length(loader: Any) -> int:
    try:
        count = len(loader)
    except TypeError as error:
        raise DataError(
            f"training data: a {type(loader).__name__} has no length, which the "
            "schedule needs; pass a DataLoader of a dataset with a length, or a list "
            "of batches"
        ) from error
    if not count:
        raise DataError("training data: the loader is empty; pass a few batches")
    return count


def _check_alike(made_for: dict[str, Any]) -> None:
    """Check that all processes train the same model in the same way.

    Raises:
        CoRaError: They do not.
    """
    for number, other in enumerate(processes.gathered("settings", made_for)):
        for name, value in made_for.items():
            if other.get(name) == value:
                continue
            found = f"{value} in process {processes.rank()}, {other.get(name)} in "
            found += f"process {number}"
            if name == "batches":
                raise DataError(
                    f"training data: batches of the loader: {found}; all need as many: "
                    "use a DistributedSampler, or drop what one has too many"
                )
            raise ConfigError(
                (name,), f"{found}; give each the same quantized model and settings"
            )


def _set_epoch(loader: Any, epoch: int) -> None:
    """Have samplers that shuffle by epoch, as torch's DistributedSampler, do so."""
    for each in (loader, getattr(loader, "sampler", None)):
        set_epoch = getattr(each, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _window(given: int | None, steps: int) -> int:
    """Steps that tell what oscillates at the end, not what once did."""
    return max(1, min(100, steps // 10)) if given is None else given


def _fallen(steps: int, step: int) -> float:
    return cosine(min(1.0, step / steps))


def _kept(step: int) -> float:
    return 1.0


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state files hold; the functions are made anew."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"}
