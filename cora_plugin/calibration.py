"""Splits calibration data into a calibration set and a held-out set."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import DataError
from cora_plugin.batches import Units, copied, joined, pick, samples, tensors
from cora_plugin.outputs import Batch, Outputs, moved

log = logging.getLogger(__name__)

GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio's fraction."""

ROOM = 2**28
"""Bytes of outputs that images which run at once may have together."""

ALIKE = 0.02
"""How far outputs may move, relative to their size, when a row runs beside others."""


ELSEWHERE: Batch = ()
"""Stands for a piece that another process has."""


class Reservoir:
    """A sample of pieces that stream by, drawn uniformly (reservoir sampling).

    Which are kept depends on their number alone. So processes that are offered the
    pieces of all, with `ELSEWHERE` for those of others, draw one sample together.

    Args:
        size: How many pieces are kept.
        seed: Seeds the sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = torch.Generator().manual_seed(seed)
        self._offered = 0
        self.units: list[Batch] = []

    def offer(self, unit: Batch) -> Batch | None:
        """Take a piece or not; returns the one that is not, or no longer, kept."""
        self._offered += 1
        if len(self.units) < self._size:
            self.units.append(unit)
            return None
        slot = int(torch.randint(self._offered, (), generator=self._random))
        if slot < self._size:
            self.units[slot], unit = unit, self.units[slot]
        return unit

    def pool(self, device: torch.device) -> None:
        """Have the pieces of other processes, too, in one order."""
        if processes.count() == 1:
            return
        cpu = torch.device("cpu")
        held = [
            (slot, moved(unit, cpu))
            for slot, unit in enumerate(self.units)
            if unit is not ELSEWHERE
        ]
        # Of shares of unlike size, two may have a piece for one place.
        everyone = [
            each for part in processes.gathered("kept images", held) for each in part
        ]
        everyone.sort(key=lambda each: each[0])
        self.units = [moved(unit, device) for _, unit in everyone[: self._size]]


class ImageSplit:
    """Splits images as they stream by; keeps those held out and a sample of the rest.

    Each image is seen once, so the loader may shuffle or be a generator. Held-out
    images never calibrate; the sample is drawn uniformly from those that do, and the
    reserve from those that the sample does not hold. The same seed gives the same split
    and the same samples.

    Where the model is bound to the batches that the loader makes, as with a batch size
    in a reshape or clips folded into the batch, batches stay whole: `learn` finds out.

    Of several processes each is shown its share. Image n of process r is image
    n · processes + r of all, as `torch.utils.data.DistributedSampler` deals them out,
    so that all together hold out and sample what one process would. `close` hands the
    images that are kept to all of them.

    Args:
        held_out: Share of the images that is held out, spread evenly.
        sample_size: Number of images in the sample.
        seed: Seeds the samples, and decides which images are held out.
        reserve_size: Number of images in reserve.
        most: Held-out images that are kept at most, a sample of them.
    """

    def __init__(
        self,
        held_out: float,
        sample_size: int,
        seed: int,
        reserve_size: int = 0,
        most: int = 512,
    ) -> None:
        self._share = held_out
        self._seed = seed
        self._sizes = sample_size, reserve_size, most
        # The golden ratio's multiples spread evenly: each seed holds out others.
        self._phase = seed * GOLDEN % 1
        self._pools: tuple[Reservoir, Reservoir, Reservoir] | None = None
        self._seen = 0
        self._batch = 1
        self._row = 1
        self._device = torch.device("cpu")
        self._closed = False
        self.whole = False
        self.join = True
        self.images = 0

    def learn(self, run: Callable[[Batch], Outputs], batch: Batch) -> None:
        """See by its outputs whether a model may run other batches than the loader's.

        Args:
            run: Runs the float model.
            batch: The first batch.
        """
        count = samples(batch)
        outputs = run(batch)
        total = sum(v.numel() * v.element_size() for v in outputs.values())
        self._row = max(total // count, 1)
        # A few rows show it as well as many, and take less time.
        few = range(0, count, 2)[:2]
        own = all(v.ndim and len(v) == count for v in outputs.values())
        part = {n: v[::2][:2] for n, v in outputs.items()} if own else {}
        apart = own and (count == 1 or _gives(run, pick(batch, few), part))
        more, added = (pick(batch, few), part) if apart else (batch, outputs)
        both = {
            n: torch.cat([v, added[n]]) if v.ndim else v for n, v in outputs.items()
        }
        self.join = _gives(run, joined([batch, more]), both)
        self.whole = not (apart and self.join)
        found = processes.gathered("batches", (self.whole, self.join, self._row))
        self.whole = any(whole for whole, _, _ in found)
        self.join = all(join for _, join, _ in found)
        self._row = max(row for _, _, row in found)
        if self.whole:
            # The first batch is held out, so that two batches are enough.
            self._phase = (self._phase + 1 - self._share / 2) % 1

    def again(self) -> "ImageSplit":
        """One that splits the same data alike, and keeps nothing."""
        _, _, most = self._sizes
        other = ImageSplit(self._share, 0, self._seed, 0, most)
        other._phase = self._phase
        other.whole, other.join, other._row = self.whole, self.join, self._row
        return other

    def keep(self, batch: Batch) -> Batch | None:
        """Split a batch; return what calibrates of it, None where nothing does."""
        count, all_of = samples(batch), processes.count()
        self._batch = max(self._batch, count)
        self._device = next(tensors(batch)).device
        units = 1 if self.whole else count
        if self._pools is None:
            rows = max(count, 1) if self.whole else 1
            sizes = [-(-size // rows) for size in self._sizes]
            seeds = self._seed, self._seed, self._seed
            made = [Reservoir(*each) for each in zip(sizes, seeds, strict=True)]
            self._pools = made[0], made[1], made[2]
        sample, reserve, held_out = self._pools
        start = self._seen * all_of
        counts = torch.arange(start, start + units * all_of + 1) * self._share
        counts = counts + self._phase
        everywhere = (counts[1:].floor() > counts[:-1].floor()).tolist()
        self._seen += units
        for number, is_held in enumerate(everywhere):
            row, owner = divmod(number, all_of)
            unit = ELSEWHERE
            if owner == processes.rank():
                unit = copied(batch) if self.whole else pick(batch, [row])
            if is_held:
                held_out.offer(unit)
                continue
            if unit is not ELSEWHERE:
                self.images += samples(unit)
            left = sample.offer(unit)
            if left is not None:
                reserve.offer(left)
        held = everywhere[processes.rank() :: all_of]
        if not any(held):
            return batch if units else None
        kept = [row for row, is_held in enumerate(held) if not is_held]
        return pick(batch, kept) if kept else None

    def close(self) -> None:
        """Check, once all images have passed, that there were enough.

        Raises:
            DataError: No image is left to calibrate with, or none to hold out.
        """
        if not self._closed:
            self._pool()
        self._closed = True
        what = "whole batches" if self.whole else "images"
        if not self.images:
            raise DataError(
                f"calibration data: {self._seen} {what} are too few to calibrate and "
                "hold one out; pass at least a few dozen images"
                + (", in two batches or more" if self.whole else "")
            )
        if not self._held():
            raise DataError(
                f"calibration data: {self._seen} {what} leave none to hold out at "
                f"held_out={self._share}; pass more images or raise held_out"
            )

    def _pool(self) -> None:
        """Have what other processes keep, too."""
        seen = processes.add_up("images", (), [self.images, self._seen])
        self.images, self._seen = map(int, seen)
        self._batch = max(processes.gathered("batch sizes", self._batch))
        for pool in self._pools or ():
            pool.pool(self._device)

    def _held(self) -> list[Batch]:
        return self._pools[2].units if self._pools is not None else []

    def _batched(self, units: list[Batch], times: int = 1) -> tuple[Batch, ...]:
        join = not self.whole
        return tuple(Units(units, join, times * self._batch).batches())

    def held_out(self) -> tuple[Batch, ...]:
        """The held-out images in batches."""
        return self._batched(self._held())

    def sample(self, limit: int | None = None) -> tuple[Batch, ...]:
        """The sampled images in batches for all processes, about `limit` of them."""
        return self._batched(_first(self._sampled(), limit), processes.count())

    def together(self, limit: int) -> Batch:
        """About `limit` sampled images that run at once, all of one shape.

        Fewer where outputs are dense, whose memory they would need at once.
        """
        limit = max(min(limit, ROOM // self._row), 1)
        units = Units(_first(self._sampled(), limit), self.join, limit)
        groups = units.groups()
        return units.batch(max(groups, key=len))

    def reserve(self) -> tuple[Batch, ...]:
        """Images in batches that calibrate, but are not in the sample; maybe none."""
        return self._batched(self._pools[1].units if self._pools is not None else [])

    def sampled(self, limit: int) -> Units:
        """About `limit` of the sampled images, one by one, not copied."""
        units = _first(self._sampled(), limit)
        return Units(units, not self.whole, self._batch)

    def _sampled(self) -> list[Batch]:
        return self._pools[0].units if self._pools is not None else []


def _first(units: list[Batch], limit: int | None) -> list[Batch]:
    """The first pieces, of so many rows, or one that has more."""
    if limit is None:
        return units
    found: list[Batch] = []
    rows = 0
    for unit in units:
        if found and rows + samples(unit) > limit:
            break
        found.append(unit)
        rows += samples(unit)
    return found


@torch.no_grad()
def _gives(run: Callable[[Batch], Outputs], batch: Batch, expected: Outputs) -> bool:
    """Whether a batch runs and gives what was expected."""
    try:
        outputs = run(batch)
    except Exception as error:
        log.debug("batches stay whole: %s", error)
        return False
    return all(
        name in outputs and _alike(outputs[name], value)
        for name, value in expected.items()
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not other.is_floating_point():
        return True
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= ALIKE * other.norm() + 1e-6)
