"""The steps that bring a model nearer to its float original, each guarded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cora_plugin.config import CoRaConfig
from cora_plugin.fitting import (
    LAST,
    Distillation,
    Fitted,
    Regression,
    Walk,
    alternate,
    cascaded_shifts,
    own_shifts,
    rounding_shift,
)
from cora_plugin.guard import Guard
from cora_plugin.host import Host, MovesBiases
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.plan import Plan, merged_weights
from cora_plugin.progress import bar
from cora_plugin.report import Stopwatch
from cora_plugin.residuals import Residuals
from cora_plugin.search import Network
from cora_plugin.statistics import Collector

LITTLE = 0.05
"""The part of rejected adapters that a teacher's training begins with."""

LARGE = 0.2
"""A gain on held-out images that images of another kind were seen to share."""


@dataclass
class Context:
    """Everything that steps read and write; `guard.kept` is the present correction.

    `tried` is the last correction with new adapters that was proposed, kept or not, and
    `stood` has the names of the steps that were kept. `regression` is what can be
    solved again, and `fitted` the refinement's result.
    """

    config: CoRaConfig
    objective: Objective
    host: Host
    collector: Collector
    residuals: Residuals
    network: Network
    plan: Plan
    guard: Guard
    watch: Stopwatch
    tried: Correction = field(default_factory=Correction)
    stood: set[str] = field(default_factory=set)
    regression: Regression | None = None
    fitted: Fitted | None = None

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers, with their present main weights."""
        others = self.guard.kept.dequantized
        return [
            replace(layer, dequantized=others[layer.name])
            if layer.name in others
            else layer
            for layer in self.residuals.layers
        ]

    def walk(self) -> Walk:
        """The float network's run over a few images, for steps that go layer by layer.

        The model must carry no correction.
        """
        split = self.collector.split
        return Walk.sampled(self.host, self.layers, split, self.config)


@dataclass(frozen=True)
class Action:
    """One step.

    `propose` returns the whole new correction, with what it keeps of the present one,
    or None where there is nothing to do; `stage` names its time in the report. By
    `doubt` standard errors it may seem worse and still be kept, and it must take away
    the share `least` of the distance (see `Step.of`).
    """

    name: str
    stage: str
    propose: Callable[[Context], Correction | None]
    doubt: float = 0.0
    least: float = 0.0


def take(actions: Sequence[Action], context: Context) -> None:
    """Take steps in order; those that do not help are undone."""
    for action in bar(actions, "steps", "step", brief=True):
        with context.watch(action.stage):
            correction = action.propose(context)
        if correction is None:
            continue
        with context.watch("insert"):
            limits = action.doubt, action.least
            if context.guard.step(action.name, correction, *limits):
                context.stood.add(action.name)


def note_rounding(context: Context) -> None:
    """Store with each adapter what exports for int8 kernels need to undo rounding.

    The model computes what it computed before.
    """
    guard, means = context.guard, context.collector.means()
    layers = {layer.name: layer for layer in context.layers}
    adapters = {}
    for name, adapter in guard.kept.adapters.items():
        shift = rounding_shift(layers[name], adapter, means[name])
        adapters[name] = replace(adapter, rounding_shift=shift)
    if adapters:
        guard.kept = replace(guard.kept, adapters=adapters)
        context.host.correct(guard.kept)


def _closed_form(context: Context) -> Correction:
    plan, trained = context.plan, context.network.trained
    context.tried = Correction(context.residuals.adapters(plan.treatments, trained))
    return context.tried


def _alternation(context: Context) -> Correction | None:
    config, guard, residuals = context.config, context.guard, context.residuals
    if not config.alternations or "adapters" not in context.stood:
        return None
    with guard.aside():
        found = alternate(
            context.host,
            residuals.layers,
            guard.kept.adapters,
            {layer.name: residuals.metric(layer) for layer in residuals.layers},
            config.alternations,
        )
    return replace(
        guard.kept,
        adapters=found.adapters,
        weights=found.weights,
        dequantized=found.dequantized,
    )


def _regression(context: Context) -> Correction | None:
    forms = {name: e.forms for name, e in context.plan.treatments.items() if e.forms}
    if not context.config.regression or not forms:
        return None
    with context.guard.aside():
        regression = Regression(
            context.walk(), forms, context.residuals.sensitivities, context.config
        )
        adapters, shifts = regression()
    context.regression = regression
    context.tried = replace(
        context.guard.kept,
        adapters=adapters,
        shifts=shifts,
        float_biases=_biases_moved(context.host),
    )
    return context.tried


def _whole_means(last: int) -> Callable[[Context], Correction | None]:
    """The regression with the means of the last layers restored to full size.

    Where that helps depends on what is behind them, and no rule is known: on networks
    alike it took away two fifths of the distance, and doubled it. So it is tried. It
    fits means to what the calibration images show, held-out ones among them; small
    gains there were losses on other images, so a gain must be large.
    """

    def propose(context: Context) -> Correction | None:
        regression = context.regression
        if regression is None or "regression" not in context.stood:
            return None
        if last > regression.visited:
            return None
        with context.guard.aside():
            adapters, shifts = regression.with_whole_means(last)
        return replace(context.guard.kept, adapters=adapters, shifts=shifts)

    return propose


def _share(share: float) -> Callable[[Context], Correction | None]:
    """A part of the last adapters tried, where none stand as a whole.

    Weights that GPFQ or Qronos rounded make up for the error of the layers before;
    where adapters take only a part of that error away, the rest no longer cancels.
    """

    def propose(context: Context) -> Correction | None:
        if {"adapters", "regression"} & context.stood:
            return None
        return context.tried.scaled(share)

    return propose


def _regression_share(share: float) -> Callable[[Context], Correction | None]:
    def propose(context: Context) -> Correction | None:
        return _share(share)(context) if context.regression is not None else None

    return propose


def _float_biases(context: Context) -> Correction | None:
    kept = context.guard.kept
    if not _biases_moved(context.host) or kept.float_biases:
        return None
    return replace(kept, float_biases=True)


def _bias_correction(context: Context) -> Correction | None:
    config, kept, layers = context.config, context.guard.kept, context.layers
    if config.bias_correction == "off":
        return None
    if config.bias_correction == "own":
        shifts = own_shifts(layers, kept.adapters, context.collector.means())
    else:
        with context.guard.aside():
            shifts = cascaded_shifts(
                context.walk(), merged_weights(layers, kept.adapters)
            )
    return replace(kept, shifts=shifts)


def _biases_alone(context: Context) -> Correction | None:
    """A bias correction and no adapters: free, so adapters must be better than it."""
    if context.config.bias_correction == "off" or not context.guard.kept.adapters:
        return None
    shifts = own_shifts(context.residuals.layers, {}, context.collector.means())
    return Correction(shifts=shifts, float_biases=_biases_moved(context.host))


def _refinement(context: Context) -> Correction | None:
    config, guard = context.config, context.guard
    if not config.refine.iterations:
        return None
    with guard.aside():
        fit = Distillation(
            config.refine,
            config.seed,
            context.host,
            context.layers,
            context.collector.split.sampled(config.refine.images),
            context.objective,
            guard.trial,
            guard.teacher,
        )
        context.fitted = fit(_start(context))
    return context.fitted.correction


def _start(context: Context) -> Correction:
    """What refinement begins with.

    What the float weights say may lead away from a teacher, so that no adapter stands;
    in its direction they are then begun with, small, and trained to the teacher.
    """
    guard = context.guard
    if guard.teacher is None or guard.kept.adapters:
        return guard.kept
    return replace(guard.kept, adapters=context.tried.scaled(LITTLE).adapters)


def _biases_moved(host: Host) -> bool:
    return isinstance(host, MovesBiases) and host.biases_moved


ACTIONS = (
    Action("adapters", "factors", _closed_form, doubt=1),
    Action("alternation", "alternation", _alternation),
    Action("adapters × 0.5", "insert", _share(0.5)),
    Action("adapters × 0.25", "insert", _share(0.25)),
    Action("float biases", "insert", _float_biases),
    Action("bias correction", "bias correction", _bias_correction),
    Action("regression", "regression", _regression, doubt=1),
    Action("regression × 0.5", "insert", _regression_share(0.5)),
    Action("regression × 0.25", "insert", _regression_share(0.25)),
    *(
        Action(
            f"whole means, last {last}",
            "regression",
            _whole_means(last),
            doubt=-1,
            least=LARGE,
        )
        for last in range(1, LAST + 1)
    ),
    Action("biases alone", "bias correction", _biases_alone, doubt=-1),
    Action("refinement", "refinement", _refinement),
)
"""The steps in their order; each is compared with the best of those before it.

Closed forms minimize the error by construction, so they have the benefit of the doubt;
what is one of several tries, or takes adapters away, has to prove itself.
"""
