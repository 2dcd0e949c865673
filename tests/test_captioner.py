"""The decoder's equalities: cached = full, alone = in a batch, padded = unpadded, grouped = each
alone.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import ModelError, losses
from models.decoders.attention import Packed, additive_mask, attend
from models.decoders.dropout import Dropout, drop_regions, replace_words
from models.decoders.transformer import Transformer, TransformerConfig
from models.losses import Noise, caption_loss
from models.regions import Regions, grid_boxes, grid_regions

WORDS, CHANNELS = 11, 6


def tiny(**changes) -> Transformer:
    sizes = {
        "width": 16,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "feedforward": 32,
        "max_length": 7,
    }
    torch.manual_seed(0)
    captioner = Transformer(TransformerConfig(WORDS, CHANNELS, **{**sizes, **changes})).eval()
    # away from the tidy initial values, where mistakes cancel
    for parameter in captioner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return captioner


def some_regions(images: int, regions: int = 5, seed: int = 1) -> Regions:
    generator = torch.Generator().manual_seed(seed)
    return Regions(
        torch.randn(images, regions, CHANNELS, generator=generator),
        torch.rand(images, regions, 4, generator=generator),
        torch.full((images,), regions),
    )


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, WORDS, shape, generator=torch.Generator().manual_seed(2))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [1, 3])
def test_cached_decoding_equals_full_decoding_token_by_token(first):
    captioner, tokens = tiny(), some_tokens(3, 4, 7)
    memory = captioner.encode(some_regions(3))
    full = captioner.decode(tokens, memory)
    cache = captioner.init_cache(memory, 4)
    steps = [captioner.decode(tokens[:, :, :first], memory, cache)]
    steps += [captioner.decode(tokens[:, :, t : t + 1], memory, cache) for t in range(first, 7)]
    assert close(torch.cat(steps, dim=2), full)


def test_a_beginning_that_all_captions_share_is_read_once():
    captioner, tokens = tiny(), some_tokens(3, 4, 6)
    tokens[:, :, :2] = tokens[:, :1, :2]
    memory = captioner.encode(some_regions(3))
    cache = captioner.init_cache(memory, 4)
    for store in (*cache.keys, *cache.values):
        store.fill_(float("nan"))  # whatever memory held before
    first = captioner.decode(tokens[:, :1, :2], memory, cache)
    rest = [captioner.decode(tokens[:, :, t : t + 1], memory, cache) for t in range(2, 6)]
    full = captioner.decode(tokens, memory)
    assert close(first.expand(-1, 4, -1, -1), full[:, :, :2]) and close(
        torch.cat(rest, dim=2), full[:, :, 2:]
    )


def test_images_that_leave_change_nothing_for_those_that_stay():
    captioner, tokens = tiny(), some_tokens(5, 3, 6)
    memory = captioner.encode(some_regions(5))
    full = captioner.decode(tokens, memory)
    cache = captioner.init_cache(memory, 3)
    for t in range(3):
        captioner.decode(tokens[:, :, t : t + 1], memory, cache)
    for kept in (torch.tensor([0, 4, 2, 3]), torch.tensor([3, 1])):  # then images 3 and 4
        memory, tokens, full = memory.keep(kept, in_place=len(kept) < 4), tokens[kept], full[kept]
        cache.keep(kept)
        t = cache.length
        assert close(
            captioner.decode(tokens[:, :, t : t + 1], memory, cache), full[:, :, t : t + 1]
        )


def test_reordered_cache_equals_full_decoding_of_the_reordered_prefixes():
    captioner, tokens = tiny(), some_tokens(2, 3, 5)
    memory = captioner.encode(some_regions(2))
    cache = captioner.init_cache(memory, 3)
    for t in range(4):
        captioner.decode(tokens[:, :, t : t + 1], memory, cache)
    origin = torch.tensor([[2, 2, 0], [1, 0, 1]])
    cache.reorder(origin)
    moved = tokens.gather(1, origin[:, :, None].expand(-1, -1, 5))
    moved[:, :, 4] = tokens[:, :, 4]
    step = captioner.decode(moved[:, :, 4:5], memory, cache)
    assert close(step[:, :, 0], captioner.decode(moved, memory)[:, :, -1])


def test_an_image_alone_scores_as_in_a_batch():
    captioner, regions, tokens = tiny(), some_regions(4), some_tokens(4, 2, 6)
    together = captioner.decode(tokens, captioner.encode(regions))
    for b in range(4):
        alone = Regions(*(part[b : b + 1] for part in regions))
        assert close(captioner.decode(tokens[b : b + 1], captioner.encode(alone))[0], together[b])


def test_padded_regions_change_nothing_whatever_they_hold():
    captioner, regions, tokens = tiny(), some_regions(2), some_tokens(2, 2, 6)
    noise = some_regions(2, 3, seed=9)
    padded = Regions(
        torch.cat([regions.features, 100 * noise.features], 1),
        torch.cat([regions.boxes, noise.boxes], 1),
        regions.counts,
    )
    assert close(
        captioner.decode(tokens, captioner.encode(padded)),
        captioner.decode(tokens, captioner.encode(regions)),
    )


def test_captions_grouped_by_image_score_as_each_alone():
    captioner, regions, tokens = tiny(), some_regions(2), some_tokens(2, 5, 6)
    memory = captioner.encode(regions)
    grouped = captioner.decode(tokens, memory)
    for k in range(5):
        assert close(captioner.decode(tokens[:, k : k + 1], memory)[:, 0], grouped[:, k])


def test_a_later_word_never_changes_an_earlier_score():
    captioner, tokens = tiny(), some_tokens(1, 1, 6)
    memory = captioner.encode(some_regions(1))
    changed = tokens.clone()
    changed[:, :, 3] = (tokens[:, :, 3] - 3) % (WORDS - 4) + 4
    before, after = captioner.decode(tokens, memory), captioner.decode(changed, memory)
    assert close(before[:, :, :3], after[:, :, :3]) and not close(before[:, :, 3:], after[:, :, 3:])


def test_the_captioner_sees_where_a_region_is():
    captioner, regions, tokens = tiny(), some_regions(1), some_tokens(1, 1, 6)
    moved = regions._replace(boxes=regions.boxes.flip(1))
    assert not close(
        captioner.decode(tokens, captioner.encode(regions)),
        captioner.decode(tokens, captioner.encode(moved)),
    )


def test_the_loss_is_the_plain_sum_over_words_that_are_there():
    captioner, regions = tiny(), some_regions(2)
    tokens = some_tokens(2, 3, 6)
    tokens[0, 1, 4:] = 0
    tokens[1, 2, :] = 0
    loss, words = caption_loss(captioner, regions, tokens, pad=0, label_smoothing=0.1)
    logits = captioner.decode(tokens, captioner.encode(regions)).log_softmax(-1)
    plain, count = 0.0, 0
    for b in range(2):
        for k in range(3):
            for t in range(5):
                if (target := tokens[b, k, t + 1].item()) != 0:
                    plain -= 0.9 * logits[b, k, t, target] + 0.1 * logits[b, k, t].mean()
                    count += 1
    assert words.item() == count and torch.allclose(loss, plain, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_those_of_the_plain_way(smoothing, monkeypatch):
    """One caption a row with its own copy of the regions, padded, F.cross_entropy, torch's own
    gradients.
    """
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    captioner, regions = tiny(), some_regions(3)
    regions = regions._replace(counts=torch.tensor([5, 3, 4]))
    tokens = some_tokens(3, 4, 7)
    for b, k, end in ((0, 1, 4), (1, 2, 0), (1, 0, 2), (2, 3, 6)):
        tokens[b, k, end:] = 0
    memory = captioner.encode(regions).keep(torch.arange(3).repeat_interleave(4))
    rows = tokens.flatten(0, 1)[:, None]
    logits = captioner.decode(rows[:, :, :-1], memory).flatten(0, 2)
    targets = rows[:, :, 1:].flatten()
    plain = F.cross_entropy(
        logits, targets, ignore_index=0, reduction="sum", label_smoothing=smoothing
    )
    wanted = torch.autograd.grad(2 * plain, list(captioner.parameters()))
    loss, words = caption_loss(captioner, regions, tokens, 0, smoothing)
    found = torch.autograd.grad(2 * loss, list(captioner.parameters()))
    assert words.item() == (targets != 0).sum() and torch.allclose(loss, plain, rtol=1e-5)
    for name, a, b in zip(dict(captioner.named_parameters()), found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3), name


def test_packed_captions_have_few_shapes_and_what_fills_them_up_changes_nothing(monkeypatch):
    """A CPU's library keeps a program for each: 2.4 GB after 120 self-critical steps, 1.1 GB so."""
    captioner, regions, shapes = tiny(max_length=20), some_regions(6), set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        there = torch.arange(20) < torch.randint(1, 20, (6, 5, 1), generator=generator)
        tokens = torch.randint(4, WORDS, (6, 5, 20), generator=generator)
        packed = Packed(tokens, there)
        assert packed.count == there.sum() and packed.words[: packed.count].equal(tokens[there])
        shapes.add((len(packed.words), packed.shape[1]))
    assert (
        all(rows % Packed.ROWS == 0 and places % Packed.SLOTS == 0 for rows, places in shapes)
        and len(shapes) < 25
    )
    found = captioner(regions, packed)[: packed.count]
    monkeypatch.setattr(Packed, "ROWS", 1)
    monkeypatch.setattr(Packed, "SLOTS", 1)
    alone = Packed(tokens, there)
    assert len(alone.words) == packed.count < len(packed.words) and close(
        captioner(regions, alone), found
    )


def test_bf16_stays_within_a_hundredth_of_the_spread_of_scores():
    """The sizes of preset small, 50 captions: mean distance to fp32 below 0.01 of the scores'
    standard deviation.
    """
    torch.manual_seed(0)
    captioner = Transformer(TransformerConfig(500, 64, width=256, heads=4, feedforward=1024)).eval()
    regions = Regions(torch.randn(10, 9, 64), torch.rand(10, 9, 4), torch.full((10,), 9))
    tokens = torch.randint(4, 500, (10, 5, 12))
    with torch.no_grad():
        exact = captioner.decode(tokens, captioner.encode(regions))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = captioner.decode(tokens, captioner.encode(regions)).float()
    assert (rounded - exact).abs().mean() < 0.01 * exact.std() and rounded.dtype == exact.dtype


def test_padding_captions_get_no_gradient():
    captioner, regions = tiny(), some_regions(1)
    tokens = some_tokens(1, 2, 6)
    tokens[0, 1] = 0
    gradients = []
    for given in (tokens, tokens[:, :1]):
        captioner.zero_grad()
        caption_loss(captioner, regions, given, pad=0)[0].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in captioner.parameters() if p.grad is not None])
        )
    assert close(*gradients)


def test_grid_boxes_tile_the_photograph_row_by_row():
    boxes = grid_boxes(2, 4)
    assert torch.allclose(boxes[0], torch.tensor([0, 0, 0.25, 0.5])) and torch.allclose(
        boxes[6], torch.tensor([0.5, 0.5, 0.75, 1])
    )
    assert torch.isclose(
        ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum(), torch.tensor(1.0)
    )


def test_a_regions_features_are_the_cell_its_box_names():
    feature_map = torch.arange(2 * 3 * 4).view(1, 2, 3, 4).float()
    regions = grid_regions(feature_map)
    for row in range(3):
        for column in range(4):
            assert torch.equal(
                regions.features[0, row * 4 + column], feature_map[0, :, row, column]
            )
            assert torch.allclose(
                regions.boxes[0, row * 4 + column, :2], torch.tensor([column / 4, row / 3])
            )


@pytest.mark.parametrize("changes", [{"width": 15}, {"dropout": 1.0}, {"max_length": 0}])
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ModelError):
        tiny(**changes)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    layer, x = Dropout(p), torch.ones(200_000)
    dropped = layer(x)
    assert abs((dropped == 0).float().mean().item() - round(256 * p) / 256) < 0.005
    assert dropped.mean().item() == pytest.approx(1, abs=0.01) and len(dropped.unique()) == 2
    assert torch.equal(layer.eval()(x), x)


def test_dropout_follows_torchs_generator():
    layer, x = Dropout(0.3), torch.ones(7, 9)
    state = torch.get_rng_state()
    first, second = layer(x), layer(x)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_equals_the_fused_one(masked):
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind(0)
    allowed = (torch.arange(6) < torch.tensor([[4], [6]]))[:, None, None, :]
    mask = additive_mask(allowed) if masked else None
    assert close(
        attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, allowed if masked else None)
    )


# -------------------------------------------------------------------------------------------- noise


def test_dropped_regions_are_a_share_of_those_that_are_there_each_with_its_place():
    regions = some_regions(50, regions=10)
    counts = torch.arange(50) % 10 + 1
    regions = regions._replace(counts=counts)
    torch.manual_seed(0)
    kept = drop_regions(regions, 0.3)
    assert kept.features.shape == (50, 7, CHANNELS)
    assert kept.counts.tolist() == [max(1, round(count * 0.7)) for count in counts.tolist()]
    own = {
        tuple(row.tolist())
        for image in range(50)
        for row in torch.cat([regions.features, regions.boxes], 2)[image, : counts[image]]
    }
    for image in range(50):
        rows = [
            tuple(row.tolist())
            for row in torch.cat([kept.features, kept.boxes], 2)[image, : kept.counts[image]]
        ]
        assert len(set(rows)) == len(rows) and set(rows) <= own
    torch.manual_seed(1)
    assert not torch.equal(drop_regions(regions, 0.3).features, kept.features)


def test_replaced_words_are_a_share_and_never_the_first():
    words, positions = torch.arange(4, 1004), torch.arange(1000) % 5
    torch.manual_seed(0)
    replaced = replace_words(words, positions > 0, 0.25, 3)
    gone = replaced == 3
    assert not gone[positions == 0].any() and 0.2 < gone[positions > 0].float().mean() < 0.3
    assert torch.equal(replaced[~gone], words[~gone])


def test_scheduled_sampling_reads_the_captioners_own_guess_in_place_of_the_word(monkeypatch):
    """Every word replaced: the second pass reads <bos> and then, at each place, the likeliest word
    after the true ones.
    """
    captioner, regions, tokens = tiny(), some_regions(3), some_tokens(3, 2, 6)
    memory = captioner.encode(regions)
    guessed = captioner.decode(tokens, memory).argmax(-1)
    mixed = torch.cat([tokens[:, :, :1], guessed[:, :, :-1]], dim=2)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape))
    states = captioner(regions, Packed(tokens), 0.5)
    assert close(captioner.logits(states), captioner.decode(mixed, memory).flatten(0, 2))
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.ones(*shape))
    assert close(
        captioner.logits(captioner(regions, Packed(tokens), 0.5)),
        captioner.decode(tokens, memory).flatten(0, 2),
    )


def test_noise_reaches_the_loss_and_a_loss_without_it_is_unchanged():
    captioner, regions, tokens = tiny(), some_regions(3), some_tokens(3, 2, 6)
    plain = caption_loss(captioner, regions, tokens, 0)[0]
    assert torch.equal(caption_loss(captioner, regions, tokens, 0, 0.0, Noise(unknown=3))[0], plain)
    for noise in (Noise(regions=0.5), Noise(words=0.5, unknown=3), Noise(sampled=0.9)):
        torch.manual_seed(0)
        assert not close(caption_loss(captioner, regions, tokens, 0, 0.0, noise)[0], plain), noise


@pytest.mark.parametrize(
    "name",
    [
        "words",
        "channels",
        "width",
        "heads",
        "encoder_layers",
        "decoder_layers",
        "feedforward",
        "max_length",
    ],
)
def test_a_size_that_no_machine_has_room_for_is_named_at_once(name):
    with pytest.raises(ModelError, match=f"{name} is .* at most"):
        TransformerConfig(**{"words": 10, "channels": 8, "heads": 1, name: 2**63 - 1})
