"""Judges every step on images that no step is fitted to, and undoes what does harm."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import ConfigError
from cora_plugin.adapters.exact import exact
from cora_plugin.batches import Units
from cora_plugin.host import Host
from cora_plugin.layer import Correction
from cora_plugin.objective import Distance, Objective, Sums, standard_error
from cora_plugin.outputs import Batch
from cora_plugin.progress import bar
from cora_plugin.reference import References
from cora_plugin.teacher import Teacher

log = logging.getLogger(__name__)

CLEAR = 2.0
"""A difference of so many standard errors is beyond what chance explains."""


@dataclass(frozen=True)
class Step:
    """A step that was judged, and whether it was kept.

    `before` and `after` are distances on the held-out images. `difference` is how much
    the distance grew, below 0 where the step helped: the mean over all `images` that
    judged, further ones included where the held-out ones were not clear. `error` is its
    standard error, from the differences image by image; None where it is not known.
    `metric` is the user's own measure before and after, where there is one and the
    distance speaks for the step.
    """

    name: str
    before: Distance
    after: Distance
    kept: bool
    difference: float
    error: float | None
    images: int
    metric: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        before: Distance,
        after: Distance,
        pairs: Tensor,
        doubt: float = 0.0,
        least: float = 0.0,
    ) -> "Step":
        """Judge a step by its differences image by image.

        Between two states of one model they vary far less than distances do.

        Args:
            name: What the report calls it.
            before: The distance on the held-out images without the step.
            after: With it.
            pairs: How much the distance of each image grew, [N].
            doubt: By how many standard errors it may seem worse and still be kept. A
                step that is right by construction has the benefit of the doubt; one
                below 0 must be better by so many.
            least: The share of the distance that it must take away, too.
        """
        error = standard_error(pairs)
        difference = float(pairs.mean())
        if not torch.isfinite(pairs).all():
            difference = after.value - before.value
            difference = difference if difference == difference else 0.0  # inf - inf
        limit = doubt * (error or 0.0)
        if least:  # Not 0 times an infinite distance.
            limit -= least * before.value
        kept = difference <= limit if doubt > 0 else difference < limit
        return cls(name, before, after, kept, difference, error, len(pairs))

    @property
    def change(self) -> str:
        """The difference with its error, as reports show it."""
        text = f"{self.difference:+.2g}"
        return text if self.error is None else f"{text} ± {self.error:.1g}"

    @property
    def against(self) -> str:
        """What speaks against the step."""
        here = f"{self.change} on {self.images} images"
        if self.metric is None:
            return (
                f"it took the model from {self.before} to {self.after} away from the "
                f"float one ({here})"
            )
        was, now = self.metric
        return (
            f"what judges beside the distance went from {was:.4g} to {now:.4g}, while "
            f"{self.before} became {self.after} ({here})"
        )

    def measured(self, before: Tensor, after: Tensor, strict: bool) -> "Step":
        """The same, undone where another measure falls.

        Args:
            before: It without the step, a number [1] or image by image [N].
            after: With it.
            strict: Whether it has to rise, by more than chance explains.
        """
        rise = after - before
        limit = CLEAR * (standard_error(rise) or 0.0) if strict else 0.0
        mean = float(rise.mean())
        kept = self.kept and (mean > limit or (mean == 0 and not strict))
        return replace(
            self, kept=kept, metric=(float(before.mean()), float(after.mean()))
        )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Distances on held-out images, `held_out` of them: before, after, by step.

    `activations` is the distance with float weights and quantized activations: what
    adapters that restore weights, and nothing else, can reach.
    """

    before: Distance
    after: Distance
    activations: Distance
    steps: tuple[Step, ...]
    held_out: int


class Jury:
    """Images that judge a model beside its float outputs for them.

    One batch is judged after another, so that memory does not grow with their number:
    of dense outputs few are kept, the rest is computed anew, a float pass each time.

    Of several processes each judges its share of the batches; the verdict is on all.

    `images` is the number of all.

    Args:
        host: The prepared host.
        batches: The images, in batches, the same in all processes.
        objective: What "near to the float model" means.
        teacher: As for `References`.
    """

    def __init__(
        self,
        host: Host,
        batches: Sequence[Batch],
        objective: Objective,
        teacher: Teacher | None = None,
    ) -> None:
        self._host = host
        self.images = Units(batches).rows
        self._units = Units(processes.mine(batches), join=False)
        self._references = References(host, self._units, teacher)
        self._objective = objective

    @torch.no_grad()
    def __call__(
        self, acting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> tuple[Distance, Tensor]:
        """The model's distance, and that of each image [N].

        Args:
            acting: Makes the scope that the model runs in.
        """
        sums = Sums(self._objective)
        once = self._references.ready(range(len(self._units)))
        with acting() if once else nullcontext():
            batches = bar(self._units, "judging", "batch", brief=True)
            for index, batch in enumerate(batches):
                reference = self._references([index])
                with nullcontext() if once else acting():
                    outputs = self._host.run(batch)
                sums.add(reference, outputs)
        sums.pool()
        return sums.distance, sums.distances


class Guard:
    """Tries corrections on a model and keeps those that bring it nearer to float.

    `now` is the model's distance, `before` what it was without a correction, `kept` the
    present correction, and `steps` what was tried.

    Args:
        host: The prepared host.
        held_out: Images that judge, in batches.
        objective: What "near to the float model" means.
        reserve: Further ones, run only where the held-out ones leave a step in doubt.
        metric: Measures the model as it is, more is better: a number, or whether it is
            right, image by image [N]; a step must not lower it.
        strict: Whether a step must raise it by more than chance explains, for the
            distance itself is in doubt.
        teacher: As for `References`. To its outputs no step is right by construction,
            so none has the benefit of the doubt.
    """

    def __init__(
        self,
        host: Host,
        held_out: Sequence[Batch],
        objective: Objective,
        reserve: Sequence[Batch] = (),
        metric: Callable[[], float | Tensor] | None = None,
        strict: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        self._strict = strict
        self._host = host
        self.teacher = teacher
        self._jury = Jury(host, held_out, objective, teacher)
        self._reserve = None
        if reserve:
            self._reserve = Jury(host, reserve, objective, teacher)
        self.before, self._each = self._jury()
        self._reserve_each: Tensor | None = None
        self._metric = metric
        self._measured = None if metric is None else _values(metric())
        self.now = self.before
        self.kept = Correction()
        self.steps: list[Step] = []

    @property
    def images(self) -> int:
        """How many images are held out."""
        return self._jury.images

    def trial(
        self,
        weights: Mapping[str, Tensor],
        shifts: Mapping[str, Tensor] | None = None,
    ) -> Distance:
        """The distance with other weights and shifts, which do not stay."""
        distance, _ = self._jury(lambda: self._host.acting(weights, shifts))
        return distance

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the model carries no correction; after an error it is left so."""
        self._host.correct(Correction())
        yield
        self._host.correct(self.kept)

    def step(
        self,
        name: str,
        correction: Correction,
        doubt: float = 0.0,
        least: float = 0.0,
    ) -> bool:
        """Replace the present correction, if the new one is better.

        Args:
            name: What the report calls it.
            correction: The whole correction, with what is kept of those before.
            doubt: As for `Step.of`.
            least: Likewise.

        Returns:
            Whether it was kept. If anything fails, the model carries no correction.
        """
        host = self._host
        if self.teacher is not None:
            doubt = min(doubt, 0.0)
        processes.from_first(f"step {name!r}", correction.tensors)
        try:
            host.correct(correction)
            after, each = self._jury()
            pairs, more = each - self._each, None
            if self._reserve is not None and _in_doubt(pairs, doubt):
                _, more = self._reserve()
                pairs = torch.cat([pairs, more - self._kept_on(self._reserve)])
                host.correct(correction)
            step, measured = Step.of(name, self.now, after, pairs, doubt, least), None
            if step.kept and self._metric is not None and self._measured is not None:
                measured = _values(self._metric())
                step = step.measured(self._measured, measured, self._strict)
            if not step.kept:
                host.correct(self.kept)
        except BaseException:
            host.correct(Correction())
            raise
        self.steps.append(step)
        if step.kept:
            self.kept, self.now = correction, after
            self._measured = self._measured if measured is None else measured
            self._each, self._reserve_each = each, more
        else:
            # Of several tries most are taken back: that is no news.
            level = logging.WARNING if doubt > 0 else logging.INFO
            log.log(level, "%s: taken back, for %s", name, step.against)
        return step.kept

    def _kept_on(self, reserve: Jury) -> Tensor:
        """Each reserve image's distance with the kept correction, which is put in."""
        if self._reserve_each is None:
            self._host.correct(self.kept)
            _, self._reserve_each = reserve()
        return self._reserve_each

    def judged(self, activations: Distance) -> Judged:
        """The findings; `activations` as in `Judged`."""
        return Judged(
            before=self.before,
            after=self.now,
            activations=activations,
            steps=tuple(self.steps),
            held_out=self.images,
        )


def _values(measured: float | Tensor) -> Tensor:
    """What a metric gave, [1], or whether each image of all processes is right, [N].

    A number is that of several processes on average.

    Raises:
        ConfigError: It is no finite number.
    """
    if isinstance(measured, Tensor) and measured.dtype is torch.bool:
        return exact(measured)
    try:
        value = float(measured)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            ("metric_fn",),
            f"the function gave {measured!r}; return a finite number, higher where the "
            "model is better",
        )
    (total,) = processes.add_up("metric", (), [value])
    return torch.tensor([total / processes.count()], dtype=torch.float64)


def _in_doubt(pairs: Tensor, doubt: float) -> bool:
    """Whether further images might turn the verdict on differences [N].

    So they might where the mean is within what chance explains, and on the side that
    speaks for the verdict that chance is more likely to have made: worse for a step
    that has the benefit of the doubt, better for one that has to prove itself.
    """
    error, mean = standard_error(pairs), float(pairs.mean())
    if error is None or abs(mean) >= CLEAR * error:
        return False
    return mean > 0 if doubt > 0 else mean < 0
