"""Captions from regions and from photographs: what train's validation, evaluate and caption share.

captioner = load_captioner("runs/f8k")
captioner.caption("photo.jpg")                                 # "a dog runs through the grass"
captioner.generate(regions, num_beams=5, min_length=8)         # for each image its captions with
                                                               their log p
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from data.batches import last_tokens, zeros_elsewhere
from data.cache.no_features import NoFeatures
from data.cache.reader import FeatureCache, iterate
from data.examples import Example
from data.images import Photograph, Photographs, UnreadableImage, as_photographs, describe, stack
from data.segmentation import segmented
from data.vocabulary import PAD, UNK, Vocabulary
from models import ModelError
from models.backbones.interface import Backbone
from models.decoders.interface import Decoder, Memory, evaluating
from models.generation.cuda_graph import BeamSearch
from models.generation.generate import generate
from models.generation.options import Captions, Generation, first_tokens
from models.regions import Regions
from pipeline.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pipeline.checkpoints.hub import CARD, SCHEME, checkpoint_folder, copy_shared
from pipeline.cli import UserError, is_out_of_memory
from pipeline.decoding.consensus import Frequencies, expected_cider
from pipeline.decoding.options import NAMES
from pipeline.extraction.backbone import extract_regions, framing_of, place_backbone
from pipeline.extraction.registry import restore
from pipeline.runtime import Machine, open_machine
from pipeline.terminal import say

TOGETHER = 4000  # beams and samples that are in memory at a time


class Caption(NamedTuple):
    """A caption, the log-probability of its words and its end in nats, and its score: log_p /
    words**length_penalty (with consensus: its expected CIDEr).
    """

    text: str
    log_p: float
    score: float

    def record(self) -> dict[str, Any]:
        """The caption as an entry of files with several captions per image."""
        return {"caption": self.text, "log_probability": self.log_p}


@dataclass(frozen=True)
class Consensus:
    """Number of samples per image for minimum Bayes risk decoding, and the document frequencies of
    CIDEr.
    """

    samples: int
    frequencies: Frequencies


@dataclass(frozen=True)
class CaptionGenerator:
    """Turns regions into texts: a decoder (or an Ensemble) with its vocabulary and options, on a
    machine.
    """

    captioner: Decoder
    vocabulary: Vocabulary
    machine: Machine
    options: Generation
    seed: int = 0  # of samples
    consensus: Consensus | None = None
    answers: tuple[str, ...] = ()  # of a decoder with classes

    def __call__(
        self,
        regions: Regions,
        number: int = 0,
        prompts: Tensor | None = None,
        image: Sequence[int] | None = None,
    ) -> list[list[Caption]]:
        """Generate the texts of each example of a batch, best first. Samples follow from the seed
        and the batch's `number`.

        prompts: [N,P] int64, padded on the left; None: no prompts. image: the image of each
        example; None: one example per image.
        """
        device = self.machine.device
        seed = (self.seed * 1_000_003 + number) % 2**63
        draws = (
            torch.Generator(device).manual_seed(seed)
            if self.options.do_sample or self.consensus
            else None
        )
        try:
            with torch.inference_mode(), self.machine.autocast():
                memory = self.captioner.encode(Regions(*(part.to(device) for part in regions)))
                if image is not None:
                    memory = memory.keep(torch.tensor(image, device=device))
                prompts = None if prompts is None else prompts.to(device)
                if self.answers:
                    return self.best_answers(memory, prompts)
                if self.consensus is not None:
                    found = self.mbr_rerank(memory, draws, prompts)
                else:
                    found = generate(
                        self.captioner, memory, self.options, draws, self.search, prompts
                    )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory; use fewer beams or a smaller --batch: {str(error)[:200]}"
            ) from error
        captions = [
            [
                Caption(self.vocabulary.decode(row), *pair)
                for row, *pair in zip(*of_image, strict=True)
                if pair[0] > -torch.inf
            ]
            for of_image in zip(
                found.tokens.tolist(), found.log_p.tolist(), found.scores.tolist(), strict=True
            )
        ]
        if not all(captions):
            raise UserError(
                "no caption of an image has a finite probability: its features or the weights "
                "hold numbers that are too large "
                "or not finite; check the cache with pipeline.extract --verify, or train with "
                "a lower --lr"
            )
        return captions

    def best_answers(self, memory: Memory, prompts: Tensor | None) -> list[list[Caption]]:
        """The num_return_sequences best classes of each example; their score is the probability."""
        first = first_tokens(memory.images, self.options.bos_token_id, memory.device, prompts)
        cache = self.captioner.init_cache(memory, 1, prompts)
        logits = self.captioner.class_logits(first[:, None], memory, cache).float()
        best = logits.softmax(1).topk(min(self.options.num_return_sequences, len(self.answers)))
        return [
            [
                Caption(self.answers[number], math.log(max(p, 1e-45)), p)
                for p, number in zip(*row, strict=True)
            ]
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def mbr_rerank(
        self, memory: Memory, draws: torch.Generator | None, prompts: Tensor | None = None
    ) -> Captions:
        """Rerank the beams of each image by expected CIDEr, which becomes their score (minimum
        Bayes risk).

        Images are processed in parts to bound memory.
        """
        assert self.consensus is not None
        beams, samples = self.options.num_beams, self.consensus.samples
        wanted = self.options.num_return_sequences
        search = replace(self.options, num_return_sequences=beams)
        draw = replace(self.options, num_beams=1, do_sample=True, num_return_sequences=samples)
        parts = []
        for images in torch.arange(memory.images, device=memory.device).split(
            max(1, TOGETHER // (beams + samples))
        ):
            part = memory.keep(images)
            read = None if prompts is None else prompts[images]
            drawn = generate(self.captioner, part, draw, draws, prompts=read).tokens.cpu().numpy()
            tokens, _, log_p = generate(self.captioner, part, search, prompts=read)
            pairs = zip(tokens.cpu().numpy(), drawn, strict=True)
            cider = np.stack([expected_cider(*pair, self.consensus.frequencies) for pair in pairs])
            scores = torch.from_numpy(cider).to(log_p).masked_fill(log_p == -torch.inf, -torch.inf)
            scores, best = (
                value[:, :wanted] for value in scores.sort(descending=True, stable=True)
            )
            rows = best[:, :, None].expand(-1, -1, tokens.shape[2])
            parts.append(Captions(tokens.gather(1, rows), scores, log_p.gather(1, best)))
        return Captions(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """Token ids of prompts, [N,P] int64 padded on the left; None if all are empty.

        A prompt longer than `max_prompt` loses its first tokens, as in training.
        """
        if not any(prompts):
            return None
        most, segment = self.captioner.config.max_prompt, self.vocabulary.segment
        ids = [self.vocabulary.encode(segmented(prompt, segment)) for prompt in prompts]
        ids = [last_tokens(tokens, most) for tokens in ids]
        longest = max(map(len, ids))
        return (
            torch.tensor(
                [[PAD] * (longest - len(tokens)) + tokens for tokens in ids], dtype=torch.int64
            )
            if longest
            else None
        )

    @functools.cached_property
    def search(self) -> BeamSearch:
        return BeamSearch(self.captioner, self.options)


def generate_texts(
    generator: CaptionGenerator,
    cache: FeatureCache | NoFeatures,
    examples: Sequence[Example],
    batch: int = 100,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int | str, list[Caption]]:
    """Generate the texts of each example over cached features: {example id: texts, best first}.

    Consecutive examples of one image share its encoding. done: called with the size of each
    finished batch.
    """
    texts: dict[int | str, list[Caption]] = {}

    def generate_batch(numbered: tuple[int, Sequence[Example]]) -> list[list[Caption]]:
        number, chosen = numbered
        image_ids = list(dict.fromkeys(example.image_id for example in chosen))
        place = {image_id: at for at, image_id in enumerate(image_ids)}
        image = (
            None
            if len(image_ids) == len(chosen)
            else [place[example.image_id] for example in chosen]
        )
        regions = rows_of(cache, image_ids)
        return generator(
            regions, number, generator.encode_prompts([example.prompt for example in chosen]), image
        )

    batches = list(iterate(examples, batch))
    with evaluating(generator.captioner):
        found = on_every_core(generate_batch, list(enumerate(batches)), generator.machine)
        for chosen, texts_of_batch in zip(batches, found, strict=True):
            texts.update(zip((example.id for example in chosen), texts_of_batch, strict=True))
            done(len(chosen))
    return texts


def rows_of(cache: FeatureCache | NoFeatures, image_ids: Sequence[int | None]) -> Regions:
    """The regions of images in a cache. An image id of None has 0 regions."""
    ids = [image_id for image_id in image_ids if image_id is not None]
    parts = [torch.from_numpy(part) for part in cache.rows(ids)]
    if len(ids) == len(image_ids):
        return Regions(*parts)
    rows = [row for row, image_id in enumerate(image_ids) if image_id is not None]
    return Regions(*(zeros_elsewhere(part, rows, len(image_ids)) for part in parts))


def caption_rows(
    generator: CaptionGenerator,
    cache: FeatureCache,
    image_ids: Sequence[int],
    batch: int = 100,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int, list[Caption]]:
    """Generate captions by image id over cached features: `generate_texts` without prompts."""
    found = generate_texts(
        generator,
        cache,
        [Example(image_id, image_id, "", ()) for image_id in image_ids],
        batch,
        done,
    )
    return cast(dict[int, list[Caption]], found)  # the examples' ids are those of the images


def on_every_core(work: Callable, parts: Sequence, machine: Machine) -> Iterator:
    """Yield work(part) for each part, in order. On a CPU one thread per core processes parts in
    parallel.

    This is faster than one part at a time with all cores, because decoding consists of many small
    products and each would wait for the slowest core (10 % on an idle machine, more on a busy one).
    """
    cores = torch.get_num_threads()
    threads = min(cores, len(parts)) if machine.device.type == "cpu" else 1
    if threads < 2:
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            yield from pool.map(work, parts)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            # what was set in the pool is what threads begun later would take
            torch.set_num_threads(cores)


def cast_linears_to_bf16(captioner: nn.Module, machine: Machine) -> None:
    """Store the weights of linear layers in bf16, as autocast would round them at every call.
    Captions do not change.
    """
    if machine.precision == "bf16":
        for module in captioner.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()


# ------------------------------------------------------------------------------------------ options


def make_writer(
    captioner: nn.Module,
    checkpoint: Checkpoint,
    machine: Machine,
    given: Mapping[str, Any],
    seed: int = 0,
) -> CaptionGenerator:
    """Make a CaptionGenerator from a run's decoding defaults, overridden by `given`."""
    given = dict(given)
    samples = given.pop("consensus", None)
    consensus = None
    if samples:
        assert checkpoint.folder is not None  # it was loaded from there
        consensus = Consensus(samples, Frequencies.load(checkpoint.folder))
    how = make_generation(checkpoint.decoding, checkpoint.vocabulary, given)
    decoder = cast(Decoder, captioner)  # an Ensemble has what generation asks of a decoder
    return CaptionGenerator(
        decoder, checkpoint.vocabulary, machine, how, seed, consensus, checkpoint.answers
    )


def make_generation(
    defaults: Mapping[str, Any], vocabulary: Vocabulary, given: Mapping[str, Any]
) -> Generation:
    """Make the Generation options from `given`, on top of a run's `defaults`; ModelError for
    invalid options.
    """
    options = {**defaults, **given}
    for name in ("bad_words", "force_words"):
        if name in options:
            options[name] = phrase_ids(options[name], vocabulary, name == "force_words")
    return Generation(**{NAMES.get(name, name): value for name, value in options.items()})


def phrase_ids(
    phrases: Sequence[str], vocabulary: Vocabulary, must_be_known: bool
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each phrase. A phrase with an unknown word is a ModelError if it is required;
    otherwise it is left out with a message.
    """
    found = []
    for phrase in phrases:
        words = segmented(phrase, vocabulary.segment)
        ids = vocabulary.encode(words)
        unknown = [
            word for word in words if any(number <= UNK for number in vocabulary.encode([word]))
        ]
        if words and not unknown:
            found.append(tuple(ids))
        elif must_be_known:
            raise ModelError(
                f"force_words_ids: {phrase!r}: {unknown or 'nothing'} is not in this captioner's "
                f"vocabulary"
            )
        else:
            say(
                f"no caption has {phrase!r} anyhow: {unknown or 'nothing'} is not in this "
                f"captioner's vocabulary"
            )
    return tuple(found)


# -------------------------------------------------------------------------------------- photographs


class PhotoCaptioner(
    ModelHubMixin, library_name="onceover", pipeline_tag="image-to-text", model_card_template=CARD
):
    """A checkpoint with its backbone: captions photographs.

    `options` are fields of models.generation.options.Generation, named as in Hugging Face's
    generate, and `bad_words` and `force_words`, phrases as text. `save_pretrained` and
    `push_to_hub` come from huggingface_hub.
    """

    # the mixin makes none of its own of what __init__ takes
    _hub_mixin_config: Any = {}  # noqa: RUF012

    max_pixels: int | None = None  # photographs of more are unreadable; None: Pillow's limit

    def __init__(
        self, checkpoint: Checkpoint, backbone: Backbone, machine: Machine, folder: Path
    ) -> None:
        self.checkpoint, self.machine, self.folder = checkpoint, machine, folder
        self.captioner = checkpoint.captioner.to(machine.device)
        cast_linears_to_bf16(self.captioner, machine)
        self.backbone = place_backbone(backbone, machine)
        # the last one is kept: the next batch mostly has the same options
        self.writers: dict[str, CaptionGenerator] = {}

    def generate(
        self, regions: Regions, seed: int = 0, number: int = 0, **options: Any
    ) -> list[list[Caption]]:
        """Captions of each image of `regions`, num_return_sequences per image, best first."""
        asked = repr((seed, sorted(options.items())))
        if asked not in self.writers:
            self.writers = {
                asked: make_writer(self.captioner, self.checkpoint, self.machine, options, seed)
            }
        return self.writers[asked](regions, number)

    def caption(
        self, photos: Photograph | Sequence[Photograph], batch: int = 16, **options: Any
    ) -> str | list[str]:
        """The caption of a photograph, or the captions of a list of them.

        A photograph is a path, a PIL image, the bytes of an image file or a uint8 array [H,W],
        [H,W,3] or [H,W,4]; a list may mix them. Raises NotAPhotograph (a TypeError) for anything
        else, and UnreadableImage, with the path in front, for the first photograph that cannot be
        read.
        """
        photographs, one = as_photographs(photos)
        captions: list[str] = []
        for number, chosen in enumerate(iterate(photographs, batch)):
            found = self.try_caption(chosen, number=number, **options)
            for photo, (written, reason) in zip(chosen, found, strict=True):
                if reason:
                    raise UnreadableImage(f"{describe(photo, len(captions))}: {reason}")
                captions.append(written[0].text)
        return captions[0] if one else captions

    def try_caption(
        self, photos: Sequence[Photograph], **options: Any
    ) -> list[tuple[list[Caption], str]]:
        """Caption one batch of photographs: (captions, "") for each one, ([], reason) for
        unreadable ones.
        """
        regions, reasons = self.extract(photos)
        captions = iter([] if regions is None else self.generate(regions, **options))
        return [([] if reason else next(captions), reason) for reason in reasons]

    def extract(self, photos: Sequence[Photograph]) -> tuple[Regions | None, list[str]]:
        """The regions of the readable photographs, and for each photograph why it is unreadable
        ("" if it is readable). None: no photograph is readable.
        """
        photographs = Photographs(photos, framing_of(self.backbone, self.max_pixels))
        read = [photographs[i] for i in range(len(photographs))]
        reasons = [reason for _, reason in read]
        good = [photo for photo, _ in read if photo is not None]
        if not good:
            return None, reasons
        pixels, frames = stack(good)
        return extract_regions(self.backbone, pixels, self.machine, frames), reasons

    def answers(
        self, photo: Photograph, questions: Sequence[str], count: int = 5, **options: Any
    ) -> list[list[Caption]]:
        """The `count` best answers to each question about a photograph, best first.

        The photograph is encoded once. Raises UnreadableImage, and UserError for a checkpoint that
        was not trained on questions.
        """
        if not self.captioner.config.max_prompt:
            raise UserError(f"{self.folder} was not trained on questions; train with --task vqa")
        regions, (reason,) = self.extract([photo])
        if regions is None:
            raise UnreadableImage(f"{describe(photo, 0)}: {reason}")
        beams = max(count, self.checkpoint.decoding["beam"])
        options = {"num_beams": beams, **options, "num_return_sequences": count}
        generator = make_writer(self.captioner, self.checkpoint, self.machine, options)
        return generator(regions, 0, generator.encode_prompts(questions), [0] * len(questions))

    def answer(self, photo: Photograph, question: str | Sequence[str]) -> str | list[str]:
        """The best answer to a question about a photograph, or those to a list of questions."""
        questions = [question] if isinstance(question, str) else question
        best = [found[0].text for found in self.answers(photo, questions, 1)]
        return best[0] if isinstance(question, str) else best

    # the mixin's own arguments, as `revision`, are among `options`
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Path | str, *, device: str = "auto", precision: str = "auto", **options: Any
    ) -> PhotoCaptioner:
        """Open a checkpoint folder, or `user/name` from the hub. options: those of
        huggingface_hub's snapshot_download.
        """
        folder = (
            Path(name) if Path(name).is_dir() else checkpoint_folder(f"{SCHEME}{name}", **options)
        )
        return load_captioner(folder, device, precision)

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> str | None:
        """Write the checkpoint's files, without those that only training needs, and a model
        card.
        """
        if Path(save_directory).resolve() == self.folder.resolve():
            raise UserError(f"{save_directory} is the checkpoint itself; name another folder")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        copy_shared(self.folder, save_directory)


def load_captioner(
    path: Path | str, device: str = "auto", precision: str = "auto"
) -> PhotoCaptioner:
    """Open a checkpoint folder, or `hf-hub:user/name`, to caption photographs. It needs no other
    file.
    """
    folder = checkpoint_folder(path)
    checkpoint = load_checkpoint(folder)
    backbone = restore(folder, checkpoint.identity)
    return PhotoCaptioner(checkpoint, backbone, open_machine(device, precision=precision), folder)
