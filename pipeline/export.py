"""Write a checkpoint as graphs that run without this project: ONNX, or programs of torch.export."""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache.no_features import NoFeatures
from data.files import replace_files
from data.images import ORIGINAL
from models.backbones.interface import Backbone
from models.export import Encoder, Graph, Photographs, Sizes, Step, make_graphs
from pipeline.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pipeline.checkpoints.hub import SCHEME, checkpoint_folder
from pipeline.cli import Settings, UserError, command, setting
from pipeline.extraction.registry import restore
from pipeline.terminal import human_bytes, progress, say

INSTALL = "pip install 'onceover[onnx]'"
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
GRAPHS = ("backbone", "encoder", "begin", "step")
RECORD = "model.json"
# all files that an export may have; ONNX stores weights of gigabytes in a file beside the graph
FILES = {RECORD, *(name + end for name in GRAPHS for end in (".onnx", ".onnx.data", ".pt2"))}
# by --quantize: how far outputs may differ from ours, as a share of the largest value
TOLERANCE = {"none": 2e-3, "int8": 0.5}


@dataclass(frozen=True)
class ExportConfig(Settings):
    """The options of pipeline.export."""

    checkpoint: Path = setting(
        Path("runs/sample"), "checkpoint folder written by pipeline.train, or hf-hub:user/name"
    )
    format: str = setting(
        "onnx", "onnx: for ONNX Runtime; torch: programs of torch.export", choices=(*FORMATS,)
    )
    out: Path | None = setting(None, "folder to write  [RUN-onnx or RUN-torch]")
    backbone: bool = setting(True, "also write the backbone, for photographs")
    quantize: str = setting(
        "none",
        "int8: 8-bit weights of the matrix products, by onnxruntime.quantization; the backbone "
        "keeps its weights",
        choices=("none", "int8"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != "none" and self.format != "onnx":
            raise UserError("--quantize int8 needs --format onnx")


@command(ExportConfig)
def main(config: ExportConfig) -> None:
    """Write a checkpoint as graphs: backbone, encoder, first decoding step and next steps.

    docs/guide.md describes the graphs. docs/caption_onnx.py captions a photograph with them.
    """
    if config.format == "onnx":
        require_onnx()
    folder = checkpoint_folder(config.checkpoint)
    out = config.out or default_out(config)
    check_out(out, folder)
    checkpoint = load_checkpoint(folder)
    backbone = open_backbone(folder, checkpoint, config.backbone)
    graphs = make_graphs(checkpoint.captioner, backbone)
    with replace_files(out, FILES, last=RECORD) as temporary:
        with progress(len(graphs), "graphs", "export") as bar:
            for name, graph in graphs.items():
                path = temporary / f"{name}{FORMATS[config.format]}"
                difference = write_graph(graph, path, config)
                size = human_bytes(path.stat().st_size)
                say(f"{path.name}: {size}, outputs differ from ours by at most {difference:.1e}")
                bar.step(1)
        record = json.dumps(describe(checkpoint, backbone, graphs), ensure_ascii=False, indent=1)
        (temporary / RECORD).write_text(record + "\n", encoding="utf-8")
    say(f"exported: {out}; the differences are shares of the largest value of each output")


def default_out(config: ExportConfig) -> Path:
    """RUN-onnx beside the checkpoint RUN; in the current folder for one from the hub."""
    name = str(config.checkpoint)
    from_hub = name.startswith(SCHEME)
    path = Path(name.rpartition("/")[2] if from_hub else os.path.abspath(name))
    return path.with_name(f"{path.name}-{config.format}")


def check_out(out: Path, folder: Path) -> None:
    """Raise UserError if `out` is in the checkpoint `folder`, or has files of something else."""
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} is in the checkpoint {folder}; pass another --out")
    files = {path.name for path in out.iterdir()} if out.exists() else set()
    others = sorted(name for name in files - FILES if not name.endswith(".tmp"))
    if files and not is_export(out):
        others = others or sorted(files)
    if others:
        raise UserError(
            f"--out {out} has files that are not from pipeline.export, such as {others[0]}; pass "
            "another --out"
        )


def is_export(out: Path) -> bool:
    """Whether a folder has an export, whole or interrupted in its last moment."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return any(out.glob(".*.tmp"))
    except ValueError:
        return False
    return isinstance(record, dict) and {"format", "inputs"} <= {*record}


def open_backbone(folder: Path, checkpoint: Checkpoint, wanted: bool) -> Backbone | None:
    """Open the backbone of a checkpoint; None without image features, or if it is not wanted.

    Raises UserError if the regions of the checkpoint cannot be exported.
    """
    if checkpoint.captioner.config.more_channels:
        raise UserError(f"{folder} uses two kinds of regions, which are not exported")
    if checkpoint.identity == NoFeatures.identity or not wanted:
        return None
    if checkpoint.identity.get("regions") == "imported":
        raise UserError(
            f"{folder} was trained on features of another program, so it has no backbone. Pass "
            "--no-backbone to export the decoder alone"
        )
    backbone = restore(folder, checkpoint.identity)
    if backbone.framing().get("resize") == ORIGINAL:
        raise UserError(
            f"{folder} uses regions of a detector, which are not exported: their number differs "
            "between images. Pass --no-backbone to export the decoder alone"
        )
    return backbone


def require_onnx() -> None:
    """Raise UserError if a package of the extra [onnx] is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: {INSTALL}") from error


@torch.no_grad()
def write_graph(graph: Graph, path: Path, config: ExportConfig) -> float:
    """Write a graph, and compare its outputs for all examples with those of the module.

    Returns the largest difference, as a share of the largest value. Raises UserError if it is
    above TOLERANCE.
    """
    inputs = graph.examples[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            graph.module, tuple(inputs.values()), dynamic_shapes=dynamic_shapes(graph)
        )
        if config.format == "torch":
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            path.write_bytes(buffer.getvalue())
        else:
            onnx_program = torch.onnx.export(
                program, input_names=[*inputs], output_names=graph.outputs, dynamo=True,
                verbose=False,
            )  # fmt: skip
            assert onnx_program is not None
            onnx_program.save(path)
            if config.quantize == "int8" and not isinstance(graph.module, Photographs):
                quantize(path)
        run = load_graph(path)
        differences = [
            largest_difference(run(each), graph.module(*each.values())) for each in graph.examples
        ]
    difference, limit = max(differences), TOLERANCE[config.quantize]
    if not difference <= limit:
        raise UserError(
            f"{path.stem}: the outputs of the exported graph differ from ours by {difference:.1e} "
            f"of the largest value; at most {limit:g} is allowed, so nothing was written. Try "
            "other versions of torch, onnx and onnxruntime, or another --format or --quantize"
        )
    return difference


def dynamic_shapes(graph: Graph) -> tuple[Any, ...]:
    """The dimensions that may differ, as torch.export takes them."""
    dimensions = {name: torch.export.Dim(name) for name in Sizes._fields}
    dynamic = [{axis: dimensions[name] for axis, name in each.items()} for each in graph.dynamic()]
    if isinstance(graph.module, Encoder | Photographs):
        return tuple(dynamic)
    # the arguments after the first ones are a list
    leading = 2 if isinstance(graph.module, Step) else 1
    return (*(each or None for each in dynamic[:leading]), tuple(dynamic[leading:]))


def largest_difference(found: Sequence[np.ndarray], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any number, as a share of the largest value of its output.

    Values below 1 count as 1. Equal infinities, as in masks, do not differ. NaN and another shape
    differ by infinity.
    """
    largest = 0.0
    for one, two in zip(found, (part.numpy() for part in wanted), strict=True):
        if one.shape != two.shape:
            return float("inf")
        if (differs := one != two).any():
            scale = np.abs(two[np.isfinite(two)]).max(initial=1)
            difference = float(np.abs(one[differs] - two[differs]).max()) / float(scale)
            largest = max(largest, float("inf") if np.isnan(difference) else difference)
    return largest


def quantize(path: Path) -> None:
    """Replace the weights of the matrix products of an ONNX file by 8-bit integers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared, small = Path(folder) / "prepared.onnx", Path(folder) / "small.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(prepared, small, weight_type=QuantType.QInt8)
        small.replace(path)


def load_graph(path: Path) -> Callable[[Mapping[str, Tensor]], list[np.ndarray]]:
    """Load an exported file: a function from the inputs by name to the outputs."""
    if path.suffix == FORMATS["torch"]:
        module = torch.export.load(path).module()
        return lambda inputs: [part.detach().numpy() for part in module(*inputs.values())]
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    used = [each.name for each in session.get_inputs()]  # without those that the graph ignores
    return lambda inputs: session.run(None, {name: inputs[name].numpy() for name in used})


def describe(
    checkpoint: Checkpoint, backbone: Backbone | None, graphs: Mapping[str, Graph]
) -> dict[str, Any]:
    """What a program needs to run the graphs, for model.json."""
    config = checkpoint.captioner.config
    return {
        "format": 1,
        "words": checkpoint.vocabulary.words,
        "unit": checkpoint.vocabulary.unit,  # words or subwords
        "segment": checkpoint.vocabulary.segment,
        "answers": checkpoint.answers,
        "task": checkpoint.new_task().name,
        "max_length": config.max_length,
        "max_prompt": config.max_prompt,
        "decoding": checkpoint.decoding,
        "framing": None if backbone is None else backbone.framing(),
        "inputs": {name: [*graph.examples[0]] for name, graph in graphs.items()},
        "outputs": {name: graph.outputs for name, graph in graphs.items()},
    }


if __name__ == "__main__":
    main()
