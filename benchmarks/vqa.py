"""Visual question answering: the speed of a training step and of answers from a cache.

    python -m benchmarks.vqa [--rounds 3] [--regions 49] [--device cuda] [--out FILE]

A step computes the loss and the gradient of 64 images with six questions each, and updates the
weights with AdamW. The decoder has preset base (3+3 layers, width 512, dropout 0.1), features of
2048 channels and random weights. Questions have 8 to 14 random words of a vocabulary of 10,000.
Labels are soft labels of 3,129 answers.

twin   our weights in the usual simple implementation: the image is encoded for each question, and
       questions are padded to the longest
hf     Hugging Face's VisualBertForQuestionAnswering of the same width, with 6 layers and its own
       loss: features are `visual_embeds`, repeated for each question; questions are padded to the
       longest, between a first and a last token

All take turns in one process, in the machine's precision. Rates are medians; ratios are medians of
the ratios of the rounds. `of_limit` is the achieved share of the operations per second of the
fastest matrix product. Only necessary operations count: without padding and repeated images, and in
the last decoder layer only the keys and values of the question and the row that the answer is read
from. Memory is the peak of a first step above the weights (on a CPU each in its own process).

Then questions about images of a cache with 49 regions are answered by `generate_texts`, as in
pipeline.evaluate. Memory is the peak above the weights. On a CPU it includes the pages of the cache
that the system maps, which are counted although the system can free them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cache import make_cache
from benchmarks.measure import (
    header,
    in_turn,
    memory_alone,
    peak_of,
    ratio,
    report,
    seconds_of,
    waiter,
    why_fp32,
)
from benchmarks.peers import (
    CHANNELS,
    WORDS,
    encoder_operations,
    import_transformers,
    limit,
    median_rate,
    random_regions,
    training_step,
)
from data.batches import Batch
from data.cache.reader import FeatureCache
from data.examples import Example
from data.vocabulary import BOS, EOS, PAD, SPECIALS, Vocabulary
from models.decoders.attention import Packed
from models.decoders.interface import Decoder
from models.decoders.registry import create_decoder
from models.decoders.transformer import TransformerConfig
from models.generation.options import Generation
from models.regions import Regions
from pipeline.decoding.captioner import CaptionGenerator, cast_linears_to_bf16, generate_texts
from pipeline.runtime import Machine, open_machine
from pipeline.training.objectives import supervised_loss

IMAGES, QUESTIONS, CLASSES = 64, 6, 3129
SHORTEST, LONGEST = 8, 14  # words of a question
CONTENDERS = ("ours", "twin", "hf")


@click.command(context_settings={"show_default": True})
@click.option("--rounds", default=3, help="timed rounds")
@click.option("--regions", multiple=True, default=(49, 100), help="regions per image")
@click.option("--dropout", default=0.1, help="dropout of all implementations")
@click.option("--questions", default=5000, help="questions to answer from a cache; 0: none")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--ours-alone", is_flag=True, help="without the twin and Hugging Face's model")
@click.option("--out", type=click.Path(path_type=Path), help="also write the figures here, as JSON")
@click.option("--only-memory", hidden=True)
def main(
    rounds: int,
    regions: tuple[int, ...],
    dropout: float,
    questions: int,
    device: str,
    ours_alone: bool,
    out: Path | None,
    only_memory: str | None,
) -> None:
    """Time training steps and answers, and measure their memory."""
    machine = open_machine(device)
    if only_memory:
        click.echo(memory_of(only_memory, machine, regions[0], dropout, questions))
        return
    figures = header() | {
        "machine": str(machine),
        "torch": torch.__version__,
        "images": IMAGES,
        "questions per image": QUESTIONS,
        "dropout": dropout,
        **why_fp32(machine),
    }
    for count in regions:
        names = CONTENDERS[:1] if ours_alone else CONTENDERS
        measured = measure(machine, make_batch(IMAGES, count), rounds, dropout, names)
        for name in names:
            measured[f"{name}, peak GB"] = memory(name, machine, count, dropout, 0)
        figures |= {f"{name} (R = {count})": value for name, value in measured.items()}
    if questions:
        with tempfile.TemporaryDirectory() as folder:
            answer = make_answering(machine, questions, Path(folder))
            answer(2 * QUESTIONS)
            seconds = [seconds_of(answer, waiter(machine.device)) for _ in range(rounds)]
        figures["answers from a cache, questions/s"] = median_rate(questions, seconds)
        figures["answers from a cache, peak GB"] = memory("answers", machine, 49, 0.0, questions)
    report(figures, out)


def measure(
    machine: Machine,
    batch: Batch,
    rounds: int,
    dropout: float,
    names: tuple[str, ...] = CONTENDERS,
) -> dict[str, object]:
    """Return the questions per second of the implementations `names`, and the ratios."""
    works = {name: make_step(name, machine, batch, dropout) for name in names}
    seconds = in_turn(works, rounds, waiter(machine.device))
    rows = batch.texts * LONGEST
    max_rate = limit([(rows, 512, 2048), (rows, 2048, 512), (4096, 4096, 4096)], machine)
    operations = step_operations(make_decoder().config, batch)
    rate = median_rate(1, seconds["ours"]) * operations
    figures: dict[str, object] = {
        f"{name}, s a step": statistics.median(durations) for name, durations in seconds.items()
    }
    figures["ours, questions/s"] = median_rate(batch.texts, seconds["ours"])
    figures |= {f"ratio_{name}": ratio(seconds[name], seconds["ours"]) for name in names[1:]}
    return figures | {
        "operations a step, GFLOP": operations / 1e9,
        "operations a second, GFLOP/s": rate / 1e9,
        "limit, GFLOP/s": max_rate / 1e9,
        "of_limit": rate / max_rate,
    }


def step_operations(config: TransformerConfig, batch: Batch) -> float:
    """Return the necessary floating-point operations of a training step.

    Only matrix products count. A multiplication and an addition are two operations. The backward
    pass has twice the operations of the forward pass.
    """
    images, regions, _ = batch.features.shape
    tokens, texts, width = int((batch.tokens != PAD).sum()), batch.texts, config.width
    keys_and_values = 2 * width * 2 * width
    others = 2 * width * (4 * width + 2 * config.feedforward)
    others += 4 * (regions + tokens / texts) * width
    rows = (config.decoder_layers - 1) * tokens + texts  # rows of all but the keys and values
    decoder = config.decoder_layers * tokens * keys_and_values + rows * others
    head = texts * 2 * width * config.classes
    return 3 * (images * encoder_operations(config, regions) + decoder + head)


def make_batch(images: int, regions: int, questions: int = QUESTIONS) -> Batch:
    """Return images with random regions, questions and soft labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (images, questions, 1), generator=generator)
    lengths[0, 0] = LONGEST
    tokens = torch.randint(
        len(SPECIALS), WORDS, (images, questions, LONGEST + 1), generator=generator
    )
    position = torch.arange(LONGEST + 1)
    tokens = tokens.masked_fill(position == lengths, BOS).masked_fill(position > lengths, PAD)
    labels = torch.zeros(images * questions, CLASSES)
    answers = torch.rand(labels.shape, generator=generator).topk(3).indices
    labels.scatter_(1, answers, torch.tensor([1.0, 0.6, 0.3]).expand(len(labels), -1))
    return Batch(*random_regions(images, regions), tokens, list(range(images)), labels=labels)


def make_decoder(dropout: float = 0.0) -> Decoder:
    """Return a decoder of preset base with random weights and a head over the answers."""
    torch.manual_seed(0)
    config = TransformerConfig(
        WORDS, CHANNELS, dropout=dropout, max_prompt=LONGEST, classes=CLASSES
    )
    return create_decoder("transformer", config)


def make_step(name: str, machine: Machine, batch: Batch, dropout: float) -> Callable[[], None]:
    """Return the training step of `name`: ours, twin or hf."""
    batch = batch.to(machine.device)
    model = visual_bert(dropout) if name == "hf" else make_decoder(dropout)
    model.to(machine.device)
    losses = {
        "ours": lambda: supervised_loss(model, batch) / batch.texts,
        "twin": lambda: twin_loss(model, batch),
        "hf": lambda: visual_bert_loss(model, batch),
    }
    return training_step(model, losses[name], machine)


# --------------------------------------------------------------------------------- implementations


def twin_loss(decoder: Decoder, batch: Batch) -> Tensor:
    """Return the mean loss of the questions. Each question is a padded row with its own image."""
    device, copies = batch.features.device, batch.tokens.shape[1]
    rows, lengths = batch.tokens.flatten(0, 1), (batch.tokens == BOS).int().argmax(2).flatten()
    regions = (batch.features, batch.boxes, batch.counts)
    memory = decoder.encode(Regions(*(part.repeat_interleave(copies, 0) for part in regions)))
    text = Packed(rows[:, None], None, lengths[:, None]).to(device)
    states = decoder.states(text.words, text.positions, text, memory).view(*rows.shape, -1)
    last = states[torch.arange(len(rows), device=device), lengths.to(device)]
    logits, labels = decoder.head(last).float(), batch.labels.to(device)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(rows)


def visual_bert(dropout: float = 0.0) -> nn.Module:
    """Return Hugging Face's VisualBERT with 6 layers of our width, and random weights."""
    transformers = import_transformers()
    torch.manual_seed(0)
    return transformers.VisualBertForQuestionAnswering(
        transformers.VisualBertConfig(
            vocab_size=WORDS,
            hidden_size=512,
            visual_embedding_dim=CHANNELS,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=2048,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            num_labels=CLASSES,
        )
    )


def visual_bert_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return VisualBERT's loss, with the features repeated for each question."""
    device, copies = batch.features.device, batch.tokens.shape[1]
    words, mask = (part.to(device) for part in visual_bert_inputs(batch.tokens))
    features = batch.features.float().repeat_interleave(copies, 0)
    ones = torch.ones(features.shape[:2], dtype=torch.int64, device=device)
    return model(
        input_ids=words, attention_mask=mask, visual_embeds=features, visual_attention_mask=ones,
        visual_token_type_ids=ones, labels=batch.labels.to(device),
    ).loss  # fmt: skip


def visual_bert_inputs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input ids and the attention mask of questions [B,K,T], each [B*K,T+1].

    VisualBERT reads the answer from the second last token of the mask, so a row is a first token,
    the question and a last token, then padding.
    """
    rows = tokens.flatten(0, 1)
    words = F.pad(rows.masked_fill(rows == BOS, EOS), (1, 0), value=BOS)
    return words, (words != PAD).long()


# ------------------------------------------------------------------------------------------ answers


def make_answering(machine: Machine, questions: int, folder: Path) -> Callable[..., int]:
    """Write a cache with six questions per image to `folder`.

    Returns a function that answers the first `count` questions (default: all), and returns the
    number of answers.
    """
    make_cache(folder, -(-questions // QUESTIONS))
    cache = FeatureCache(folder)
    words = [*SPECIALS, *(f"w{number}" for number in range(len(SPECIALS), WORDS))]
    lengths = torch.randint(SHORTEST, LONGEST + 1, (questions,)).tolist()
    examples = [
        Example(number, number // QUESTIONS,
                " ".join(words[n] for n in torch.randint(len(SPECIALS), WORDS, (length,))), ())
        for number, length in enumerate(lengths)
    ]  # fmt: skip
    decoder = make_decoder().to(machine.device)
    cast_linears_to_bf16(decoder, machine)
    answers = tuple(f"answer {number}" for number in range(CLASSES))
    generator = CaptionGenerator(decoder, Vocabulary(words), machine, Generation(), answers=answers)
    return lambda count=questions: len(generate_texts(generator, cache, examples[:count]))


# ------------------------------------------------------------------------------------------- memory


def memory(name: str, machine: Machine, regions: int, dropout: float, questions: int) -> float:
    """Return `memory_of`, on a CPU from a process of its own."""
    options = ("--only-memory", name, "--regions", regions, "--dropout", dropout)
    return memory_alone(
        lambda: memory_of(name, machine, regions, dropout, questions), machine, "benchmarks.vqa",
        *options, "--questions", questions,
    )  # fmt: skip


def memory_of(name: str, machine: Machine, regions: int, dropout: float, questions: int) -> float:
    """Return the peak memory in GB of a first step above the weights, or of `answers`."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "answers":
            work = make_answering(machine, questions, Path(folder))
        else:
            work = make_step(name, machine, make_batch(IMAGES, regions), dropout)
        return peak_of(work, machine)


if __name__ == "__main__":
    main()
