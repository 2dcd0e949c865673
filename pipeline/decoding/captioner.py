"""Generation of captions from regions and from photographs.

Validation, pipeline.evaluate and pipeline.caption use this module.

    captioner = load_captioner("runs/f8k")
    captioner.caption("photo.jpg")  # "a dog runs through the grass"
    captioner.generate(regions, num_beams=5, min_length=8)  # captions with log-probabilities
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
from data.images import Photograph, Photographs, UnreadableImage, as_photographs, describe
from data.segmentation import prompt_tokens, segmented
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
from pipeline.decoding.chat import Chat
from pipeline.decoding.consensus import Frequencies, expected_cider
from pipeline.decoding.options import NAMES
from pipeline.extraction.backbone import framing_of, place_backbone, regions_of_photos
from pipeline.extraction.registry import restore
from pipeline.runtime import Machine, open_machine
from pipeline.terminal import say

MAX_SEQUENCES = 4000  # maximum number of beams and samples that are in memory at a time


class Caption(NamedTuple):
    """A generated text.

    log_p: log-probability of its words and its end, in nats.
    score: log_p / words**length_penalty; with --consensus its expected CIDEr.
    """

    text: str
    log_p: float
    score: float

    def record(self) -> dict[str, Any]:
        """Return the entry for files with several captions per image."""
        return {"caption": self.text, "log_probability": self.log_p}


@dataclass(frozen=True)
class Consensus:
    """Options of minimum Bayes risk decoding.

    samples: number of samples per image.
    frequencies: document frequencies for CIDEr.
    """

    samples: int
    frequencies: Frequencies


@dataclass(frozen=True)
class CaptionGenerator:
    """Generates texts from regions: a decoder (or an Ensemble), its vocabulary and options.

    seed: seed of random samples.
    consensus: options of minimum Bayes risk decoding; None: no such decoding.
    answers: text of each class, for a decoder with classes.
    """

    captioner: Decoder
    vocabulary: Vocabulary
    machine: Machine
    options: Generation
    seed: int = 0
    consensus: Consensus | None = None
    answers: tuple[str, ...] = ()

    def __call__(
        self,
        regions: Regions,
        number: int = 0,
        prompts: Tensor | None = None,
        image: Sequence[int] | None = None,
    ) -> list[list[Caption]]:
        """Generate the texts of each example of a batch, best first.

        number: number of the batch. Random samples depend only on the seed and this number.
        prompts: [N,P] int64, padded on the left; None: no prompts.
        image: index of the image of each example; None: one example per image.

        Raises UserError if the memory is too small, or if no text of an example has a finite
        probability.
        """
        device = self.machine.device
        rng = None
        if self.options.do_sample or self.consensus:
            rng = torch.Generator(device).manual_seed((self.seed * 1_000_003 + number) % 2**63)
        try:
            with torch.inference_mode(), self.machine.autocast():
                memory = self.captioner.encode(Regions(*(part.to(device) for part in regions)))
                if image is not None:
                    memory = memory.keep(torch.tensor(image, device=device))
                prompts = None if prompts is None else prompts.to(device)
                if self.answers:
                    return self.best_answers(memory, prompts)
                if self.consensus is not None:
                    output = self.mbr_rerank(memory, rng, prompts)
                else:
                    output = generate(
                        self.captioner, memory, self.options, rng, self.search, prompts
                    )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory; use fewer beams or a smaller --batch: {str(error)[:200]}"
            ) from error
        texts = [
            [
                Caption(self.vocabulary.decode(ids), log_p, score)
                for ids, log_p, score in zip(*image_output, strict=True)
                if log_p > -torch.inf
            ]
            for image_output in zip(
                output.tokens.tolist(), output.log_p.tolist(), output.scores.tolist(), strict=True
            )
        ]
        if not all(texts):
            raise UserError(
                "no caption of an image has a finite probability: the features or the weights "
                "have values that are too large or not finite; check the cache with "
                "pipeline.extract --verify, or train with a lower --lr"
            )
        return texts

    def best_answers(self, memory: Memory, prompts: Tensor | None) -> list[list[Caption]]:
        """Return the answers of the `num_return_sequences` most likely classes of each example.

        The score of an answer is its probability.
        """
        first = first_tokens(memory.images, self.options.bos_token_id, memory.device, prompts)
        cache = self.captioner.init_cache(memory, 1, prompts)
        logits = self.captioner.class_logits(first[:, None], memory, cache).float()
        count = min(self.options.num_return_sequences, len(self.answers))
        probabilities, classes = (value.tolist() for value in logits.softmax(1).topk(count))
        return [
            [
                Caption(self.answers[class_], math.log(max(p, 1e-45)), p)
                for p, class_ in zip(*row, strict=True)
            ]
            for row in zip(probabilities, classes, strict=True)
        ]

    def mbr_rerank(
        self, memory: Memory, rng: torch.Generator | None, prompts: Tensor | None = None
    ) -> Captions:
        """Generate captions by beam search, and rank them by expected CIDEr (minimum Bayes risk).

        The expected CIDEr becomes the score. Images are processed in parts to bound the memory.
        """
        assert self.consensus is not None
        beams, samples = self.options.num_beams, self.consensus.samples
        count = self.options.num_return_sequences
        search = replace(self.options, num_return_sequences=beams)
        sampling = replace(self.options, num_beams=1, do_sample=True, num_return_sequences=samples)
        images_per_part = max(1, MAX_SEQUENCES // (beams + samples))
        parts = []
        for images in torch.arange(memory.images, device=memory.device).split(images_per_part):
            part = memory.keep(images)
            part_prompts = None if prompts is None else prompts[images]
            sampled = generate(self.captioner, part, sampling, rng, prompts=part_prompts).tokens
            tokens, _, log_p = generate(self.captioner, part, search, prompts=part_prompts)
            pairs = zip(tokens.cpu().numpy(), sampled.cpu().numpy(), strict=True)
            cider = np.stack([expected_cider(*pair, self.consensus.frequencies) for pair in pairs])
            scores = torch.from_numpy(cider).to(log_p).masked_fill(log_p == -torch.inf, -torch.inf)
            scores, best = (value[:, :count] for value in scores.sort(descending=True, stable=True))
            rows = best[:, :, None].expand(-1, -1, tokens.shape[2])
            parts.append(Captions(tokens.gather(1, rows), scores, log_p.gather(1, best)))
        return Captions(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def with_all_classes(self) -> CaptionGenerator:
        """Return a generator that returns all classes of an example, the most probable first."""
        count = len(self.answers)
        options = replace(self.options, num_beams=count, num_return_sequences=count)
        return replace(self, options=options)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """Encode prompts to token ids: [N,P] int64, padded on the left; None if all are empty.

        A prompt longer than `max_prompt` loses its first tokens, as in training.
        """
        if not any(prompts):
            return None
        max_prompt, segment = self.captioner.config.max_prompt, self.vocabulary.segment
        ids = [self.vocabulary.encode(prompt_tokens(prompt, segment)) for prompt in prompts]
        ids = [last_tokens(tokens, max_prompt) for tokens in ids]
        longest = max(map(len, ids))
        if not longest:
            return None
        padded = [[PAD] * (longest - len(tokens)) + tokens for tokens in ids]
        return torch.tensor(padded, dtype=torch.int64)

    @functools.cached_property
    def search(self) -> BeamSearch:
        """The beam search. It is reused, because it may hold CUDA graphs."""
        return BeamSearch(self.captioner, self.options)


def generate_texts(
    generator: CaptionGenerator,
    cache: FeatureCache | NoFeatures,
    examples: Sequence[Example],
    batch: int = 100,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int | str, list[Caption]]:
    """Generate the texts of examples from cached features.

    batch: examples per batch. Examples of one image in a batch share its encoding.
    done: function that is called with the number of examples of each finished batch.

    Returns the texts by example id, best first.
    """

    def generate_batch(numbered: tuple[int, Sequence[Example]]) -> list[list[Caption]]:
        number, chosen = numbered
        image_ids = list(dict.fromkeys(example.image_id for example in chosen))
        image = None
        if len(image_ids) < len(chosen):
            index = {image_id: i for i, image_id in enumerate(image_ids)}
            image = [index[example.image_id] for example in chosen]
        prompts = generator.encode_prompts([example.prompt for example in chosen])
        return generator(read_regions(cache, image_ids), number, prompts, image)

    texts: dict[int | str, list[Caption]] = {}
    batches = list(iterate(examples, batch))
    with evaluating(generator.captioner):
        outputs = on_every_core(generate_batch, list(enumerate(batches)), generator.machine)
        for chosen, batch_texts in zip(batches, outputs, strict=True):
            texts.update(zip((example.id for example in chosen), batch_texts, strict=True))
            done(len(chosen))
    return texts


def read_regions(cache: FeatureCache | NoFeatures, image_ids: Sequence[int | None]) -> Regions:
    """Read the regions of images from a cache. An image id of None has 0 regions."""
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
    """Generate the captions of images from cached features: `generate_texts` without prompts.

    Returns the captions by image id, best first.
    """
    examples = [Example(image_id, image_id, "", ()) for image_id in image_ids]
    captions = generate_texts(generator, cache, examples, batch, done)
    return cast(dict[int, list[Caption]], captions)  # the id of an example is its image id


def on_every_core(work: Callable, parts: Sequence, machine: Machine) -> Iterator:
    """Yield work(part) for each part, in order.

    On a CPU, one thread per core processes the parts in parallel. This is faster than one part at a
    time on all cores, because decoding has many small matrix products, and each of them would wait
    for the slowest core (10 % on an idle machine, more on a busy one).
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
            # set_num_threads in the pool also changes the default of threads that start later
            torch.set_num_threads(cores)


def cast_linears_to_bf16(captioner: nn.Module, machine: Machine) -> None:
    """Store the weights of linear layers in bf16, if the precision is bf16.

    Autocast rounds the weights to bf16 at every call, so the captions do not change.
    """
    if machine.precision == "bf16":
        for module in captioner.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()


# ------------------------------------------------------------------------------------------ options


def make_generator(
    captioner: nn.Module,
    checkpoint: Checkpoint,
    machine: Machine,
    given: Mapping[str, Any],
    seed: int = 0,
) -> CaptionGenerator:
    """Create a CaptionGenerator.

    captioner: the decoder of the checkpoint, or an Ensemble.
    given: decoding options, which override the defaults of the run.
    seed: seed of random samples.
    """
    given = dict(given)
    samples = given.pop("consensus", None)
    consensus = None
    if samples:
        assert checkpoint.folder is not None  # set by load_checkpoint
        consensus = Consensus(samples, Frequencies.load(checkpoint.folder))
    options = make_generation(checkpoint.decoding, checkpoint.vocabulary, given)
    decoder = cast(Decoder, captioner)  # an Ensemble has the methods that generation calls
    return CaptionGenerator(
        decoder, checkpoint.vocabulary, machine, options, seed, consensus, checkpoint.answers
    )


def make_generation(
    defaults: Mapping[str, Any], vocabulary: Vocabulary, given: Mapping[str, Any]
) -> Generation:
    """Create Generation options from `given` and the `defaults` of a run.

    Raises ModelError for invalid options.
    """
    options = {**defaults, **given}
    for name in ("bad_words", "force_words"):
        if name in options:
            options[name] = phrase_ids(options[name], vocabulary, name == "force_words")
    return Generation(**{NAMES.get(name, name): value for name, value in options.items()})


def phrase_ids(
    phrases: Sequence[str], vocabulary: Vocabulary, must_be_known: bool
) -> tuple[tuple[int, ...], ...]:
    """Encode phrases to token ids.

    A phrase without words or with an unknown word is left out with a message. It raises ModelError
    if `must_be_known`.
    """
    ids = []
    for phrase in phrases:
        words = segmented(phrase, vocabulary.segment)
        unknown = [
            word for word in words if any(token <= UNK for token in vocabulary.encode([word]))
        ]
        if words and not unknown:
            ids.append(tuple(vocabulary.encode(words)))
            continue
        reason = "it has no words"
        if unknown:
            reason = f"the captioner's vocabulary does not have {', '.join(map(repr, unknown))}"
        if must_be_known:
            raise ModelError(f"force_words_ids: {phrase!r} cannot be generated: {reason}")
        say(f"{phrase!r} is not forbidden, because no caption can have it: {reason}")
    return tuple(ids)


# -------------------------------------------------------------------------------------- photographs


class PhotoCaptioner(
    ModelHubMixin, library_name="onceover", pipeline_tag="image-to-text", model_card_template=CARD
):
    """Captions photographs with a checkpoint and its backbone.

    The `options` of its methods are the fields of models.generation.options.Generation, which have
    the names of Hugging Face's generate, and `bad_words` and `force_words` (phrases as text).
    `save_pretrained` and `push_to_hub` come from huggingface_hub.
    """

    # prevents that the mixin creates a config from the arguments of __init__
    _hub_mixin_config: Any = {}  # noqa: RUF012

    # maximum number of pixels of a photograph; larger ones are unreadable; None: Pillow's limit
    max_pixels: int | None = None

    def __init__(
        self, checkpoint: Checkpoint, backbone: Backbone | None, machine: Machine, folder: Path
    ) -> None:
        self.checkpoint, self.machine, self.folder = checkpoint, machine, folder
        self.captioner = checkpoint.captioner.to(machine.device)
        cast_linears_to_bf16(self.captioner, machine)
        # None: the decoder reads no images
        self.backbone = None if backbone is None else place_backbone(backbone, machine)
        # the last generator by its options: the next batch usually has the same options
        self.generators: dict[str, CaptionGenerator] = {}

    def check_use(self, has_questions: bool) -> None:
        """Check that the checkpoint was trained for this use.

        has_questions: True to answer questions, False to caption.

        Raises UserError if the checkpoint was trained on questions and `has_questions` is False, or
        the reverse.
        """
        task = self.checkpoint.new_task()
        if task.exclusive:
            raise UserError(
                f"{self.folder} was trained on labels; use it with python -m pipeline.classify"
            )
        if has_questions and not self.captioner.config.max_prompt:
            raise UserError(f"{self.folder} was not trained on questions; train with --task vqa")
        if not has_questions and self.captioner.config.max_prompt:
            raise UserError(
                f"{self.folder} was trained on questions, not on captions; ask it with python -m "
                "pipeline.ask"
            )

    def generate(
        self, regions: Regions, seed: int = 0, number: int = 0, **options: Any
    ) -> list[list[Caption]]:
        """Generate `num_return_sequences` captions of each image, best first.

        seed, number: seed of random samples and number of the batch; the samples depend on both.

        Raises UserError if the checkpoint was trained on questions.
        """
        self.check_use(has_questions=False)
        key = repr((seed, sorted(options.items())))
        if key not in self.generators:
            self.generators = {
                key: make_generator(self.captioner, self.checkpoint, self.machine, options, seed)
            }
        return self.generators[key](regions, number)

    def caption(
        self, photos: Photograph | Sequence[Photograph], batch: int = 16, **options: Any
    ) -> str | list[str]:
        """Return the caption of a photograph, or the captions of a list of photographs.

        photos: a photograph is a path, a PIL image, the bytes of an image file, or a uint8 array
            [H,W], [H,W,3] or [H,W,4]. A list may have photographs of several types.
        batch: photographs per batch.

        Raises NotAPhotograph (a TypeError) for another type, and UnreadableImage for the first
        photograph that cannot be read.
        """
        photographs, is_single = as_photographs(photos)
        texts: list[str] = []
        for number, chosen in enumerate(iterate(photographs, batch)):
            results = self.try_caption(chosen, number=number, **options)
            for photo, (captions, reason) in zip(chosen, results, strict=True):
                if reason:
                    raise UnreadableImage(f"{describe(photo, len(texts))}: {reason}")
                texts.append(captions[0].text)
        return texts[0] if is_single else texts

    def try_caption(
        self, photos: Sequence[Photograph], **options: Any
    ) -> list[tuple[list[Caption], str]]:
        """Caption one batch of photographs, and report unreadable ones.

        Returns (captions, "") for each readable photograph, and ([], reason) for each unreadable
        one.
        """
        regions, reasons = self.extract(photos)
        remaining = iter([] if regions is None else self.generate(regions, **options))
        return [([] if reason else next(remaining), reason) for reason in reasons]

    def extract(self, photos: Sequence[Photograph]) -> tuple[Regions | None, list[str]]:
        """Extract the regions of the readable photographs.

        Returns (regions, reasons): the regions, None if no photograph is readable, and for each
        photograph the reason why it is unreadable, "" if it is readable.
        """
        if self.backbone is None:
            rows = NoFeatures().rows([0] * len(photos))
            return Regions(*map(torch.from_numpy, rows)), [""] * len(photos)
        photographs = Photographs(photos, framing_of(self.backbone, self.max_pixels))
        decoded = [photographs[i] for i in range(len(photographs))]
        reasons = [reason for _, reason in decoded]
        readable = [photo for photo, _ in decoded if photo is not None]
        if not readable:
            return None, reasons
        return regions_of_photos(self.backbone, readable, self.machine), reasons

    def answers(
        self, photo: Photograph, questions: Sequence[str], count: int = 5, **options: Any
    ) -> list[list[Caption]]:
        """Answer questions about a photograph: the `count` best answers to each, best first.

        The photograph is encoded once. Raises UnreadableImage, and UserError if the checkpoint was
        not trained on questions.
        """
        self.check_use(has_questions=True)
        regions, (reason,) = self.extract([photo])
        if regions is None:
            raise UnreadableImage(f"{describe(photo, 0)}: {reason}")
        beams = max(count, self.checkpoint.decoding["beam"])
        options = {"num_beams": beams, **options, "num_return_sequences": count}
        task = self.checkpoint.new_task()
        prompts = [task.prompt(question) for question in questions]
        return self.continue_prompts(regions, prompts, options)

    def continue_prompts(
        self, regions: Regions, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> list[list[Caption]]:
        """Generate the texts after prompts about one photograph, the best first.

        regions: of the photograph. options: decoding options.
        """
        generator = make_generator(self.captioner, self.checkpoint, self.machine, options)
        return generator(regions, 0, generator.encode_prompts(prompts), [0] * len(prompts))

    def classify(
        self, photo: Photograph | None, texts: str | Sequence[str] = ""
    ) -> dict[str, float] | list[dict[str, float]]:
        """Return the probability of each label of a photograph with a text, the best first.

        photo: as in `caption`; None for a decoder that reads no images. texts: a text, or several
            texts about the photograph; the result then is a list.

        Raises UnreadableImage, and UserError if the checkpoint was not trained on labels.
        """
        task = self.checkpoint.new_task()
        if not task.exclusive:
            raise UserError(
                f"{self.folder} was trained for --task {task.name}, not on labels; train with "
                "--task sentiment"
            )
        if photo is None and task.uses_images:
            raise UserError(f"{self.folder} reads images; pass a photograph")
        given = [texts] if isinstance(texts, str) else [*texts]
        shown = b"" if photo is None else photo
        regions, (reason,) = self.extract([shown])
        if regions is None:
            raise UnreadableImage(f"{describe(shown, 0)}: {reason}")
        prompts = [text if task.reads_texts else "" for text in given]
        generator = make_generator(self.captioner, self.checkpoint, self.machine, {})
        generator = generator.with_all_classes()
        classes = generator(regions, 0, generator.encode_prompts(prompts), [0] * len(given))
        labels = [{each.text: each.score for each in group} for group in classes]
        return labels[0] if isinstance(texts, str) else labels

    def answer(self, photo: Photograph, question: str | Sequence[str]) -> str | list[str]:
        """Return the best answer to a question about a photograph, or to each of a list of
        questions.
        """
        questions = [question] if isinstance(question, str) else question
        texts = [answers[0].text for answers in self.answers(photo, questions, 1)]
        return texts[0] if isinstance(question, str) else texts

    def chat(self, photo: Photograph, caption: str = "") -> Chat:
        """Begin a conversation about a photograph: pipeline.decoding.chat.Chat.

        caption: the caption of the photograph, which dialogues of VisDial begin with.

        Raises UnreadableImage, and UserError if the checkpoint was not trained on dialogues.
        """
        return Chat(self, photo, caption)

    # `options` takes the arguments of the mixin's method, such as `revision`
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Path | str, *, device: str = "auto", precision: str = "auto", **options: Any
    ) -> PhotoCaptioner:
        """Open a checkpoint folder, or `user/name` from the hub.

        options: arguments of huggingface_hub's snapshot_download.
        """
        folder = (
            Path(name) if Path(name).is_dir() else checkpoint_folder(f"{SCHEME}{name}", **options)
        )
        return load_captioner(folder, device, precision)

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> str | None:
        """Write the files of the checkpoint and a model card.

        Files that only training needs are left out. options: arguments of huggingface_hub's
        save_pretrained. Raises UserError if the folder is that of the checkpoint.
        """
        if Path(save_directory).resolve() == self.folder.resolve():
            raise UserError(f"{save_directory} is the checkpoint itself; pass another folder")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        copy_shared(self.folder, save_directory)


def load_captioner(
    path: Path | str, device: str = "auto", precision: str = "auto"
) -> PhotoCaptioner:
    """Open a checkpoint folder, or `hf-hub:user/name`, to caption photographs.

    device: "auto", "cpu", "cuda" or "mps". precision: "auto", "fp32" or "bf16".
    """
    folder = checkpoint_folder(path)
    checkpoint = load_checkpoint(folder)
    without_images = checkpoint.identity == NoFeatures.identity
    backbone = None if without_images else restore(folder, checkpoint.identity)
    return PhotoCaptioner(checkpoint, backbone, open_machine(device, precision=precision), folder)
