"""Write a checkpoint as graphs that run without this project: ONNX, or programs of torch.export."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from data.cache.no_features import NoFeatures
from data.files import atomic_write_text
from data.images import ORIGINAL
from data.vocabulary import BOS
from models.backbones.interface import Backbone
from models.export import Begin, Encoder, Photographs, Step
from models.regions import Regions
from pipeline.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pipeline.checkpoints.hub import checkpoint_folder
from pipeline.cli import Settings, UserError, command, setting
from pipeline.extraction.registry import restore
from pipeline.terminal import human_bytes, progress, say

INSTALL = "pip install 'onceover[onnx]'"
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
TEXTS, IMAGES, REGIONS = 3, 2, 7  # sizes of the example inputs; all different


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


class Graph(NamedTuple):
    """A module to export.

    inputs: the example inputs by name. outputs: the names of the outputs. dynamic: for each input
    the dimensions that may differ: {dimension: name}.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    dynamic: list[dict[int, str]]


@command(ExportConfig)
def main(config: ExportConfig) -> None:
    """Write a checkpoint as graphs: backbone, encoder, first decoding step and next steps.

    docs/guide.md describes the graphs. docs/caption_onnx.py captions a photograph with them.
    """
    if config.format == "onnx":
        require_onnx()
    folder = checkpoint_folder(config.checkpoint)
    checkpoint = load_checkpoint(folder)
    out = config.out or folder.with_name(f"{folder.name}-{config.format}")
    if (out / "config.json").exists() or out.resolve() == folder.resolve():
        raise UserError(f"{out} contains a checkpoint; pass another --out")
    with_backbone = config.backbone and checkpoint.identity != NoFeatures.identity
    backbone = restore(folder, checkpoint.identity) if with_backbone else None
    graphs = make_graphs(checkpoint, backbone)
    out.mkdir(parents=True, exist_ok=True)
    with progress(len(graphs), "graphs", "export") as bar:
        for name, graph in graphs.items():
            path = out / f"{name}{FORMATS[config.format]}"
            error = write_graph(graph, path, config)
            say(f"{path}: {human_bytes(path.stat().st_size)}, differs by at most {error:.0e}")
            bar.step(1)
    text = json.dumps(describe(checkpoint, backbone, graphs), ensure_ascii=False, indent=1)
    atomic_write_text(out / "model.json", text + "\n")
    say(f"exported: {out}")


def check_exportable(checkpoint: Checkpoint, backbone: Backbone | None) -> None:
    """Raise UserError if the regions of a checkpoint cannot be exported."""
    if checkpoint.captioner.config.more_channels:
        raise UserError(f"{checkpoint.folder} uses two kinds of regions, which are not exported")
    if backbone is not None and backbone.framing().get("resize") == ORIGINAL:
        raise UserError(
            f"{checkpoint.folder} uses regions of a detector, which are not exported: their number "
            "differs between images. Pass --no-backbone to export the decoder alone"
        )


def require_onnx() -> None:
    """Raise UserError if a package of the extra [onnx] is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: {INSTALL}") from error


@torch.no_grad()
def make_graphs(checkpoint: Checkpoint, backbone: Backbone | None) -> dict[str, Graph]:
    """Make the graphs of a checkpoint by name, with example inputs.

    Raises UserError if its regions cannot be exported.
    """
    check_exportable(checkpoint, backbone)
    decoder = checkpoint.captioner.float().eval()
    config, generator = decoder.config, torch.Generator().manual_seed(0)
    regions = Regions(
        torch.rand(IMAGES, REGIONS, config.channels, generator=generator),
        torch.rand(IMAGES, REGIONS, 4, generator=generator).sort(dim=2).values,
        torch.tensor([REGIONS - 2, 0]),
    )
    graphs = {}
    if backbone is not None:
        height, width = backbone.framing()["size"]
        pixels = torch.randint(0, 256, (IMAGES, 3, height, width), dtype=torch.uint8,
                               generator=generator)  # fmt: skip
        frame = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(IMAGES, 1)
        inputs = {"pixels": pixels, "frame": frame}
        outputs = [*Regions._fields]
        graphs["backbone"] = Graph(Photographs(backbone), inputs, outputs, [{0: "B"}, {0: "B"}])
    # One of the example images has padding and one has no regions, so that no mask is left out.
    memory, spec = pytree.tree_flatten(decoder.encode(regions))
    names = [f"memory{number}" for number in range(len(memory))]
    inputs = dict(zip(Regions._fields, regions, strict=True))
    dynamic = [{0: "B", 1: "R"}, {0: "B", 1: "R"}, {0: "B"}]
    graphs["encoder"] = Graph(Encoder(decoder), inputs, names, dynamic)
    rows = torch.arange(TEXTS) % IMAGES
    # copies: an exported program must not depend on how the examples lie in memory
    memory = [part[rows].clone(memory_format=torch.contiguous_format) for part in memory]
    example = pytree.tree_unflatten(memory, spec)
    of_memory = [
        {0: "N"} | {axis: "R" for axis, n in enumerate(part.shape) if axis and n == REGIONS}
        for part in memory
    ]
    tokens = torch.full((TEXTS, config.max_prompt + 1), BOS)
    if config.max_prompt:
        tokens[:, -2], tokens[1:, :-2] = 3, 0
        tokens[0, :-2] = 3
    inputs = {"tokens": tokens} | dict(zip(names, memory, strict=True))
    begin = Begin(decoder, example)
    scores, *cache = begin(*inputs.values())
    cached = [f"cache{number}" for number in range(len(cache))]
    graphs["begin"] = Graph(begin, inputs, ["scores", *cached], [{0: "N"}, *of_memory])
    if not config.classes:
        inputs = {
            "tokens": scores.argmax(1, keepdim=True),
            "length": torch.tensor(config.max_prompt + 1),
            **dict(zip(cached, (part.clone() for part in cache), strict=True)),
            **dict(zip(names, memory, strict=True)),
        }
        dynamic = [{0: "N"}, {}, *({0: "N"} for _ in cache), *of_memory]
        step = Step(decoder, example, len(cache))
        outputs = ["scores", *(f"next_{name}" for name in cached)]
        graphs["step"] = Graph(step, inputs, outputs, dynamic)
    return graphs


@torch.no_grad()
def write_graph(graph: Graph, path: Path, config: ExportConfig) -> float:
    """Write a graph. Returns the largest difference of its outputs from those of the module."""
    wanted = graph.module(*graph.inputs.values())
    dimensions = {name: torch.export.Dim(name) for each in graph.dynamic for name in each.values()}
    dynamic = [{axis: dimensions[name] for axis, name in each.items()} for each in graph.dynamic]
    leading = 2 if isinstance(graph.module, Step | Encoder | Photographs) else 1
    if isinstance(graph.module, Encoder | Photographs):
        shapes: tuple[Any, ...] = tuple(dynamic)
    else:  # the arguments after the first ones are a list
        shapes = (*(each or None for each in dynamic[:leading]), tuple(dynamic[leading:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            graph.module, tuple(graph.inputs.values()), dynamic_shapes=shapes
        )
        if config.format == "torch":
            torch.export.save(program, path)
            found = torch.export.load(path).module()(*graph.inputs.values())
            return largest_difference([part.numpy() for part in found], wanted)
        onnx_program = torch.onnx.export(
            program, input_names=[*graph.inputs], output_names=graph.outputs, dynamo=True,
            verbose=False,
        )  # fmt: skip
        assert onnx_program is not None
        onnx_program.save(path)
    if config.quantize == "int8" and not isinstance(graph.module, Photographs):
        quantize(path)
    arrays = {name: value.numpy() for name, value in graph.inputs.items()}
    found = run_onnx(path, arrays)
    return largest_difference(found, wanted)


def largest_difference(found: Sequence[np.ndarray], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any number; equal infinities, as in masks, do not differ."""
    largest = 0.0
    for one, two in zip(found, (part.numpy() for part in wanted), strict=True):
        if (differs := one != two).any():
            difference = float(np.abs(one[differs] - two[differs]).max())
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


def run_onnx(path: Path, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """Run an ONNX file once. Inputs that the graph does not use are left out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    used = {each.name for each in session.get_inputs()}
    return session.run(None, {name: value for name, value in inputs.items() if name in used})


def describe(
    checkpoint: Checkpoint, backbone: Backbone | None, graphs: Mapping[str, Graph]
) -> dict[str, Any]:
    """What a program needs to run the graphs, for model.json."""
    config = checkpoint.captioner.config
    return {
        "format": 1,
        "words": checkpoint.vocabulary.words,
        "segment": checkpoint.vocabulary.segment,
        "answers": checkpoint.answers,
        "task": checkpoint.new_task().name,
        "max_length": config.max_length,
        "max_prompt": config.max_prompt,
        "decoding": checkpoint.decoding,
        "framing": None if backbone is None else backbone.framing(),
        "inputs": {name: [*graph.inputs] for name, graph in graphs.items()},
        "outputs": {name: graph.outputs for name, graph in graphs.items()},
    }


if __name__ == "__main__":
    main()
