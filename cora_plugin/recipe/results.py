"""What a recipe's run measured: a table on the screen, a folder of files."""

import io
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Subset

from cora_plugin.adapters.errors import CoRaError, DataError
from cora_plugin.compare.html import Page, write_html
from cora_plugin.compare.machine import versions
from cora_plugin.compare.rows import Row, judge, table
from cora_plugin.config import CoRaConfig
from cora_plugin.document import Document
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import TITLES, decide
from cora_plugin.qat import QATReport
from cora_plugin.recipe.folder import (
    FILES,
    PAGE,
    PICTURE,
    RECIPE,
    REPORT,
    TEXT,
    TRAINING,
    WIDTHS,
    written,
)
from cora_plugin.recipe.images import NO_LABEL, Item
from cora_plugin.recipe.schema import Recipe
from cora_plugin.report import Report, Stored
from cora_plugin.strict import strict_json


class Results:
    """The results of a run.

    `float_model` and `model` are the networks of the first and the last row, `example`
    is an input [1, …], and `failures` are the exports that could not be written, each
    with the reason.

    Args:
        recipe: The recipe, with all that was decided for it.
        toolkit: The toolkit's title.
    """

    def __init__(self, recipe: Recipe, toolkit: str) -> None:
        self.recipe = recipe
        self.toolkit = toolkit
        self.rows: list[Row] = []
        self.report: Report | None = None
        self.qat: QATReport | None = None
        self.float_model: nn.Module | None = None
        self.model: nn.Module | None = None
        self.example = torch.empty(0)
        self.notes: list[str] = []
        self.failures: list[CoRaError] = []

    def begin(self, reference: Tensor, labels: Tensor, images: Subset[Item]) -> None:
        """Take the float model's outputs [N, classes, …] and the labels, -1 for none.

        Raises:
            DataError: The labels cannot be classes of these outputs.
        """
        self._reference = reference
        self._labels = None if bool((labels == NO_LABEL).all()) else labels
        self._check_labels(images.dataset, reference.shape[1])
        self.images = len(reference)
        config, test = self.recipe.cora or CoRaConfig(), self.recipe.test
        if test.objective is not None or test.axis is not None:
            objective = test.objective or config.objective
            config = replace(config, objective=objective, axis=test.axis)
        chosen = decide(config, {"": reference})
        self._objective = chosen.objective
        self.add("float", reference, 0.0, bits=32.0)

    def add(
        self,
        name: str,
        outputs: Tensor,
        seconds: float,
        report: Report | None = None,
        bits: float | None = None,
    ) -> None:
        """Judge a model by its outputs [N, classes, …]."""
        if report is not None:
            self.report, bits = report, report.equivalent_bits
        row = judge(
            self._reference,
            outputs,
            self._labels,
            self._objective,
            label=name,
            equivalent_bits=bits,
            seconds=seconds,
        )
        # Each is what the one before it was made into.
        self.rows.append(row.beside(self.rows[-1]) if self.rows else row)

    def add_trained(self, outputs: Tensor, seconds: float, report: QATReport) -> None:
        """Judge the trained model by its outputs [N, classes, …]."""
        self.qat = report
        self.add("+ qat", outputs, seconds, bits=self.rows[-1].equivalent_bits)
        if not report.kept:
            self.notes.append("training was taken back, for it did not help held-out")

    def count(self, layers: Sequence[QuantizedLayer]) -> None:
        """Say how many bits a weight the last model's layers take, without adapters."""
        bits = Stored.of(layers, ()).equivalent_bits
        self.rows[-1] = replace(self.rows[-1], equivalent_bits=bits)

    def table(self) -> Table:
        """One row a model."""
        name = TITLES.get(self._objective.name, self._objective.name)
        title = f"{self.images} test images, {name} to the float model"
        return table(self.rows, {"model": "label"}, title)

    def lines(self) -> list[str]:
        """Notes, and where the files are."""
        return [*self.notes, f"written to {self.recipe.output}"]

    def write(self, folder: Path) -> None:
        """Write the report, its table and picture, and the resolved recipe."""
        exports = [
            {**asdict(export), "bytes": _size(folder / export.path)}
            for export in self.recipe.exports
            if (folder / export.path).exists()
        ]
        whole: dict[str, Any] = {
            "recipe": self.recipe.to_dict(),
            "rows": [_plain(row) for row in self.rows],
            "images": self.images,
            "exports": exports,
            "failures": [str(failure) for failure in self.failures],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": _host(),
            "versions": versions(),
            "cora": self.report.to_dict() if self.report else None,
            "qat": self.qat.to_dict() if self.qat else None,
        }
        resolved = yaml.safe_dump(
            self.recipe.to_dict(), sort_keys=False, allow_unicode=True
        )
        _write(folder / RECIPE, resolved)
        text = io.StringIO()
        Console(file=text, width=108).print(self.table())
        for report in (self.report, self.qat):
            if report is not None:
                text.write(f"\n{report}\n")
        try:
            self._draw(folder)
        except ModuleNotFoundError as error:
            self.notes.append(f"no picture: {error}")
        _write(folder / TEXT, text.getvalue())
        page = Page(
            title=f"{self.toolkit}: a run of cora-plugin",
            rows=self.rows,
            names={"model": "label"},
            notes=[f"{self.images} test images judged.", *whole["failures"]],
            layers={} if self.report is None else {"adapters": self.report},
            settings=resolved,
        )
        write_html(page, folder / PAGE)
        # Last, for it lists the others.
        whole[FILES] = [*written(folder), REPORT]
        _write(folder / REPORT, strict_json(whole))

    def _draw(self, folder: Path) -> None:
        """Write the pictures of the reports.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        if self.report is not None:
            self.report.plot(folder / PICTURE)
            if self.report.plan is not None:
                self.report.plot_plan(folder / WIDTHS)
        if self.qat is not None:
            self.qat.plot(folder / TRAINING)

    def _check_labels(self, source: Any, outputs: int) -> None:
        document: Document = self.recipe.document
        name = "test" if document.values.get("test") else "data"
        if source.classes not in (None, outputs):
            section = name if getattr(self.recipe, name).folder else "data"
            raise document.error(
                (section, "folder"),
                f"it has {source.classes} classes and the model {outputs} outputs; "
                f"name the outputs in {section}.classes (a text file, a sub-folder's "
                "name a line), or use a glob, without labels",
                DataError,
            )
        if self._labels is None:
            return
        for label in (int(self._labels.max()), int(self._labels.min())):
            if not 0 <= label < outputs:
                raise document.error(
                    (name, "factory"),
                    f"label {label} is none of the model's {outputs} outputs, which "
                    "are counted from 0",
                    DataError,
                )


def _plain(row: Row) -> dict[str, Any]:
    """A row of `report.json`."""
    return {
        "model": row.label,
        "top1": row.top1,
        "gain": None if row.gain is None else asdict(row.gain),
        "agreement": row.agreement,
        "kl": row.kl,
        **({} if row.kl is not None else {row.objective or "": row.distance}),
        "bits": row.equivalent_bits,
        "seconds": row.seconds,
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _size(path: Path) -> int:
    """Bytes of a file and of the weights that stand beside an OpenVINO IR."""
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path
    files = {path, weights}
    return sum(file.stat().st_size for file in files if file.exists())


def _host() -> dict[str, Any]:
    """The machine that figures in seconds are of."""
    gpus = range(torch.cuda.device_count())
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }
