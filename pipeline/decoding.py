"""Captions from regions and from photographs: what train's validation, evaluate and caption share.

    captioner = load_captioner("runs/f8k")
    captioner.caption(["photo.jpg"])       # ["a dog runs through the grass"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.features import FeatureCache, iterate
from data.images import Photographs, UnreadableImage, stack
from data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from models.backbones import Backbone
from models.captioner import Captioner
from models.grid import Regions
from models.search import beam_search
from pipeline.backbone import framing_of, look, place_backbone, restore_backbone
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.runtime import Machine, open_machine


def decode_regions(
    captioner: Captioner, vocabulary: Vocabulary, regions: Regions, machine: Machine, beam: int, length_penalty: float
) -> list[str]:
    """One caption for each image of `regions`, on `machine`'s device, by beam search."""
    with torch.inference_mode(), machine.autocast():
        memory = captioner.encode(regions)
        tokens, _ = beam_search(
            captioner, memory, beam, captioner.config.max_length, BOS, EOS, (PAD, BOS, UNK), length_penalty
        )
    return [vocabulary.decode(row) for row in tokens.tolist()]


def caption_rows(
    captioner: Captioner,
    vocabulary: Vocabulary,
    cache: FeatureCache,
    image_ids: Sequence[int],
    machine: Machine,
    beam: int,
    length_penalty: float,
    batch: int = 50,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int, str]:
    """Captions by image id, over cached features; `done` is told of each batch's size."""
    training = captioner.training
    captioner.eval()
    captions: dict[int, str] = {}
    for chosen in iterate(image_ids, batch):
        regions = Regions(*(torch.from_numpy(part).to(machine.device) for part in cache.rows(chosen)))
        found = decode_regions(captioner, vocabulary, regions, machine, beam, length_penalty)
        captions.update(zip(chosen, found, strict=True))
        done(len(chosen))
    captioner.train(training)
    return captions


class PhotoCaptioner:
    """A checkpoint with its backbone: photographs in, captions out."""

    def __init__(self, checkpoint: Checkpoint, backbone: Backbone, machine: Machine) -> None:
        self.checkpoint, self.machine = checkpoint, machine
        self.captioner = checkpoint.captioner.to(machine.device)
        self.backbone = place_backbone(backbone, machine)

    def caption(
        self, photos: Sequence[Path | str], beam: int | None = None, length_penalty: float | None = None, batch: int = 16
    ) -> list[str]:
        """One caption a photograph; UnreadableImage, with the path in front, for the first that cannot be read."""
        captions: list[str] = []
        for chosen in iterate(list(photos), batch):
            found = self.try_caption([Path(photo) for photo in chosen], beam, length_penalty)
            for photo, (caption, reason) in zip(chosen, found, strict=True):
                if reason:
                    raise UnreadableImage(f"{photo}: {reason}")
                captions.append(caption)
        return captions

    def try_caption(
        self, photos: Sequence[Path], beam: int | None = None, length_penalty: float | None = None
    ) -> list[tuple[str, str]]:
        """(caption, "") for each photograph of one batch, ("", reason) for an unreadable one."""
        decoding = self.checkpoint.decoding
        read = [*Photographs(photos, framing_of(self.backbone, self.checkpoint.identity["resize"]))]
        good = [i for i, (photo, _) in enumerate(read) if photo is not None]
        captions: list[str] = []
        if good:
            pixels, frames = stack([read[i][0] for i in good])
            regions = look(self.backbone, pixels, self.machine, frames)
            captions = decode_regions(
                self.captioner,
                self.checkpoint.vocabulary,
                regions,
                self.machine,
                decoding["beam"] if beam is None else beam,
                decoding["length_penalty"] if length_penalty is None else length_penalty,
            )
        found = dict(zip(good, captions, strict=True))
        return [(found.get(i, ""), reason) for i, (_, reason) in enumerate(read)]


def load_captioner(path: Path | str, device: str = "auto", precision: str = "auto") -> PhotoCaptioner:
    """Open a checkpoint folder to caption photographs with; it needs no other file and no flag."""
    folder = Path(path)
    checkpoint = load_checkpoint(folder)
    backbone = restore_backbone(folder, checkpoint.identity)
    return PhotoCaptioner(checkpoint, backbone, open_machine(device, precision=precision))
