"""The algorithm: layers → statistics → residuals → plan → guarded steps → report."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from cora_plugin.adapters.errors import (
    BudgetError,
    ConfigError,
    CoRaError,
    DataError,
    ModelError,
)
from cora_plugin.adapters.operation import first_nonfinite
from cora_plugin.batches import tensors
from cora_plugin.budget import added
from cora_plugin.config import AnyConfig, Budget, CoRaConfig
from cora_plugin.guard import Guard, Judged
from cora_plugin.host import LEFT_FLOAT, Host
from cora_plugin.items import Reader, check_loader, not_running
from cora_plugin.labels import Labelled
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.objective import Choice, Distance, Objective, decide_on
from cora_plugin.outputs import Batch
from cora_plugin.plan import Plan, Planner, merged_weights, pinned_ranks
from cora_plugin.processes import agreeing
from cora_plugin.progress import bar
from cora_plugin.report import Effort, Report, Spent, Stopwatch, Stored, SweepPoint
from cora_plugin.residuals import Residuals
from cora_plugin.search import Network
from cora_plugin.statistics import Collector
from cora_plugin.steps import ACTIONS, Context, note_rounding, take
from cora_plugin.target import Measure, choose
from cora_plugin.teacher import Teacher, check_taught

log = logging.getLogger(__name__)


_TAUGHT = "distances are those from the teacher, not from the float weights"


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leave `torch.inference_mode` and autocast.

    The tensors of the one neither have gradients nor change, and the other would round
    the statistics.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Planned(Protocol):
    """Adapters that were chosen before the model was quantized."""

    @property
    def collected(self) -> Collector | None:
        """The statistics, if the same data has been gathered for the choice."""

    def for_layers(self, layers: Sequence[QuantizedLayer]) -> Plan:
        """The plan for a quantized model.

        Raises:
            ConfigError: It is for another model.
        """

    def to_dict(self) -> dict[str, Any]:
        """How it was made, in plain values for the report."""


class CoRa:
    """The algorithm that every host registers: residual adapters after PTQ.

    Args:
        config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
        objective: What "near to the float model" means; None: as the config says.
    """

    def __init__(
        self, config: AnyConfig = None, objective: Objective | None = None
    ) -> None:
        self.config = CoRaConfig.of(config)
        self.objective = objective

    def apply(
        self,
        host: Host,
        loader: Iterable[Any],
        plan: Planned | None = None,
        unpack: Callable[[Any], Any] | None = None,
        metric: Callable[[], float] | None = None,
        teacher: Teacher | None = None,
    ) -> Report:
        """Give a quantized model its adapters; if anything fails, it is left unchanged.

        Args:
            host: The model inside its toolkit.
            loader: Calibration batches, walked once: images [N, …], `(images, …)`, or
                whatever else the model takes (see `cora_plugin.items.Reader`).
            plan: Adapters that were chosen with the bit widths of the model (see
                `cora_plugin.widths`), in place of a choice by the budget.
            unpack: From an item of the loader to the model's arguments, a tensor, a
                tuple or a mapping, where that is not clear.
            metric: Measures the model as it is, higher where it is better: a step that
                lowers it is undone.
            teacher: Gives the outputs that are to be reached, where they are not those
                of the float weights.

        Raises:
            CoRaError: Something that the caller can change is wrong.
        """
        check_loader(loader)
        with ordinary_tensors(), host.prepared(), agreeing():
            run = self.start(host, plan, unpack, metric, teacher)
            for item in bar(loader, "moments", "batch"):
                run.update(item)
            return run.finish()

    def start(
        self,
        host: Host,
        plan: Planned | None = None,
        unpack: Callable[[Any], Any] | None = None,
        metric: Callable[[], float] | None = None,
        teacher: Teacher | None = None,
    ) -> "Run":
        """Begin on a prepared host; then call `update` by batch, and `finish`."""
        return Run(self.config, host, self.objective, plan, unpack, metric, teacher)


class Run:
    """One application to one model: `update` with every batch, then `finish`."""

    def __init__(
        self,
        config: CoRaConfig,
        host: Host,
        objective: Objective | None,
        plan: Planned | None = None,
        unpack: Callable[[Any], Any] | None = None,
        metric: Callable[[], float] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        if plan is not None and not hasattr(plan, "for_layers"):
            raise ConfigError(
                ("plan",),
                f"a {type(plan).__name__} is no plan; pass what plan_bits returned",
            )
        if config.widths and plan is None:
            raise ConfigError(
                ("menu",),
                "bit widths are chosen before adapters: call the host's apply_cora, "
                "which does both, or quantize at the layer_bits of plan_bits, and pass "
                "plan=",
            )
        self.config = config
        self._planned = plan
        self._given = objective
        self._host = host
        self._watch = Stopwatch()
        with self._watch("layers"):
            self._layers = checked_layers(host)
            pinned = {} if plan is not None else config.ranks
            self._pinned = pinned_ranks(pinned, self._layers)
        self._targets = [e for e in self._layers if self._pinned.get(e.name) != 0]
        if not self._targets:
            raise ConfigError(
                ("ranks",),
                "every layer is pinned to rank 0, so there is nothing to do; leave the "
                "plugin off, or leave some layer free",
            )
        kept = None if plan is None else plan.collected
        if kept is None:
            self._collector = Collector(host, self._targets, config)
        else:
            self._collector = kept.again(host, self._targets)
        self._metric = metric
        self._teacher = teacher
        self._labelled = Labelled(host)
        self._reader = Reader.of(host.run, unpack)
        self._types: list[torch.dtype] = []
        self.items = 0
        """How many batches were added."""

    def update(self, item: Any) -> None:
        """Add what a loader yields."""
        with self._watch("statistics"), ordinary_tensors():
            batch = self._reader(item)
            self._labelled.add(item, batch)
            self._collect(batch)

    def add(self, batch: Batch) -> None:
        """Add a batch of the model's own arguments."""
        with self._watch("statistics"), ordinary_tensors():
            self._collect(batch)

    def _collect(self, batch: Batch) -> None:
        """Gather a batch's statistics.

        Raises:
            DataError: The model does not run with it.
        """
        if self._collector.finished:
            self.items += 1
            return
        types = [each.dtype for each in tensors(batch)]
        self._types = self._types or types
        if types != self._types:
            raise DataError(
                f"calibration data: item {self.items} is of {types}, and those before "
                f"it of {self._types}; the model does not run with both"
            )
        try:
            self._collector.update(batch)
        except CoRaError:
            raise
        except Exception as error:
            raise not_running(self.items, batch, error) from error
        self.items += 1

    def finish(self) -> Report:
        """Choose and insert adapters, undo steps that do not help, and report.

        If anything fails, the model is left unchanged.
        """
        watch, config, host = self._watch, self.config, self._host
        split = self._collector.split
        with watch("guard"):
            self._collector.close()
            choice = self._choice()
            objective = choice.objective
        with watch("statistics"):
            statistics = self._collector.finish(objective)
            unused = self._collector.unused
            targets = [e for e in self._targets if e.name not in unused]
            if not targets:
                raise DataError(
                    "calibration data: no layer that can carry an adapter takes part "
                    f"in what is measured ({'; '.join(map(': '.join, unused.items()))})"
                    "; calibrate with data that uses them, or name other outputs"
                )
            pinned = {n: r for n, r in self._pinned.items() if n not in unused}
        with watch("guard"):
            # Where there is a teacher, nobody asks the float weights.
            taught = self._teacher is not None
            metric: Callable[[], float | Tensor] | None = self._metric
            doubt = None if taught else self._labelled.doubt
            if doubt is not None:
                log.warning("%s", doubt)
            strict = doubt is not None and metric is None
            metric = self._labelled.right if strict else metric
            judges = split.held_out(), objective, split.reserve()
            guard = Guard(host, *judges, metric, strict, self._teacher)
            activations = guard.trial({e.name: e.weight for e in self._layers})
        residuals = Residuals(config, targets, statistics)
        network = Network(
            host,
            targets,
            pinned,
            lambda layer: residuals.factors[layer.name],
            split.sampled(config.butterworth.images),
            objective,
            self._teacher,
        )
        planner = Planner(config, self._layers, residuals, pinned, network)
        sweep: list[SweepPoint] = []

        def measure(budget: Budget, plan: Plan) -> Distance:
            adapters = residuals.adapters(plan.treatments, network.trained)
            distance = guard.trial(merged_weights(targets, adapters))
            stored = Stored.of(self._layers, adapters.values())
            bits, parameters = stored.equivalent_bits, stored.adapter_parameters
            sweep.append(SweepPoint(str(budget), bits, parameters, distance))
            return distance

        with watch("search"):
            plan = self._plan(planner, guard, measure)
        context = Context(
            config,
            objective,
            host,
            self._collector,
            residuals,
            network,
            plan,
            guard,
            watch,
        )
        try:
            take(ACTIONS, context)
            note_rounding(context)
            notes = (
                *self._reader.notes,
                *choice.notes,
                *self._collector.notes,
                *([doubt] if doubt else []),
                *([_TAUGHT] if taught else []),
            )
            return self._report(context, guard.judged(activations), sweep, notes)
        except BaseException:
            host.correct(Correction())
            raise

    def _report(
        self,
        context: Context,
        judged: Judged,
        sweep: Sequence[SweepPoint],
        notes: tuple[str, ...],
    ) -> Report:
        adapters, plan = context.guard.kept.adapters, context.plan
        residuals, network = context.residuals, context.network
        split, watch = self._collector.split, self._watch
        with watch("report"):
            rows = tuple(
                residuals.row(layer, adapters.get(layer.name))
                for layer in context.layers
            )
        alone = {n: "rank 0 was asked for" for n, r in self._pinned.items() if not r}
        fitted = context.fitted
        return Report.from_parts(
            self.config.to_dict(),
            rows,
            {**self._host.skipped, **alone, **self._collector.unused},
            None if self._planned is None else self._planned.to_dict(),
            notes,
            judged,
            Stored.of(self._layers, adapters.values()),
            Spent(
                budget_used=plan.used if adapters else 0,
                budget_allowed=plan.allowed,
                budget_unit=plan.unit,
                sweep=tuple(sweep),
            ),
            Effort(
                images=split.images,
                search_iterations=network.iterations,
                search_images=len(network.used_images),
                fit_iterations=fitted.iterations if fitted else 0,
                fit_images=fitted.images if fitted else 0,
                seconds=watch.seconds,
            ),
        )

    def _choice(self) -> Choice:
        """What is measured, by the outputs for the first held-out batch."""
        batch = self._collector.split.held_out()[0]
        outputs = None
        if self._teacher is not None:
            outputs = self._teacher(batch)
            with torch.no_grad():
                check_taught(outputs, self._host.run(batch))
        if self._given is not None:
            return Choice(self._given)
        channels = self._collector.last_channels
        return decide_on(self._host, self.config, batch, channels, outputs)

    def _plan(self, planner: Planner, guard: Guard, measure: Measure) -> Plan:
        if self._planned is not None:
            return self._planned.for_layers(self._layers)
        config, budget = self.config, self.config.budget
        if budget.is_total and config.search != "series":
            rest = added(budget, self._layers)
            if rest is None:
                for name in (name for name, rank in self._pinned.items() if rank):
                    raise BudgetError(
                        f"budget: {budget} leaves nothing for the rank that {name} is "
                        "pinned to; raise the budget or lower the rank"
                    )
                return planner.nothing()
            budget = rest
        return choose(planner, budget, config.sweep, guard.before, measure)


def checked_layers(host: Host) -> Sequence[QuantizedLayer]:
    """The host's layers, which must exist and be finite."""
    layers = host.layers
    if not layers:
        reasons = "; ".join(
            f"{name}: {why}" for name, why in host.skipped.items() if why != LEFT_FLOAT
        )
        raise ModelError(
            "the model has no quantized layer that can carry an adapter "
            f"({reasons or 'nothing in it is quantized'}); quantize it with the "
            "toolkit first, and pass the quantized model"
        )
    for layer in layers:
        for what, weight in (
            ("float", layer.weight),
            ("quantized", layer.dequantized),
        ):
            found = first_nonfinite(weight)
            if found is not None:
                raise ModelError(
                    f"{layer.name}: its {what} weight holds {found}; mend the model "
                    "before it is quantized"
                )
    return layers
