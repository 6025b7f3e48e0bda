"""Tables of exported files, and of what adapters cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from figures import FOLDER, NAMES, bold, markdown, read

from cora_plugin.adapters.errors import FileError

INT8 = "int8 ONNX"
PACKED = "packed ONNX"


def exports(name: str) -> str:
    """Files of exports.py without adapters and with 5 %."""
    heads = ["adapters", "file", "runtime", "MB", "top-1", "agreement with torch"]
    heads += ["KL to torch", "KL to float", "int8 layers", "latency"]
    rows = []
    for row in read(f"exports-{name}"):
        if row["adapters"] in ("float", "none", "5%"):
            adapted = row["adapters"] == "5%"
            latency = f"{row['ratio']['1']:.2f}"
            rows.append(
                [
                    row["adapters"].replace("%", " %"),
                    row["format"],
                    NAMES.get(row["runtime"], row["runtime"]),
                    f"{row['bytes'] / 1e6:.2f}",
                    f"{row['top1']:.1%}",
                    f"{row['agreement']:.1%}",
                    f"{row['kl_torch']:.4f}",
                    f"{row['kl_float']:.3f}",
                    f"{row['int8_layers']} of {row['layers']}",
                    bold(latency, adapted and row["format"] == INT8),
                ]
            )
    return markdown(heads, rows)


def latency(*names: str) -> str:
    """Latencies with adapters over those without: medians and fastest runs."""
    rows = []
    for name in names:
        for runtime in ("onnxruntime", "openvino"):
            cells = [f"{_network(name)}, {NAMES.get(runtime, runtime)}"]
            for batch in ("1", "16"):
                for adapters in ("2%", "5%", "10%"):
                    row = _file(name, adapters, INT8, runtime)
                    medians, fastest = row["ratio"][batch], row["ratio_fastest"][batch]
                    cells.append(f"{medians:.2f} ({fastest:.2f})")
            rows.append(cells)
    heads = ["2 %, batch 1", "5 %", "10 %", "2 %, batch 16", "5 %", "10 %"]
    return markdown(["network, runtime", *heads], rows)


def merged() -> str:
    """KL to float of int8 files of 5 %, computed as written, beside torch's own."""
    rows = []
    for path in sorted((FOLDER / "results").glob("int8-*.json")):
        name = path.stem.removeprefix("int8-")
        found = {
            row["runtime"]: row
            for row in read(path.stem)
            if (row["adapters"], row["format"]) == ("5%", INT8)
        }
        torch = next(iter(found.values()))["kl_of_torch"]
        cells = [_network(name), f"{torch:.4f}"]
        for runtime in ("onnxruntime", "openvino"):
            kl = found[runtime]["kl_float"]
            cells.append(f"{kl:.4f} ({kl / torch:.2f} ×)")
        rows.append(cells)
    return markdown(["KL to float, 5 %", "torch", "onnxruntime", "OpenVINO"], rows)


def divergence(*names: str) -> str:
    """KL of int8 and packed files in onnxruntime, and the size of the int8 file."""
    heads = ["none", "2 %", "5 %", "10 %"]
    rows = []
    for name in names:
        cells = [_network(name)]
        for adapters in (head.replace(" ", "") for head in heads):
            int8, packed = (_file(name, adapters, form) for form in (INT8, PACKED))
            kl = f"{int8['kl_float']:.3f} ({packed['kl_float']:.3f})"
            cells.append(f"{kl}, {int8['bytes'] / 1e6:.2f}")
        rows.append(cells)
    what = "KL to float in onnxruntime: int8 ONNX (packed ONNX), MB of int8 ONNX"
    return markdown([what, *heads], rows)


def formats(*names: str) -> str:
    """Sizes of Brevitas' files, without adapters and with them."""
    titles = {"lite0": "EfficientNet-Lite0", "fashion": "ResNet-20"}
    heads, columns = ["file"], []
    for name in names:
        found = read(f"formats-{name}")
        size = f"{found['weights'] / 1e6:.2f} M" + (" weights" if not columns else "")
        heads.append(f"{titles[found['model']]}, {size}")
        columns.append(
            [
                " → ".join(
                    f"{file[field] / 1e6:.2f}"
                    for field in ("bytes", "adapted_bytes")
                    if field in file
                )
                for file in found["files"]
            ]
        )
    files = [f"`{file['format']}`" for file in read(f"formats-{names[0]}")["files"]]
    return markdown(heads, zip(files, *columns, strict=True))


def cost(name: str) -> str:
    """Passes of the float network by stage, most first."""
    about = ("model", "toolkit", "float_pass_seconds", "passes", "peak_bytes")
    found = read(f"cost-{name}")
    stages = {stage: n for stage, n in found.items() if stage not in about}
    order = sorted(stages, key=stages.__getitem__, reverse=True)
    rows = [[stage, f"{stages[stage]:.2f}"] for stage in order]
    return markdown(
        ["stage", "float passes"], [*rows, ["all", f"{found['passes']:.2f}"]]
    )


def growth(name: str) -> str:
    """Seconds and memory at three sizes each, of one file."""
    return growth_table(read(name))


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of the stages that take longest, and of all, by size."""
    shown = ("statistics", "search", "regression")
    lines = []
    for row in rows:
        seconds = [row["float_pass"], *(row["stages"][stage] for stage in shown)]
        seconds += [row["seconds"] - sum(seconds[1:]), row["seconds"]]
        lines.append(
            [
                *(str(row[name]) for name in ("layers", "width", "images")),
                *(f"{each:.2f}" for each in seconds),
                f"{row['peak_bytes'] / 2**20:.0f}",
            ]
        )
    heads = ["layers", "width", "images", "float pass", *shown, "others", "all"]
    return markdown([*heads, "peak MiB"], lines)


def _file(name: str, adapters: str, format_: str, runtime: str = "onnxruntime") -> Any:
    wanted = adapters, format_, runtime
    for row in read(f"exports-{name}"):
        if (row["adapters"], row["format"], row["runtime"]) == wanted:
            return row
    raise FileError(f"exports-{name}.json: no row is {', '.join(wanted)}")


def _network(name: str) -> str:
    model, _, toolkit = name.split("-")
    return f"{NAMES[model]}, {NAMES[toolkit]}"
