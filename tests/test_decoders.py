"""All decoders with all ways to use them: one test for the whole kind, against slow twins.

The default run uses a set of combinations in which each pair of values occurs. The slow run uses
all combinations.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import ModelError
from models.decoders.attention import Packed
from models.decoders.dropout import drop_regions
from models.decoders.interface import Decoder
from models.decoders.layers import fourier_features
from models.decoders.registry import DECODERS, create_decoder
from models.decoders.transformer import box_relations
from models.generation.ensemble import Ensemble
from models.generation.generate import generate_from_regions
from models.generation.options import Generation
from models.generation.ranking import candidate_log_p
from models.generation.sampling import sample
from models.losses import Noise, caption_loss, class_loss, self_critical_loss
from models.regions import Regions
from pipeline.runtime import open_machine

PAD, BOS, EOS, UNK = 0, 1, 2, 3
WORDS, CHANNELS, LENGTH, PROMPT = 11, 6, 6, 4
NEVER = (PAD, BOS, UNK)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "memory slots": ("transformer", {"memory_slots": 3}),
    "meshed": ("transformer", {"meshed": True}),
    "geometry": ("transformer", {"relative_geometry": True, "memory_slots": 2}),
    "prefix": ("prefix", {}),
    "pooled": ("pooled", {}),
    "lstm": ("lstm", {}),
}
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "min_length": 3},
    "beam": {"num_beams": 3, "num_return_sequences": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced": {"num_beams": 3, "force_words_ids": ((5, 6),)},
    "banned": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_length": 3},
}
FACTORS: dict[str, list[Any]] = {
    "kind": [*KINDS],
    "decoding": [*DECODING],
    "prompts": [False, True],
    "regions": ["full", "padded", "empty"],
    "several": [False, True],
}


def all_combinations() -> list[dict[str, Any]]:
    return [
        dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())
    ]


def pairwise() -> list[dict[str, Any]]:
    """Combinations in which each pair of values of two factors occurs, chosen greedily."""

    def pairs(combination):
        return set(itertools.combinations(combination.items(), 2))

    left = set().union(*map(pairs, all_combinations()))
    chosen = []
    while left:
        best = max(all_combinations(), key=lambda each: len(pairs(each) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def build(kind: str, seed: int = 0, classes: int = 0, prompt: int = PROMPT, **changes) -> Any:
    """A small decoder away from its initial values, where mistakes would cancel."""
    name, options = KINDS[kind]
    sizes: dict[str, Any] = {"width": 16, "dropout": 0.0}
    if name != "lstm":
        sizes |= {"heads": 2, "decoder_layers": 2, "feedforward": 32}
    if name == "transformer":
        sizes["encoder_layers"] = 2
    torch.manual_seed(seed)
    config = DECODERS[name].Config(
        WORDS, CHANNELS, LENGTH, prompt, classes=classes, **{**sizes, **options, **changes}
    )
    decoder = create_decoder(name, config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def make_regions(case: str, images: int = 4) -> Regions:
    generator = torch.Generator().manual_seed(1)
    counts = {"full": [5] * images, "padded": [5, 2, 4, 3], "empty": [5, 0, 3, 0]}[case][:images]
    features = torch.randn(images, 5, CHANNELS, generator=generator)
    low = torch.rand(images, 5, 2, generator=generator) / 2
    boxes = torch.cat([low, low + 0.1 + torch.rand(images, 5, 2, generator=generator) / 3], 2)
    return Regions(features, boxes, torch.tensor(counts))


def one(regions: Regions, image: int) -> Regions:
    """One image alone, without padding."""
    count = int(regions.counts[image])
    return Regions(
        regions.features[image : image + 1, :count],
        regions.boxes[image : image + 1, :count],
        regions.counts[image : image + 1],
    )


def padded(prompts: list[list[int]]) -> Tensor:
    longest = max(map(len, prompts))
    return torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])


def log_p_alone(
    decoder: Any, regions: Regions, prompt: list[int], words: list[int], never: tuple[int, ...] = ()
) -> Tensor:
    """log p [T] of each word of one text, read as a whole, where the words `never` have p = 0."""
    text = torch.tensor([[[*prompt, BOS, *words[:-1]]]])
    lengths = torch.tensor([[len(prompt)]])
    members = list(decoder.decoders) if isinstance(decoder, Ensemble) else [decoder]
    all_p = []
    for member in members:
        packed = Packed(text, torch.ones_like(text, dtype=torch.bool), lengths)
        states = member(regions, packed)[len(prompt) : packed.count]
        all_p.append(member.logits(states).softmax(-1))
    p = torch.stack(all_p).mean(0)
    p[:, list(never)] = 0
    return (p / p.sum(1, keepdim=True)).log().gather(1, torch.tensor(words)[:, None])[:, 0]


def check(kind, decoding, prompts, regions, several):
    """In a batch = alone, and the reported scores are those of the whole text at once."""
    decoder = build(kind)
    if several:
        decoder = Ensemble([decoder, build("pooled" if kind == "lstm" else "lstm", seed=1)])
    given = [[4, 5, 6, 7], [], [8], [9, 10, 4]] if prompts else [[]] * 4
    images, names = make_regions(regions), DECODING[decoding]
    kept = {"suppress_tokens": NEVER} | names
    with torch.inference_mode():
        together = generate_from_regions(
            decoder, images, prompts=padded(given) if prompts else None, **kept
        )
        for image, prompt in enumerate(given):
            own = torch.tensor([prompt]) if prompt else None
            alone = generate_from_regions(decoder, one(images, image), prompts=own, **kept)
            assert torch.equal(together.tokens[image], alone.tokens[0])
            torch.testing.assert_close(
                together.scores[image], alone.scores[0], rtol=1e-4, atol=1e-5
            )
            words = together.tokens[image, 0].tolist()
            words = words[: words.index(EOS) + 1] if EOS in words else words
            if decoding in ("greedy", "beam"):
                log_p = log_p_alone(decoder, one(images, image), prompt, words, NEVER).sum()
                assert together.log_p[image, 0].item() == pytest.approx(log_p.item(), abs=1e-3)


@pytest.mark.parametrize(
    "values", pairwise(), ids=lambda values: "-".join(map(str, values.values()))
)
def test_generated_texts_do_not_depend_on_the_batch(values):
    check(**values)


@pytest.mark.slow
def test_generated_texts_do_not_depend_on_the_batch_in_all_combinations():
    for values in all_combinations():
        check(**values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_beam_finds_what_brute_force_finds(kind):
    decoder, regions, words, limit = build(kind, prompt=0), make_regions("padded", 1), [4, 5, 6], 3
    never = [word for word in range(WORDS) if word not in (*words, EOS)]
    candidates = []
    with torch.inference_mode():
        for length in range(limit + 1):
            for body in itertools.product(words, repeat=length):
                text = [*body, EOS][:limit]
                logits = decoder.decode(
                    torch.tensor([[[BOS, *text[:-1]]]]), decoder.encode(regions)
                )
                logits[..., never] = -math.inf
                log_p = logits[0, 0].log_softmax(-1).gather(1, torch.tensor(text)[:, None])
                candidates.append((float(log_p.sum()) / len(text), text))
        found = generate_from_regions(
            decoder, regions, num_beams=len(words) ** limit, max_length=limit,
            suppress_tokens=tuple(never), length_penalty=1.0,
        )  # fmt: skip
    score, best = max(candidates)
    assert found.tokens[0, 0].tolist()[: len(best)] == best
    assert found.scores[0, 0].item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_the_batch_and_their_log_p_is_that_of_training(kind):
    decoder, regions, prompts = build(kind), make_regions("empty"), [[4, 5], [], [8], [9, 10, 4]]
    uniforms = torch.rand(4, 20, LENGTH, generator=torch.Generator().manual_seed(5))
    options = Generation(
        num_beams=1, do_sample=True, num_return_sequences=20, suppress_tokens=NEVER
    )
    with torch.no_grad():
        memory = decoder.encode(regions)
        drawn = sample(decoder, memory, options, uniforms=uniforms, prompts=padded(prompts))
        for image, prompt in enumerate(prompts):
            own = torch.tensor([prompt]) if prompt else None
            alone = sample(
                decoder, decoder.encode(one(regions, image)), options,
                uniforms=uniforms[image : image + 1], prompts=own,
            )  # fmt: skip
            assert torch.equal(drawn.tokens[image], alone.tokens[0])
        drawn = sample(decoder, memory, options, uniforms=uniforms)
    _, log_p = self_critical_loss(decoder, memory, drawn.tokens, torch.zeros(4, 20), options)
    torch.testing.assert_close(log_p, drawn.log_p, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ranked_candidates_have_the_log_p_of_each_alone(kind, several):
    decoder = build(kind)
    if several:
        decoder = Ensemble([decoder, build("prefix", seed=1)])
    regions, prompts = make_regions("empty"), [[4, 5], [], [8], [9, 10, 4]]
    candidates = torch.randint(4, WORDS, (4, 20, LENGTH - 1))
    lengths = torch.randint(1, LENGTH, (4, 20))
    candidates = candidates * (torch.arange(LENGTH - 1) < lengths[:, :, None])
    with torch.inference_mode():
        log_p = candidate_log_p(decoder, decoder.encode(regions), padded(prompts), candidates)
        for image, k in itertools.product(range(4), range(20)):
            words = [*candidates[image, k, : lengths[image, k]].tolist(), EOS]
            wanted = log_p_alone(decoder, one(regions, image), prompts[image], words).sum()
            assert log_p[image, k].item() == pytest.approx(wanted.item(), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_gradient_of_a_step_are_those_of_its_texts_one_by_one(kind):
    decoder, regions = build(kind), make_regions("empty", 3)
    prompts = [[[4, 5, 6], [7]], [[], [8, 9]], [[10], []]]
    targets = [[[5, 6, EOS], [7, EOS]], [[4, 4, 4, EOS], [9, EOS]], [[EOS], []]]
    texts = [
        [[*p, BOS, *t] if t else [] for p, t in zip(*pair, strict=True)]
        for pair in zip(prompts, targets, strict=True)
    ]
    tokens = torch.tensor([[text + [PAD] * (8 - len(text)) for text in group] for group in texts])
    lengths = torch.tensor([[len(p) for p in group] for group in prompts])
    loss, count = caption_loss(decoder, regions, tokens, PAD, prompt_lengths=lengths)
    loss.backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    total = 0.0
    for image, k in itertools.product(range(3), range(2)):
        if targets[image][k]:
            own = one(regions, image)
            part, _ = caption_loss(
                decoder, own, torch.tensor([[texts[image][k]]]), PAD,
                prompt_lengths=torch.tensor([[len(prompts[image][k])]]),
            )  # fmt: skip
            part.backward()
            total += part.item()
    assert int(count) == sum(len(t) for group in targets for t in group)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    for name, p in decoder.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("case", ["captions", "prompts", "empty prompts", "no regions"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient_in_every_step(kind, case, classes):
    """Several processes wait for the gradient of each weight (DistributedDataParallel)."""
    decoder = build(kind, classes=classes, prompt=0 if case == "captions" else PROMPT)
    regions = make_regions("empty", 2)
    if case == "no regions":
        regions = Regions(*(part[:, :0] for part in regions[:2]), regions.counts * 0)
    prompts = [[4, 5], []] if case == "prompts" else [[], []]
    lengths = torch.tensor([[len(p)] for p in prompts]) if case == "prompts" else None
    noise = Noise(regions=0.5)
    if classes:
        rows = [[*p, BOS] for p in prompts]
        tokens = torch.tensor([[row + [PAD] * (3 - len(row))] for row in rows])
        loss, _ = class_loss(decoder, regions, tokens, torch.ones(2, 5), PAD, noise, lengths)
    else:
        rows = [[*p, BOS, 6, EOS] for p in prompts]
        tokens = torch.tensor([[row + [PAD] * (5 - len(row))] for row in rows])
        loss, _ = caption_loss(decoder, regions, tokens, PAD, 0.1, noise, lengths)
    loss.backward()
    waiting = {n for n, p in decoder.named_parameters() if p.requires_grad and p.grad is None}
    assert not waiting


def test_dropped_regions_leave_an_image_without_regions_without_regions():
    regions = make_regions("empty")
    assert drop_regions(regions, 0.5).counts.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_class_scores_of_training_are_those_of_generation(kind):
    decoder, regions = build(kind, classes=5), make_regions("empty", 2)
    prompts = [[4, 5, 6], [7]]
    tokens = torch.tensor([[[4, 5, 6, BOS]], [[7, BOS, PAD, PAD]]])
    labels = torch.zeros(2, 5)
    labels[0, 1] = labels[1, 3] = 1
    lengths = torch.tensor([[3], [1]])
    loss, _ = class_loss(decoder, regions, tokens, labels, PAD, prompt_lengths=lengths)
    memory, given = decoder.encode(regions), padded(prompts)
    first = torch.cat([given, torch.full((2, 1), BOS)], dim=1)[:, None]
    logits = decoder.class_logits(first, memory, decoder.init_cache(memory, 1, given))
    wanted = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_and_earlier_words_matter_and_later_ones_do_not(kind):
    decoder, regions = build(kind), make_regions("full", 1)
    tokens = torch.tensor([[[BOS, 4, 5, 6, 7]]])

    def scores(tokens, regions=regions):
        with torch.inference_mode():
            return decoder.decode(tokens, decoder.encode(regions))[0, 0]

    before = scores(tokens)
    changed = tokens.clone()
    changed[0, 0, 3] = 9
    after = scores(changed)
    torch.testing.assert_close(after[:3], before[:3])
    assert not torch.allclose(after[4], before[4])
    other = regions._replace(features=regions.features.flip(1) + 1)
    assert not torch.allclose(scores(tokens, other)[0], before[0], atol=1e-3)
    moved = regions._replace(boxes=regions.boxes.flip(1))
    assert not torch.allclose(scores(tokens, moved)[0], before[0], atol=1e-4)


# ------------------------------------------------------------------- plain twins of each decoder


def plain_layer(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A layer of self-attention over one sequence x [S,D], head by head."""
    attention, heads = layer.attention, layer.attention.heads
    q, k, v = attention.qkv(layer.norms[0](x)).chunk(3, dim=1)
    parts = []
    for q_, k_, v_ in zip(*(part.chunk(heads, dim=1) for part in (q, k, v)), strict=True):
        scores = q_ @ k_.T / math.sqrt(q_.shape[1])
        parts.append(scores.masked_fill(~mask, -math.inf).softmax(1) @ v_)
    x = x + attention.out(torch.cat(parts, dim=1))
    return x + layer.feedforward(layer.norms[1](x))


def plain_regions(decoder: Any, regions: Regions) -> Tensor:
    features, boxes, _ = regions
    layer = decoder.region
    return layer.feature(layer.norm(features[0])) + layer.box(fourier_features(boxes[0]))


def embedded(decoder: Any, words: list[int]) -> Tensor:
    vectors = decoder.word.weight[words] * math.sqrt(decoder.config.width)
    return vectors + decoder.position.weight[: len(words)]


def test_a_prefix_decoder_is_one_stack_over_regions_and_words():
    decoder, regions, words = build("prefix"), make_regions("full", 1), [BOS, 4, 5, 6]
    x = torch.cat([plain_regions(decoder, regions), embedded(decoder, words)])
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[:5, :5] = True
    for layer in decoder.layers:
        x = plain_layer(layer, x, mask)
    logits = decoder.decode(torch.tensor([[words]]), decoder.encode(regions))[0, 0]
    torch.testing.assert_close(logits, decoder.logits(decoder.norm(x[5:])), rtol=1e-4, atol=1e-4)


def test_a_pooled_decoder_adds_one_weighted_sum_of_the_regions_to_every_word():
    decoder, regions, words = build("pooled"), make_regions("full", 1), [BOS, 4, 5, 6]
    v = plain_regions(decoder, regions)
    weights = decoder.weight(v)[:, 0].softmax(0)
    vector = decoder.pooled_norm(sum(w * region for w, region in zip(weights, v, strict=True)))
    x = embedded(decoder, words) + vector
    for layer in decoder.layers:
        x = plain_layer(layer, x, torch.ones(4, 4, dtype=torch.bool).tril())
    logits = decoder.decode(torch.tensor([[words]]), decoder.encode(regions))[0, 0]
    torch.testing.assert_close(logits, decoder.logits(decoder.norm(x)), rtol=1e-4, atol=1e-4)


def test_an_lstm_decoder_equals_torchs_cells_word_by_word():
    decoder, regions, prompt, words = build("lstm"), make_regions("full", 1), [7, 8], [BOS, 4, 5]
    width = decoder.config.width

    def cell(weights: list[Tensor], bias: Tensor) -> torch.nn.LSTMCell:
        """torch's cell; `weights` act on the parts of the input, the last one on the state."""
        made = torch.nn.LSTMCell(sum(w.shape[1] for w in weights[:-1]), width)
        made.weight_ih.data, made.weight_hh.data = torch.cat(weights[:-1], 1), weights[-1]
        made.bias_ih.data, made.bias_hh.data = bias, torch.zeros_like(bias)
        return made

    def halves(layer):
        return layer.weight.data.split(width, dim=1)

    reads = cell([*halves(decoder.prompt_gates)], decoder.prompt_gates.bias.data)
    of_h2, of_h1 = halves(decoder.state_gates)
    first = cell(
        [of_h2, decoder.mean_gates.weight.data, decoder.word_gates.weight.data,
         decoder.question_gates.weight.data, of_h1],
        decoder.mean_gates.bias.data,
    )  # fmt: skip
    of_regions, of_first, of_second = halves(decoder.language_gates)
    second = cell([of_regions, of_first, of_second], decoder.language_gates.bias.data)
    v = plain_regions(decoder, regions).relu()
    vectors = decoder.word.weight * math.sqrt(width)
    with torch.no_grad():
        h = c = torch.zeros(1, width)
        for word in prompt:
            h, c = reads(vectors[word][None], (h, c))
        question, (h1, c1), (h2, c2) = h, (h * 0, h * 0), (h * 0, h * 0)
        wanted = []
        for word in words:
            read = torch.cat([h2, v.mean(0)[None], vectors[word][None], question], dim=1)
            h1, c1 = first(read, (h1, c1))
            energies = [decoder.score((decoder.key(r) + decoder.query(h1[0])).tanh()) for r in v]
            attended = torch.cat(energies).softmax(0) @ v
            h2, c2 = second(torch.cat([attended[None], h1], dim=1), (h2, c2))
            wanted.append(decoder.logits(decoder.norm(h2))[0])
        tokens = torch.tensor([[[*prompt, *words]]])
        packed = Packed(tokens, torch.ones_like(tokens).bool(), torch.tensor([[2]]))
        logits = decoder.logits(decoder(regions, packed)[2:5])
    torch.testing.assert_close(logits, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_an_encoder_layer_with_slots_and_geometry_equals_the_formulas():
    """Cornia et al. 2020: slots are further keys and values. Herdade et al. 2019: box relations."""
    decoder, regions = build("geometry"), make_regions("full", 1)
    layer, geometry = decoder.encoder[0], decoder.geometry[0]
    x = torch.randn(5, 16)
    terms = torch.empty(2, 5, 5)
    for a, b in itertools.product(range(5), range(5)):
        one_, two = regions.boxes[0, a].tolist(), regions.boxes[0, b].tolist()
        relative = []
        for axis in (0, 1):
            distance = abs((one_[axis] + one_[axis + 2] - two[axis] - two[axis + 2]) / 2)
            relative.append(math.log(max(distance, 1e-3) / (one_[axis + 2] - one_[axis])))
        for axis in (0, 1):
            sizes = [box[axis + 2] - box[axis] for box in (two, one_)]
            relative.append(math.log(sizes[0] / sizes[1]))
        angles = torch.tensor([100 * r / 1000 ** (n / 8) for r in relative for n in range(8)])
        values = geometry.weight(torch.cat([angles.sin(), angles.cos()]))
        terms[:, a, b] = values.relu().clamp(min=1e-6).log().detach()
    q, k, v = layer.attention.qkv(layer.norms[0](x)).chunk(3, dim=1)
    parts = []
    for head in range(2):
        q_, k_, v_ = (part.chunk(2, dim=1)[head] for part in (q, k, v))
        keys = torch.cat([k_, decoder.slot_keys[0, head]])
        values = torch.cat([v_, decoder.slot_values[0, head]])
        scores = q_ @ keys.T / math.sqrt(8) + F.pad(terms[head], (0, 2))
        parts.append(scores.softmax(1) @ values)
    x1 = x + layer.attention.out(torch.cat(parts, dim=1))
    wanted = x1 + layer.feedforward(layer.norms[1](x1))
    found = layer(x[None], decoder._encoder_layout(None, box_relations(regions.boxes), 0))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_meshed_layers_sum_the_gated_readings_of_all_encoder_layers():
    """Cornia et al. 2020, equations 5 and 6."""
    decoder, regions = build("meshed"), make_regions("full", 2)
    memory, layer = decoder.encode(regions), decoder.decoder[1]
    assert len(memory.keys) == 4  # two decoder layers, two encoder layers
    tokens = torch.randint(4, WORDS, (2, 1, 3))
    packed, x = Packed(tokens), torch.randn(6, 16)
    wanted = torch.zeros(6, 16)
    for number in (0, 1):
        read = layer.cross(x, packed, memory.keys[2 + number], memory.values[2 + number], None)
        alpha = layer.gates[number](torch.cat([x, read], dim=1)).sigmoid()
        wanted += alpha * read / math.sqrt(2)
    torch.testing.assert_close(layer._read_regions(x, packed, memory, 1), wanted)


def test_options_that_need_encoder_layers_are_refused_without_them():
    for name, value in (("memory_slots", 2), ("meshed", True), ("relative_geometry", True)):
        with pytest.raises(ModelError, match=name):
            build("transformer", encoder_layers=0, **{name: value})
    record = {"words": WORDS, "channels": 6, "meshed": 1}
    with pytest.raises(ModelError, match="meshed is 1, it must be true or false"):
        DECODERS["transformer"].Config.from_record(record)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32(kind):
    decoder, regions = build(kind), make_regions("full")
    tokens = torch.randint(4, WORDS, (4, 2, 5))
    with torch.no_grad():
        exact = decoder.decode(tokens, decoder.encode(regions))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = decoder.decode(tokens, decoder.encode(regions)).float()
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("kind", ["prefix", "pooled", "lstm"])
def test_bf16_stays_near_fp32_with_padding_and_a_cache(kind):
    if open_machine("cpu").precision != "bf16":
        pytest.skip("this CPU has no native bf16")
    decoder, regions, prompts = build(kind), make_regions("empty"), padded([[4, 5], [], [8], [9]])
    tokens = torch.randint(4, WORDS, (4, 2, 5))

    def step_by_step() -> Tensor:
        memory = decoder.encode(regions)
        cache = decoder.init_cache(memory, 2, prompts)
        first = torch.cat([prompts, torch.full((4, 1), BOS)], dim=1)[:, None]
        logits = [decoder.decode(first, memory, cache)[:, :, -1:].expand(-1, 2, -1, -1)]
        logits += [decoder.decode(tokens[:, :, [t]], memory, cache) for t in range(5)]
        return torch.cat(logits, dim=2).float()

    with torch.no_grad():
        exact = step_by_step()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = step_by_step()
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()


def test_every_decoder_of_the_registry_is_tested_here():
    assert {name for name, _ in KINDS.values()} == {*DECODERS}
    assert all(issubclass(decoder, Decoder) for decoder in DECODERS.values())
