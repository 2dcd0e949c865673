"""Train the sample's small detector: Faster R-CNN over timm's `test_resnet`, on drawn scenes.

    python models/weights/pretrain_detector.py   # writes detector_scenes.safetensors beside it

The backbone starts from test_resnet_scenes.safetensors (pretrain.py). A class is the size, colour
and shape of a thing. Scenes are numbered as in pretrain.py, so that no scene of a sample of the
same seed is among them. The header of the file has the names of the classes and the input size.
"""

import io
import json
import os
import time
from itertools import product
from pathlib import Path

import click
import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_iou

from data.datasets.sample import (
    COLOURS,
    HEIGHT,
    SHAPES,
    SIZES,
    WIDTH,
    draw_with_boxes,
    encode_jpeg,
    make_scene,
    scene_rng,
)
from models.backbones.rcnn import Architecture, build_rcnn

BACKBONE, FROZEN = "test_resnet", ("conv1", "bn1", "layer1")
FOLDER = Path(__file__).parent
OUT = FOLDER / "detector_scenes.safetensors"
HELD_OUT, TRAINING = 200_000, 1_000_000  # as in pretrain.py
THINGS = list(product(SIZES, COLOURS, SHAPES))
CLASSES = ["background", *(" ".join(words) for words in THINGS)]
ARCHITECTURE = Architecture("", BACKBONE, len(CLASSES), (HEIGHT, WIDTH), width=32, channels=128)


class DrawnBoxes(Dataset):
    """`count` scenes from number `first`: an image [3,H,W] in 0..1, and its boxes and labels."""

    def __init__(self, seed: int, first: int, count: int):
        self.seed, self.first, self.count = seed, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = scene_rng(self.seed, self.first + index)
        scene = make_scene(rng)
        picture, boxes = draw_with_boxes(scene, rng)
        pixels = np.array(Image.open(io.BytesIO(encode_jpeg(picture))))
        labels = [1 + THINGS.index(thing.words) for thing in scene.things]
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255, target


def batches(seed: int, first: int, count: int, batch: int) -> DataLoader:
    return DataLoader(
        DrawnBoxes(seed, first, count), batch, collate_fn=lambda rows: [*zip(*rows, strict=True)]
    )


def new_detector() -> nn.Module:
    """The network before training, with settings for a fast training.

    The backbone's first layers, and the statistics of its batch normalisation, stay as they are.
    """
    network = build_rcnn(ARCHITECTURE)
    state = load_file(FOLDER / f"{BACKBONE}_scenes.safetensors")
    network.backbone.body.load_state_dict(state, strict=False)
    for name in FROZEN:
        getattr(network.backbone.body, name).requires_grad_(False)
    network.rpn._pre_nms_top_n["training"] = 200
    network.rpn._post_nms_top_n["training"] = 64
    network.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    return network.to(memory_format=torch.channels_last)


def set_training(network: nn.Module) -> None:
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train(network: nn.Module, loader: DataLoader, rate: float) -> None:
    """One pass over `loader`; the learning rate rises for 50 steps and falls to 0 by a cosine."""
    trained = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.02)
    started, steps = time.process_time(), len(loader)
    for step, (images, targets) in enumerate(loader, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / 50, 0.5 + 0.5 * np.cos(np.pi * step / steps))
        set_training(network)
        losses = network(list(images), list(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            speed = step * len(images) / (time.process_time() - started)
            parts = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            click.echo(f"step {step:,}/{steps:,}  {parts}  {speed:.0f} scenes/s")


@torch.inference_mode()
def evaluate(network: nn.Module, loader: DataLoader, min_score: float = 0.5) -> dict[str, float]:
    """Two figures of held-out scenes.

    iou: the mean over true boxes of the IoU of the best detection with the same label, 0 where
    there is none. precision: the share of detections with an IoU of at least 0.5 with a true
    box of the same label, which no better detection has taken.
    """
    network.eval()
    ious, correct = [], []
    for images, targets in loader:
        for detected, target in zip(network(list(images)), targets, strict=True):
            kept = detected["scores"] > min_score
            boxes, labels = detected["boxes"][kept], detected["labels"][kept]
            same = labels[:, None] == target["labels"]
            iou = box_iou(boxes, target["boxes"]) * same
            ious += iou.amax(0).tolist() if len(boxes) else [0.0] * len(target["labels"])
            taken: set[int] = set()
            for row in iou:
                best = int(row.argmax())
                correct.append(bool(row[best] >= 0.5) and best not in taken)
                taken |= {best} if correct[-1] else set()
    return {"iou": float(np.mean(ious)), "precision": float(np.mean(correct or [0]))}


def write_weights(network: nn.Module, path: Path, about: dict) -> None:
    """Write the weights, with the classes, the input size and `about` in the header."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    header = {"classes": CLASSES, "size": ARCHITECTURE.size, "onceover": about}
    metadata = {name: json.dumps(value) for name, value in header.items()}
    save_file(state, aside, metadata={"format": "pt", **metadata})
    aside.replace(path)


@click.command(context_settings={"show_default": True})
@click.option("--steps", default=1800, help="Batches to train on.")
@click.option("--batch", default=8, help="Scenes a step.")
@click.option("--rate", default=1.2e-3, help="Largest learning rate.")
@click.option("--seed", default=0, help="Of the scenes and of the first weights.")
@click.option("--held-out", default=300, help="Scenes to measure on.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=OUT, help="The weights file."
)
def main(steps: int, batch: int, rate: float, seed: int, held_out: int, out: Path) -> None:
    """Train the drawn sample's detector, and measure it on held-out scenes."""
    torch.manual_seed(seed)
    network = new_detector()
    count = sum(value.numel() for value in network.state_dict().values())
    click.echo(f"{steps * batch:,} scenes, {count:,} weights -> {out}")
    train(network, batches(seed, TRAINING, steps * batch, batch), rate)
    table = evaluate(network, batches(seed, HELD_OUT, held_out, batch))
    click.echo("  ".join(f"{name} {value:.4f}" for name, value in table.items()))
    about = {"made_by": "models/weights/pretrain_detector.py", "backbone": BACKBONE, "seed": seed}
    about |= {"batch": batch, "steps": steps, "rate": rate, "held_out": table}
    about |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    write_weights(network, out, about | {"timm": timm.__version__})
    click.echo(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
