"""Make the sample's small backbone: timm's `test_resnet`, trained from nothing on drawn scenes.

    python models/weights/pretrain.py      # writes test_resnet_scenes.safetensors beside it

Scenes are drawn as they are needed and go through the sample's own JPEG and the extractor's own
resize. The backbone's last map [B,C,5,5] feeds one 1x1 head, thrown away at the end, that says of
each cell whether a thing's centre lies in it and of which size, colour and shape that thing is and
how far off its centre. What is learnt is thus what a caption needs, at the place where the decoder
will look for it. Scenes are numbered from HELD_OUT and TRAINING, past any sample (100,000 at most),
so that no scene of a sample of the same seed is among them.
"""

import io
import json
import os
import time
from pathlib import Path

import click
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data.datasets.sample import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    encode_jpeg,
    make_scene,
    scene_rng,
)

ARCHITECTURE = "test_resnet"
OUT = Path(__file__).parent / f"{ARCHITECTURE}_scenes.safetensors"
HELD_OUT, TRAINING = 200_000, 1_000_000
KINDS = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": tuple(SHAPES)}
THINGS = 3  # at most, in a scene


class DrawnScenes(Dataset):
    """`count` scenes from number `first`: pixels uint8 [3,side,side] and things float32
    [THINGS,5].
    """

    def __init__(self, seed: int, first: int, count: int, side: int):
        self.seed, self.first, self.count, self.side = seed, first, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = scene_rng(self.seed, self.first + index)
        scene = make_scene(rng)
        picture = Image.open(io.BytesIO(encode_jpeg(draw_scene(scene, rng))))
        pixels = np.array(picture.resize((self.side, self.side), Image.Resampling.BILINEAR))
        return pixels.transpose(2, 0, 1), describe(scene)


def describe(scene: Scene) -> np.ndarray:
    """Things [THINGS,5]: x and y of the centre in 0..1 of the picture, numbers of size, colour and
    shape; else -1.
    """
    rows = np.full((THINGS, 5), -1, np.float32)
    for row, thing in zip(rows, scene.things, strict=False):
        numbers = [
            names.index(word) for names, word in zip(KINDS.values(), thing.words, strict=True)
        ]
        row[:] = thing.x / scene.width, thing.y / scene.height, *numbers
    return rows


class SceneNet(nn.Module):
    """The backbone and its one head: pixels uint8 [B,3,S,S] to one map [B,channels,h,w] a
    question.
    """

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model(ARCHITECTURE, num_classes=0)
        config = timm.data.resolve_model_data_config(self.backbone)
        self.side = config["input_size"][-1]
        self.register_buffer(
            "mean", torch.tensor(config["mean"]).view(3, 1, 1) * 255, persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(config["std"]).view(3, 1, 1) * 255, persistent=False
        )
        self.parts = {"there": 1, "offset": 2} | {kind: len(names) for kind, names in KINDS.items()}
        self.head = nn.Conv2d(self.backbone.num_features, sum(self.parts.values()), 1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        images = (pixels - self.mean) / self.std
        if self.training:
            images = vary_light(images)
        maps = self.head(
            self.backbone.forward_features(images.contiguous(memory_format=torch.channels_last))
        )
        return dict(
            zip(self.parts, maps.float().split(tuple(self.parts.values()), dim=1), strict=True)
        )


def vary_light(images: Tensor) -> Tensor:
    """Another exposure and white balance for each of `images` [B,3,S,S]: sturdier, and words stay
    true.
    """
    gain = (
        1
        + 0.15 * (torch.rand(len(images), 1, 1, 1) - 0.5)
        + 0.06 * (torch.rand(len(images), 3, 1, 1) - 0.5)
    )
    return images * gain + 0.1 * (torch.rand(len(images), 1, 1, 1) - 0.5)


def offsets(things: Tensor, grid: tuple[int, int]) -> Tensor:
    """From each cell's middle to each of `things` [B,THINGS,5], in cells: [B,THINGS,2,h,w], far
    where there is none.
    """
    height, width = grid
    middles = torch.stack(
        torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    )
    centres = things[..., :2] * torch.tensor([width, height])
    far = torch.where(things[..., :1] < 0, 99.0, 0.0)
    return (centres + far)[..., None, None] - middles


def loss_of(said: dict[str, Tensor], things: Tensor) -> Tensor:
    """Presence in every cell; the rest in the cells about a centre, less the further the cell's
    middle lies off.
    """
    away = offsets(things, said["there"].shape[-2:])
    inside = (away.abs() <= 0.5).all(2).any(1).float()  # [B,h,w]
    loss = 4 * F.binary_cross_entropy_with_logits(said["there"][:, 0], inside)
    # [B,THINGS,h,w], bilinear: a thing's cells sum to 1 but at the border
    near = (1 - away.abs()).clamp(min=0).prod(2)
    weight, owner = near.max(1)
    weight = weight / weight.sum()
    chosen = away.gather(1, owner[:, None, None].expand(-1, 1, 2, -1, -1))[:, 0].clamp(-1, 1)
    loss = loss + (weight * F.smooth_l1_loss(said["offset"], chosen, reduction="none").sum(1)).sum()
    for column, kind in enumerate(KINDS, start=2):
        truth = things[..., column].gather(1, owner.flatten(1)).view_as(owner).long().clamp(min=0)
        loss = loss + (weight * F.cross_entropy(said[kind], truth, reduction="none")).sum()
    return loss


@torch.inference_mode()
def evaluate(net: SceneNet, loader: DataLoader) -> dict[str, float]:
    """Percentages over held-out things, each read at the cell about its centre that most says
    something is there.

    `found`: that cell says so; `all` asks found, size, colour and shape at once; `empty`: cells
    further than one cell from any centre that say nothing is there. `offset` is no percentage but
    the mean error in cells. Two things little more than a cell apart may both be read at the cell
    between them: one then counts as misread, if it is found or not.
    """
    net.eval()
    rows, quiet = [], []
    for pixels, things in loader:
        said = net(pixels)
        vectors = offsets(things, said["there"].shape[-2:]).flatten(3)  # [B,THINGS,2,cells]
        away = vectors.abs().amax(2)
        quiet.append((said["there"].flatten(1) < 0)[(away >= 1).all(1)])
        # [B,THINGS]
        score, cell = said["there"].flatten(1)[:, None].masked_fill(away >= 1, -torch.inf).max(2)
        right = {"found": score > 0}
        for column, kind in enumerate(KINDS, start=2):
            guess = said[kind].argmax(1).flatten(1).gather(1, cell)
            right[kind] = guess == things[..., column]
        right["all"] = torch.stack(list(right.values())).all(0)
        vector = vectors.gather(3, cell[:, :, None, None].expand(-1, -1, 2, 1))[..., 0]
        error = said["offset"].flatten(2).gather(2, cell[:, None].expand(-1, 2, -1)).mT - vector
        right["offset"] = error.norm(dim=-1) / 100
        rows.append(
            torch.stack([value.float() for value in right.values()], dim=-1)[things[..., 0] >= 0]
        )
    table = dict(zip(right, (100 * torch.cat(rows).mean(0)).tolist(), strict=True))
    return table | {"empty": 100 * torch.cat(quiet).float().mean().item()}


def train(net: SceneNet, loader: DataLoader, minutes: float, rate: float = 4e-3) -> int:
    """One pass over `loader`, shorter if `minutes` run out; returns the steps taken."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    started, steps = time.perf_counter(), len(loader)
    for step, (pixels, things) in enumerate(loader, start=1):
        done = max(step / steps, (time.perf_counter() - started) / (60 * minutes))
        if done > 1 and step < steps:
            return step - 1
        for group in optimizer.param_groups:  # a short rise, then half a cosine down to nothing
            group["lr"] = rate * min(step / 50, 0.5 + 0.5 * np.cos(np.pi * min(done, 1.0)))
        with torch.autocast("cpu", torch.bfloat16):
            said = net.train()(pixels)
        loss = loss_of(said, things)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            speed = step * len(pixels) / (time.perf_counter() - started)
            click.echo(
                f"step {step:,}/{steps:,}  loss {loss.item():.4f}  {speed:.0f} scenes/s  "
                f"{done:.0%} done"
            )
    return steps


def write_weights(net: SceneNet, path: Path, about: dict) -> None:
    """The backbone alone, with how it was made in the header; written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    state = {name: tensor.contiguous() for name, tensor in net.backbone.state_dict().items()}
    save_file(state, aside, metadata={"format": "pt", "onceover": json.dumps(about)})
    aside.replace(path)


@click.command(context_settings={"show_default": True})
@click.option("--steps", default=1200, help="Batches to train on.")
@click.option(
    "--minutes",
    default=60.0,
    help="Stop by then, the rate having fallen in time; fewer scenes, not the same weights.",
)
@click.option("--batch", default=96, help="Scenes a step.")
@click.option("--seed", default=0, help="Of the scenes and of the first weights.")
@click.option("--held-out", default=2000, help="Scenes to measure on.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=OUT, help="The weights file."
)
def main(steps: int, minutes: float, batch: int, seed: int, held_out: int, out: Path) -> None:
    """Train the drawn sample's backbone, test_resnet, from nothing, and measure it on held-out
    scenes.
    """
    torch.manual_seed(seed)
    net = SceneNet().to(memory_format=torch.channels_last)
    drawn = DrawnScenes(seed, TRAINING, steps * batch, net.side)
    click.echo(
        f"{len(drawn):,} scenes in {steps:,} steps of {batch}, at most {minutes:g} minutes -> {out}"
    )
    taken = train(net, DataLoader(drawn, batch, num_workers=1, prefetch_factor=4), minutes)
    table = evaluate(
        net, DataLoader(DrawnScenes(seed, HELD_OUT, held_out, net.side), 200, num_workers=1)
    )
    for name, value in table.items():
        click.echo(f"{name:8s}{value:8.2f}" + (" cells" if name == "offset" else " %"))
    about = {
        "made_by": "models/weights/pretrain.py",
        "architecture": ARCHITECTURE,
        "seed": seed,
        "batch": batch,
    }
    about |= {
        "steps": taken,
        "of_steps": steps,
        "minutes": minutes,
        "held_out": {name: round(value, 3) for name, value in table.items()},
    }
    about |= {"torch": torch.__version__, "timm": timm.__version__}
    write_weights(net, out, about)
    click.echo(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
