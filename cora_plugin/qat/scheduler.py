"""Schedules how many weights change their codes in a step, not how far they move."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.host import Latent, TrainableHost
from cora_plugin.processes import add_up
from cora_plugin.qat.checks import check_settings, finite, first_rate, places_of
from cora_plugin.qat.controller import Controller, State, momentum_for
from cora_plugin.qat.hosted import hosted
from cora_plugin.qat.record import LayerRecord, StepRecord, Transitional
from cora_plugin.qat.schedule import Schedule, schedule_of, target_at
from cora_plugin.qat.still import awaited, with_zeros
from cora_plugin.qat.transitions import Transitions

log = logging.getLogger(__name__)

PATIENCE = 20, 1000
"""A target that is not reached in a fifth of all steps, within these, is reported."""

SAMPLED = 50
"""Steps between measurements of what is near transition points, and oscillates; in a
short training a twentieth of all."""


class TransitionRateScheduler:
    """Owns the learning rate of latent weights, so that codes change at a target rate.

    >>> optimizer = torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9)
    >>> scheduler = TransitionRateScheduler(optimizer, model, target=5e-3, steps=1000)
    >>> for images, labels in loader:
    ...     loss(model(images), labels).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     scheduler.step()

    In the shape of `torch.optim.lr_scheduler`. Works with any optimizer that has a
    learning rate a group; other groups are left to a scheduler of their own, which may
    be called before or after this one. While it is open, latent weights want gradients,
    and scales of weights do not: a moving scale changes codes by itself. `close`, or
    the end of a `with` block, gives that back.

    A call of `step` counts, and moves the schedule on, where the optimizer has made a
    step since the last: batches that are accumulated, and steps that a GradScaler skips
    or that gradients which are not finite forbid, do neither. In several processes
    counts are summed.

    Args:
        optimizer: Has each latent weight in a group without other parameters, as
            `param_groups` makes them. The learning rate of that group is the first one,
            or its `initial_lr`, if another scheduler has begun to change it.
        model: The quantized model, its host, or latent weights.
        target: The first target rate, the share of all weights that change in a step.
        steps: All steps of the optimizer; the schedule ends there.
        schedule: `cosine`, `linear`, `step`, or a function from the share of training
            that is done, 0 to 1, to a factor of the target.
        warmup: Steps in which the target rises linearly.
        momentum: Of the running rate; None: 0.99, less in fewer than 10,000 steps.
        eta: How strongly the learning rate follows (the paper: as the first learning
            rate); None: by the rate that it brings, as `Controller` has it.
        enabled: Whether to control: else nothing of the training changes, scales of
            weights are trained as the toolkit has it, and rates are only measured.
        window: A weight oscillates that goes back within so many steps; 0: not watched.

    Attributes:
        seconds: What counting took so far.

    Raises:
        ModelError: The optimizer lacks latent weights, or mixes them with others.
        ConfigError: A setting is impossible.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | TrainableHost | Sequence[Latent],
        target: float = 5e-3,
        *,
        steps: int,
        schedule: str | Schedule = "cosine",
        warmup: int = 0,
        momentum: float | None = None,
        eta: float | None = None,
        enabled: bool = True,
        window: int = 0,
    ) -> None:
        check_settings(target, steps, warmup, momentum, eta, window)
        self._schedule = schedule_of(schedule)
        self.optimizer = optimizer
        self.enabled = enabled
        self._target, self._steps, self._warmup = target, steps, warmup
        shortest, longest = PATIENCE
        self._patience = min(longest, max(shortest, steps // 5))
        self._sampled = max(1, min(SAMPLED, steps // 20))
        self.last_epoch = 0
        self._stack = ExitStack()
        latents: Sequence[Latent]
        self._still: list[nn.Parameter] = []
        if isinstance(model, Sequence):
            latents = model
        else:
            host = hosted(model)
            self._still = awaited(host) if enabled else []
            latents = self._stack.enter_context(host.training(scales=not enabled))
            for scale in self._still:
                self._stack.callback(with_zeros(scale))
            if host is not model and "adapters" in host.roles.values():
                self._stack.callback(self._remind)
        with ExitStack() as failing:
            failing.callback(self.close)
            self._places = places_of(optimizer, latents, enabled)
            first = first_rate(self._groups, enabled)
            # From 0 an average would need many steps, in which learning rates shoot up.
            begun = self.target if enabled and eta is None else 0.0
            failing.pop_all()
        for group in self._groups if enabled else ():
            if isinstance(group["lr"], Tensor):  # All groups may hold the same one.
                group["lr"] = group["lr"].clone()
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        if momentum is None:
            momentum = momentum_for(steps)
        self._controller = Controller(momentum, first, eta)
        self._transitions = Transitions(latents, window)
        self._state = State(begun, first)
        self._stepped = False
        self._skipped = self._nonfinite = self._below = 0
        self._records: list[StepRecord] = []
        self._totals = [0] * len(latents)
        self.seconds = 0.0
        for handle in (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ):
            self._stack.callback(handle.remove)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        # By place, for an optimizer that loads a state makes new groups.
        return [self.optimizer.param_groups[place] for place in self._places]

    @property
    def target(self) -> float:
        """The target rate `R` of the next step."""
        return target_at(
            self.last_epoch, self._target, self._schedule, self._steps, self._warmup
        )

    @property
    def rate(self) -> float:
        """The running transition rate `K`."""
        return self._state.rate

    @property
    def lr(self) -> float:
        """The transition-adaptive learning rate `U`."""
        return self._state.lr

    @property
    def last(self) -> StepRecord | None:
        """What was measured at the last step."""
        return self._records[-1] if self._records else None

    def get_last_lr(self) -> list[float]:
        """The learning rate of every group of the optimizer."""
        return [
            self._state.lr
            if self.enabled and place in self._places
            else float(group["lr"])
            for place, group in enumerate(self.optimizer.param_groups)
        ]

    def step(self) -> None:
        """Count what the optimizer's step changed, and set the next learning rate."""
        if not self._stepped:
            self._skipped += 1
            return
        start = time.perf_counter()
        self._stepped = False
        target = self.target
        self.last_epoch += 1
        counts = self._transitions.count()
        self._totals = [a + b for a, b in zip(self._totals, counts, strict=True)]
        rate = self._overall(sum(counts))
        state = self._controller.step(self._state, rate, target)
        if not self.enabled:
            state = State(state.rate, float(self._groups[0]["lr"]))
        self._state = state
        self._note(target, rate)
        self._report_unreached(target)
        self._set_lr()
        self.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain values; weights and their codes are the model's."""
        return {
            "last_epoch": self.last_epoch,
            "rate": self._state.rate,
            "lr": self._state.lr,
            "first": self._controller.first,
            "skipped": self._skipped,
            "nonfinite": self._nonfinite,
            "below": self._below,
            "steps": self._transitions.steps,
            "totals": list(self._totals),
            "records": [vars(each).copy() for each in self._records],
            "past": self._transitions.past(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; load the model's and the optimizer's, too."""
        self.last_epoch = state["last_epoch"]
        self._state = State(state["rate"], state["lr"])
        self._controller = replace(self._controller, first=state["first"])
        self._skipped, self._nonfinite = state["skipped"], state["nonfinite"]
        self._below = state["below"]
        self._totals = list(state["totals"])
        self._records = [StepRecord(**each) for each in state["records"]]
        self._transitions.resume(state["steps"], state["past"])
        self._stepped = False
        self._set_lr()

    def transitions(self) -> Transitional:
        """What was measured so far."""
        counted = self._transitions
        near = counted.near()
        back = counted.oscillating() if counted.window else None
        layers = []
        for index, each in enumerate(counted.latents):
            size, total = counted.sizes[index], self._totals[index]
            layers.append(
                LayerRecord(
                    each.name,
                    size,
                    total,
                    total / size / max(1, counted.steps),
                    None if near is None else near[index] / size,
                    None if back is None else back[index] / size,
                )
            )
        return Transitional(
            tuple(self._records),
            tuple(layers),
            self._skipped,
            self._nonfinite,
            counted.window,
        )

    def close(self) -> None:
        """Give gradients of weights and scales back; count no more."""
        self._stack.close()

    def __enter__(self) -> "TransitionRateScheduler":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remind(self) -> None:
        """Say what a loop of one's own has to do; `finetune` does it."""
        if self.last_epoch:
            log.warning(
                "the model's adapters are stored as they were before training: call "
                "cora_plugin.qat.hosted(model, example).renew() before save_cora"
            )

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if not self._transitions.read:
            self._transitions.begin()
        if not self.enabled:
            return
        for scale in self._still:  # By zeros it would still decay.
            scale.grad = None
        # Whatever another scheduler has made of it since.
        self._set_lr()
        # A GradScaler that lets the optimizer skip has looked at gradients itself.
        if getattr(optimizer, "found_inf", None) is None and not finite(optimizer):
            self._nonfinite += 1
            log.warning(
                "a gradient is not finite: step %d is skipped (%d so far)",
                self.last_epoch + 1,
                self._nonfinite,
            )
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        found = getattr(optimizer, "found_inf", None)
        if found is not None and bool(found):
            return
        made = any(p.grad is not None for g in self._groups for p in g["params"])
        self._stepped = self._stepped or made

    def _set_lr(self) -> None:
        if not self.enabled:
            return
        for group in self._groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self._state.lr)
            else:
                group["lr"] = self._state.lr

    def _overall(self, changed: int) -> float:
        """The rate of this step (eq. 5), over the weights of all processes."""
        counts = changed, sum(self._transitions.sizes)
        changed_in_all, weights = add_up("transitions", (), counts)
        return changed_in_all / weights

    def _note(self, target: float, rate: float) -> None:
        shares: dict[str, float] = {}
        if self._transitions.window and self._transitions.steps % self._sampled == 0:
            weights = sum(self._transitions.sizes)
            near = self._transitions.near()
            if near is not None:
                shares["near"] = sum(near) / weights
            shares["oscillating"] = sum(self._transitions.oscillating()) / weights
        self._records.append(
            StepRecord(
                self.last_epoch,
                target if self.enabled else None,
                rate,
                self._state.rate,
                self._state.lr,
                **shares,
            )
        )

    def _report_unreached(self, target: float) -> None:
        self._below = self._below + 1 if self._state.rate < target / 2 else 0
        if self._below == self._patience and self.enabled:
            log.warning(
                "the transition rate is %.2g, less than half of its target %.2g for %d "
                "steps now: it cannot be reached; lower target, or raise the first "
                "learning rate (%.2g)%s",
                self._state.rate,
                target,
                self._patience,
                self._controller.first,
                "" if self._controller.eta is None else ", or eta",
            )
