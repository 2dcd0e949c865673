"""Texts that begin with a prompt, and images without regions: the equalities that hold without them
hold with them.
"""

from __future__ import annotations

import pytest
import torch

from models.decoders.attention import KVCache, Layout, Packed, additive_mask
from models.generation.beam_search import beam_search
from models.generation.ensemble import Ensemble
from models.generation.generate import generate_from_regions
from models.generation.options import Generation
from models.generation.sampling import sample
from models.losses import Noise, caption_loss
from models.regions import Regions
from tests.test_captioner import CHANNELS, WORDS, close, some_regions, some_tokens, tiny

PAD, BOS, EOS, UNK = 0, 1, 2, 3
PROMPTS = [[4, 5, 6, 7], [], [8], [9, 10, 4]]  # of four images


def prompted(**changes):
    return tiny(max_prompt=4, **changes)


def padded(prompts=PROMPTS) -> torch.Tensor:
    """Prompts [B,P], padded on the left."""
    longest = max(map(len, prompts))
    return torch.tensor(
        [[PAD] * (longest - len(prompt)) + prompt for prompt in prompts], dtype=torch.int64
    )


def twin_states(decoder, regions: Regions, words: list[int], prompt: int) -> torch.Tensor:
    """States [T,D] of one text, one row after the other, under a mask that is filled in by hand."""
    sees = torch.zeros(len(words), len(words), dtype=torch.bool)
    for query in range(len(words)):
        for key in range(len(words)):
            sees[query, key] = key <= query or (query < prompt and key < prompt)

    class OneText(Layout):
        image = torch.zeros(len(words), dtype=torch.int64)

        def pad(self, rows):
            return rows[None]

        def unpad(self, sequences):
            return sequences[0]

    layout = OneText(additive_mask(sees)[None, None])
    return decoder.states(
        torch.tensor(words), torch.arange(len(words)), layout, decoder.encode(regions)
    )


def one(regions: Regions, image: int) -> Regions:
    return Regions(*(part[image : image + 1] for part in regions))


def texts_of_three_images():
    """tokens [3,2,T], their prompts' lengths [3,2] and the unpadded texts."""
    prompts = [[[4, 5, 6], [7]], [[], [8, 9]], [[10], [4, 6, 8]]]
    targets = [[[5, 6, EOS], [7, EOS]], [[4, 4, 4, EOS], [9, EOS]], [[EOS], [10, 5, EOS]]]
    texts = [
        [[*p, BOS, *t] for p, t in zip(*pair, strict=True)]
        for pair in zip(prompts, targets, strict=True)
    ]
    longest = max(len(text) for group in texts for text in group)
    tokens = torch.tensor(
        [[text + [PAD] * (longest - len(text)) for text in group] for group in texts]
    )
    return tokens, torch.tensor([[len(p) for p in group] for group in prompts]), texts


def test_packed_texts_with_prompts_equal_each_text_under_a_mask_filled_in_by_hand():
    decoder, regions = prompted(), some_regions(3)
    tokens, lengths, texts = texts_of_three_images()
    with torch.no_grad():
        packed = Packed(tokens, tokens != PAD, lengths)
        states = decoder(regions, packed)[: packed.count]
        wanted = [
            twin_states(decoder, one(regions, image), text, int(lengths[image, number]))
            for image, group in enumerate(texts)
            for number, text in enumerate(group)
        ]
    assert close(states, torch.cat(wanted))


def test_prompt_tokens_see_later_ones_and_target_tokens_do_not():
    decoder, regions = prompted(), some_regions(1)

    def states(text):
        tokens = torch.tensor([[text]])
        with torch.no_grad():
            return decoder(regions, Packed(tokens, tokens != PAD, torch.tensor([[2]])))[: len(text)]

    before = states([4, 5, BOS, 6, 7])
    assert not close(states([4, 9, BOS, 6, 7])[0], before[0])
    assert close(states([4, 5, BOS, 6, 9])[:4], before[:4])


def test_the_states_of_selected_tokens_are_those_of_a_whole_text():
    decoder, regions = prompted(), some_regions(3)
    tokens, lengths, _ = texts_of_three_images()
    whole, part = (Packed(tokens, tokens != PAD, lengths) for _ in range(2))
    first = torch.arange(whole.count)[whole.positions[: whole.count] == 0]  # of each text
    rows = first.view(3, 2) + torch.tensor([[3, 0], [1, 2], [0, 3]])
    part.select(rows)
    gradients = []
    for states in (decoder(regions, whole)[rows], decoder(regions, part)):
        decoder.zero_grad()
        states.square().sum().backward()
        gradients.append([weight.grad for weight in decoder.parameters()])
        assert states.shape == (3, 2, 16) and close(states, decoder(regions, whole)[rows])
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None) and (one is None or close(one, two))


def test_the_loss_counts_targets_only():
    decoder, regions = prompted(), some_regions(3)
    tokens, lengths, texts = texts_of_three_images()
    loss, count = caption_loss(decoder, regions, tokens, PAD, prompt_lengths=lengths)
    wanted, words = 0.0, 0
    for image, group in enumerate(texts):
        for number, text in enumerate(group):
            prompt = int(lengths[image, number])
            log_p = decoder.logits(
                twin_states(decoder, one(regions, image), text, prompt)
            ).log_softmax(-1)
            for place in range(prompt + 1, len(text)):
                wanted, words = wanted - log_p[place - 1, text[place]].item(), words + 1
    assert words == int(count) and loss.item() == pytest.approx(wanted, rel=1e-4)


def test_noise_replaces_target_words_only():
    tokens, lengths, _ = texts_of_three_images()
    packed = Packed(tokens, tokens != PAD, lengths)
    replaceable = set(packed.words[packed.replaceable].tolist())
    assert BOS not in replaceable and EOS in replaceable
    place = packed.positions[packed.replaceable]
    assert (place > 0).all() and packed.replaceable[: packed.count].sum() == (
        tokens != PAD
    ).sum() - lengths.sum() - lengths.numel()
    caption_loss(
        prompted(),
        some_regions(3),
        tokens,
        PAD,
        noise=Noise(words=0.5, sampled=0.5, unknown=UNK),
        prompt_lengths=lengths,
    )


def test_prompts_padded_on_the_left_are_read_as_they_are_alone():
    decoder, regions = prompted(), some_regions(4)
    following = some_tokens(4, 1, 3)
    with torch.no_grad():
        memory, prompts = decoder.encode(regions), padded()
        cache = decoder.init_cache(memory, 1, prompts)
        assert isinstance(cache, KVCache)
        first = torch.cat([prompts, torch.full((4, 1), BOS)], dim=1)[:, None]
        steps = [decoder.decode(first, memory, cache)[:, :, -1:]]
        steps += [decoder.decode(following[:, :, t : t + 1], memory, cache) for t in range(3)]
        found = torch.cat(steps, dim=2)[:, 0]
        for image, prompt in enumerate(PROMPTS):
            text = [*prompt, BOS, *following[image, 0].tolist()]
            states = twin_states(decoder, one(regions, image), text, len(prompt))
            assert close(found[image], decoder.logits(states)[len(prompt) :])


@pytest.mark.parametrize(
    "names",
    [
        {"num_beams": 1},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "force_words_ids": ((5, 6),)},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "min_length": 3},
    ],
)
def test_generation_in_a_batch_of_prompts_equals_each_prompt_alone(names):
    decoder, regions = prompted(), some_regions(4)
    decoder.output_bias.data[EOS] = 0.5  # some end early, and leave the batch
    together = generate_from_regions(decoder, regions, prompts=padded(), **names)
    for image, prompt in enumerate(PROMPTS):
        prompts = torch.tensor([prompt], dtype=torch.int64) if prompt else None
        alone = generate_from_regions(decoder, one(regions, image), prompts=prompts, **names)
        assert torch.equal(together.tokens[image], alone.tokens[0])
        assert close(together.scores[image], alone.scores[0])


def test_two_prompts_of_one_image_equal_two_images():
    decoder, regions = prompted(), some_regions(2)
    with torch.no_grad():
        memory = decoder.encode(regions).keep(torch.tensor([0, 0, 1]))
        found = beam_search(decoder, memory, Generation(num_beams=3), padded([[4], [5, 6], [4]]))
        for row, (image, prompt) in enumerate([(0, [4]), (0, [5, 6]), (1, [4])]):
            alone = beam_search(
                decoder,
                decoder.encode(one(regions, image)),
                Generation(num_beams=3),
                torch.tensor([prompt]),
            )
            assert torch.equal(found.tokens[row], alone.tokens[0])


@pytest.mark.parametrize("count", [3, 20])
def test_samples_in_a_batch_of_prompts_equal_each_prompt_alone(count):
    decoder, regions = prompted(), some_regions(4)
    options = Generation(num_beams=1, do_sample=True, num_return_sequences=count)
    uniforms = torch.rand(4, count, 7, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together = sample(
            decoder, decoder.encode(regions), options, uniforms=uniforms, prompts=padded()
        )
        for image, prompt in enumerate(PROMPTS):
            prompts = torch.tensor([prompt], dtype=torch.int64) if prompt else None
            memory = decoder.encode(one(regions, image))
            alone = sample(
                decoder, memory, options, uniforms=uniforms[image : image + 1], prompts=prompts
            )
            assert torch.equal(together.tokens[image], alone.tokens[0]) and close(
                together.log_p[image], alone.log_p[0]
            )


def test_an_ensemble_of_one_decoder_twice_reads_prompts_as_the_one_does():
    decoder, regions = prompted(), some_regions(4)
    both = Ensemble([decoder, decoder]).eval()
    alone, pair = (
        generate_from_regions(each, regions, prompts=padded()) for each in (decoder, both)
    )
    assert torch.equal(alone.tokens, pair.tokens) and close(alone.scores, pair.scores)


# --------------------------------------------------------------------------------------- no regions


def without_regions(images: int) -> Regions:
    return Regions(
        torch.empty(images, 0, CHANNELS),
        torch.empty(images, 0, 4),
        torch.zeros(images, dtype=torch.int64),
    )


def test_an_image_without_regions_is_read_alike_alone_and_beside_others():
    decoder, tokens = prompted(), some_tokens(3, 2, 5)
    regions = some_regions(3)
    regions.counts[1] = 0
    with torch.no_grad():
        together = decoder.decode(tokens, decoder.encode(regions))
        alone = decoder.decode(tokens[1:2], decoder.encode(without_regions(1)))
        other = decoder.decode(tokens[:1], decoder.encode(one(regions, 0)))
    assert together.isfinite().all() and close(together[1:2], alone) and close(together[:1], other)


def test_what_the_padding_of_an_image_without_regions_holds_changes_nothing():
    decoder, tokens, regions = prompted(), some_tokens(2, 2, 5), some_regions(2)
    regions.counts[1] = 0
    with torch.no_grad():
        before = decoder.decode(tokens, decoder.encode(regions))
        regions.features[1], regions.boxes[1] = 7.0, 0.3
        assert close(decoder.decode(tokens, decoder.encode(regions)), before)


def test_texts_without_any_image_train_and_are_generated():
    decoder = prompted()
    tokens, lengths, _ = texts_of_three_images()
    loss, count = caption_loss(decoder, without_regions(3), tokens, PAD, prompt_lengths=lengths)
    (loss / count).backward()
    gradients = [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    regions = without_regions(4)
    together = generate_from_regions(decoder, regions, prompts=padded(), num_beams=3)
    assert (together.tokens < WORDS).all() and together.scores.isfinite().all()
    for image, prompt in enumerate(PROMPTS):
        prompts = torch.tensor([prompt], dtype=torch.int64) if prompt else None
        alone = generate_from_regions(decoder, without_regions(1), prompts=prompts, num_beams=3)
        assert torch.equal(together.tokens[image], alone.tokens[0])
