"""Self-critical training: its gradient is that of the expected reward, and its samples are the
captioner's own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from data.batches import Batch
from data.vocabulary import BOS, EOS, PAD, UNK
from models.decoders.interface import Memory
from models.decoders.transformer import Transformer, TransformerConfig
from models.generation.beam_search import beam_search
from models.generation.options import Generation
from models.generation.sampling import sample
from models.losses import self_critical_loss
from models.regions import Regions
from pipeline.cli import UserError
from pipeline.runtime import Machine
from pipeline.training.config import TrainConfig
from pipeline.training.objectives import SelfCritical

FP32 = Machine(torch.device("cpu"), "fp32", 0, 1)
LIMIT = 2
THREE = [4, 5, 6]  # the ids of a vocabulary of three words


def small(words: int = 7, limit: int = LIMIT, width: int = 16, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(
        words, 6, limit, width=width, heads=2, encoder_layers=1, decoder_layers=2,
        feedforward=2 * width, dropout=0.0,
    )  # fmt: skip
    captioner = Transformer(config)
    for weight in captioner.parameters():
        # words are not equally likely
        weight.data.add_((0.3 if words == 7 else 0.05) * torch.randn_like(weight))
    captioner.output_bias.data[EOS] += words / 30  # some captions end, some are cut
    return captioner.train()


def images(count: int, seed: int = 1) -> Batch:
    torch.manual_seed(seed)
    counts = torch.arange(count) % 3 + 3
    features = torch.randn(count, 5, 6).half()
    features[torch.arange(5) >= counts[:, None]] = 0
    return Batch(
        features,
        torch.rand(count, 5, 4),
        counts,
        torch.zeros(count, 1, 1, dtype=torch.int64),
        list(range(count)),
    )


def regions(batch: Batch) -> Regions:
    return Regions(batch.features, batch.boxes, batch.counts)


def objective(
    captioner: Transformer, rewards=None, machine: Machine = FP32, **settings
) -> SelfCritical:
    config = TrainConfig(scst=True, init=Path("runs/xe"), **settings)
    return SelfCritical(
        config, machine, captioner, rewards or (lambda image_ids, samples: samples.sum(2) / 100)
    )


def every_caption() -> torch.Tensor:
    """All that three words can say within the limit, <eos> after their end: [N,L]."""
    ended = [[*words, EOS] for n in range(LIMIT) for words in itertools.product(THREE, repeat=n)]
    cut = [list(words) for words in itertools.product(THREE, repeat=LIMIT)]
    return torch.tensor([caption + [EOS] * (LIMIT - len(caption)) for caption in [*ended, *cut]])


def enumerated_log_p(captioner: Transformer, memory: Memory, temperature: float) -> torch.Tensor:
    """log p of every caption by the plain way: softmax over <eos> and the three words, place by
    place, [N].
    """
    found = []
    for caption in every_caption().tolist():
        total, read = torch.zeros(()), [BOS]
        for word in caption:
            logits = captioner.decode(torch.tensor([[read]]), memory)[0, 0, -1].clone()
            logits[[PAD, BOS, UNK]] = -torch.inf
            total = total + (logits / temperature).log_softmax(0)[word]
            read.append(word)
            if word == EOS:
                break
        found.append(total)
    return torch.stack(found)


def gradient(captioner: Transformer, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(captioner.parameters()), allow_unused=True)
    return parameters_to_vector(
        torch.zeros_like(p) if g is None else g
        for p, g in zip(captioner.parameters(), found, strict=True)
    )


# ----------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_the_expected_gradient_is_that_of_the_enumerated_expected_reward(baseline, temperature):
    """Three words, captions of up to two: all 13 captions, cut ones among them, and all 169 pairs
    of samples.
    """
    captioner, one = small(), images(1)
    memory = captioner.encode(regions(one))
    log_p = enumerated_log_p(captioner, memory, temperature)
    # nothing is lost to padding or to the limit
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    captions = every_caption()
    reward = torch.rand(len(captions), generator=torch.Generator().manual_seed(2))
    wanted = gradient(captioner, -(log_p.exp() * reward).sum())

    def rewards(image_ids, samples):
        return reward[(samples[:, :, None] == captions).all(-1).int().argmax(-1)]

    critical = objective(
        captioner, rewards, num_samples=2, baseline=baseline, temperature=temperature
    )
    pairs = torch.cartesian_prod(torch.arange(len(captions)), torch.arange(len(captions)))
    drawn = captions[pairs]  # [169,2,L]
    memory = captioner.encode(regions(one)).keep(torch.zeros(len(pairs), dtype=torch.int64))
    of_drawn = rewards([], drawn)
    advantages = of_drawn - critical.baseline(memory, of_drawn, [0] * len(pairs), 0)
    likely = log_p.detach().exp()[pairs].prod(1, keepdim=True)
    loss, found_log_p = self_critical_loss(
        captioner, memory, drawn, advantages * likely, critical.policy
    )
    torch.testing.assert_close(found_log_p, log_p.detach()[pairs], rtol=1e-5, atol=1e-5)
    found = gradient(captioner, loss / 2)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_samples_come_as_often_as_they_are_likely_cut_ones_too(temperature):
    captioner, one = small(), images(1)
    critical = objective(captioner, num_samples=1000, temperature=temperature)
    with torch.no_grad():
        memory = captioner.encode(regions(one))
        p = enumerated_log_p(captioner, memory, temperature).exp()
        drawn = torch.cat([critical.draw_samples(memory, [0], step)[0] for step in range(20)])
    counts = (drawn[:, None] == every_caption()).all(-1).sum(0)
    assert counts.sum() == len(drawn)  # nothing else is said
    chi_square = ((counts - len(drawn) * p) ** 2 / (len(drawn) * p)).sum()
    assert chi_square < 32.9  # 12 degrees of freedom, p 0.001


# ------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_p_of_sampling_is_that_of_the_teacher_forced_pass(precision, temperature):
    """Step by step with a cache of keys and values, and all at once, packed: the same
    distribution.
    """
    captioner, four = small(60, 12, 64), images(4)
    machine = replace(FP32, precision=precision)
    policy = Generation(
        num_beams=1, do_sample=True, num_return_sequences=5, temperature=temperature
    )
    with torch.no_grad(), machine.autocast():
        memory = captioner.encode(regions(four))
        drawn = sample(captioner, memory, policy, torch.Generator().manual_seed(0))
    ended = (drawn.tokens == EOS).any(2)
    assert ended.any() and not ended.all()  # some end, some are cut
    with machine.autocast():
        _, log_p = self_critical_loss(captioner, memory, drawn.tokens, torch.ones(4, 5), policy)
    tolerance = 1e-4 if precision == "fp32" else 0.25  # nats, of some 20 a sample
    torch.testing.assert_close(log_p, drawn.log_p, rtol=0, atol=tolerance)
    assert (log_p - drawn.log_p).mean().abs() < tolerance / 5


def test_with_dropout_sampling_and_the_teacher_forced_pass_both_have_it():
    captioner = small(60, 12, 64)
    critical, four = objective(captioner), images(4)
    memory = captioner.encode(regions(four))  # without
    drawn = critical.draw_samples(memory, four.image_ids, 3)

    def log_p():
        return self_critical_loss(captioner, memory, drawn, torch.ones(4, 5), critical.policy)[1]

    assert torch.equal(drawn, critical.draw_samples(memory, four.image_ids, 3)) and torch.equal(
        log_p(), log_p()
    )
    for module in captioner.modules():
        if hasattr(module, "p"):
            module.p = 0.5
    torch.manual_seed(0)
    assert not torch.equal(
        drawn, critical.draw_samples(memory, four.image_ids, 3)
    ) and not torch.equal(log_p(), log_p())


def test_what_is_drawn_follows_from_seed_step_and_image_alone():
    captioner, six = small(60, 12, 64), images(6)
    critical = objective(captioner)

    def draw(chosen, step=3, seed=0):
        batch = Batch(
            *(part[chosen] for part in (six.features, six.boxes, six.counts, six.tokens)), chosen
        )
        of_seed = objective(captioner, seed=seed) if seed else critical
        return of_seed.draw_samples(captioner.encode(regions(batch)), chosen, step)

    together = draw([0, 1, 2, 3, 4, 5])
    torch.manual_seed(99)
    for chosen in ([2], [5, 0], [4, 3, 1]):
        assert torch.equal(draw(chosen), together[chosen])
    assert not torch.equal(draw([0, 1], step=4), together[[0, 1]])
    assert not torch.equal(draw([0, 1], seed=1), together[[0, 1]])
    assert not torch.equal(together[0, 0], together[0, 1])


@pytest.mark.parametrize("many", [9, 16, 17])
def test_more_samples_than_are_attended_to_together_begin_with_the_same(many):
    captioner, two = small(60, 12, 64), images(2)
    memory = captioner.encode(regions(two))
    few, more = (
        objective(captioner, num_samples=k).draw_samples(memory, [0, 1], 3) for k in (5, many)
    )
    assert more.shape == (2, many, 12) and torch.equal(more[:, :5], few)


def test_beam_samples_are_the_beams_and_their_advantages_sum_to_nothing():
    captioner, three = small(60, 12, 64), images(3)
    critical = objective(captioner, samples="beam", num_samples=4)
    memory = captioner.encode(regions(three))
    drawn = critical.draw_samples(memory, three.image_ids, 0)
    plain = beam_search(captioner, memory, Generation(num_beams=4, num_return_sequences=4))
    assert torch.equal(drawn, plain.tokens)
    rewards = critical.compute_rewards(drawn, three.image_ids, 0)
    advantages = rewards - critical.baseline(memory, rewards, three.image_ids, 0)
    assert advantages.abs().sum() > 0 and advantages.sum(1).abs().max() < 1e-4
    assert critical(captioner, three, 0, 0.0).loss.requires_grad


def test_the_greedy_baseline_is_the_reward_of_the_greedy_caption():
    captioner, three = small(60, 12, 64), images(3)
    critical = objective(captioner, baseline="greedy", num_samples=1)
    memory = captioner.encode(regions(three))
    greedy = beam_search(captioner, memory, Generation(num_beams=1)).tokens
    found = critical.baseline(memory, torch.zeros(3, 1), three.image_ids, 0)
    torch.testing.assert_close(found, greedy.sum(2) / 100)


def test_the_mean_baseline_is_that_of_the_other_samples():
    critical = objective(small(), num_samples=3)
    found = critical.baseline(None, torch.tensor([[1.0, 2.0, 6.0]]), [0], 0)
    assert found.tolist() == [[4.0, 3.5, 1.5]]


# --------------------------------------------------------------------------------------------- step


def test_each_image_is_encoded_once_a_step(monkeypatch):
    captioner, seen = small(60, 12, 64), []
    plain = captioner.encode
    monkeypatch.setattr(
        captioner, "encode", lambda given: seen.append(len(given.features)) or plain(given)
    )
    objective(captioner, baseline="greedy")(captioner, images(4), 0, 0.0)
    assert seen == [4]


def test_regions_are_left_out_once_a_step_for_samples_and_gradient_alike(monkeypatch):
    captioner, seen = small(60, 12, 64), []
    plain = captioner.encode
    monkeypatch.setattr(captioner, "encode", lambda given: seen.append(given) or plain(given))
    objective(captioner, region_dropout=0.4)(captioner, images(4), 0, 0.0)
    assert [given.counts.tolist() for given in seen] == [[2, 2, 3, 2]]  # of 3, 4, 5, 3


def test_parts_of_a_step_add_up_to_the_whole():
    captioner, six = small(60, 12, 64), images(6)
    critical = objective(captioner)
    whole = critical(captioner, six, 3, 0.0)
    parts = [critical(captioner, part, 3, 0.0) for part in six.split(3)]
    torch.testing.assert_close(sum(part.metrics for part in parts), whole.metrics)
    wanted = gradient(captioner, whole.loss)
    assert (
        sum(gradient(captioner, part.loss) for part in parts) - wanted
    ).norm() < 1e-5 * wanted.norm()


def test_in_bf16_every_weight_has_its_gradient():
    """Casts that sampling makes and autocast keeps know of no gradient: the pass after it must make
    its own.
    """
    captioner, four = small(60, 12, 64), images(4)
    fp32, bf16 = (
        objective(captioner, machine=replace(FP32, precision=p)) for p in ("fp32", "bf16")
    )
    fp32.draw_samples = bf16.draw_samples  # bf16 draws others here and there
    wanted, found = (
        gradient(captioner, critical(captioner, four, 0, 0.0).loss) for critical in (fp32, bf16)
    )
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.95
    bf16(captioner, four, 0, 0.0).loss.backward()
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in captioner.parameters()
    )


def test_figures_are_what_was_drawn():
    captioner, four = small(60, 12, 64), images(4)
    critical = objective(captioner)
    drawn = critical.draw_samples(captioner.encode(regions(four)), four.image_ids, 0)
    figures = dict(
        zip(critical.names, critical(captioner, four, 0, 0.0).metrics.tolist(), strict=True)
    )
    ends = (drawn == EOS).any(2)
    words = [len(row) if EOS not in row else row.index(EOS) for row in drawn.flatten(0, 1).tolist()]
    assert (figures["words"], figures["ended"]) == (
        sum(words),
        ends.sum(),
    ) and 0 < ends.sum() < ends.numel()
    assert figures["reward"] == pytest.approx(drawn.sum().item() / 100) and figures["nats"] > 0


def test_a_reward_that_is_no_number_stops_with_the_step_and_the_images():
    def rewards(image_ids, samples):
        found = torch.ones(samples.shape[:2])
        found[2, 1] = float("nan")
        return found

    captioner = small()
    with pytest.raises(UserError, match="a reward is not a finite number at step 17, images 2;"):
        objective(captioner, rewards)(captioner, images(4), 17, 0.0)


def test_weights_that_are_no_numbers_give_a_loss_that_is_none_rather_than_words_that_are_none():
    captioner = small(60, 12, 64)
    captioner.output_bias.data.fill_(float("nan"))
    found = objective(captioner)(captioner, images(2), 0, 0.0)
    assert not found.loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"init": None}, "--scst needs --init"),
        ({"num_samples": 1}, "--num-samples 1: each sample is compared with the other samples"),
        (
            {"samples": "beam", "baseline": "greedy"},
            "--samples beam cannot be used with --baseline greedy",
        ),
        ({"word_dropout": 0.1}, "not of --scst"),
        ({"num_samples": 0}, "must be at least 1"),
        ({"scheduled_sampling": 0.1}, "--scheduled-sampling is of training"),
        ({"num_samples": 1, "samples": "beam"}, "each sample is compared with the other samples"),
        ({"label_smoothing": 0.2}, "not of --scst"),
        ({"scst": False, "reward": "BLEU-4"}, "--reward is of --scst"),
        ({"scst": False, "num_samples": 9}, "is of --scst"),
        (
            {"samples": "beam", "temperature": 0.5},
            "--samples beam cannot be used with --temperature",
        ),
        ({"temperature": 0.0}, "--temperature is 0.0, it must"),
        ({"scst": False, "temperature": 0.5}, "--temperature is of --scst"),
        ({"temperature": -1.0}, "must be above 0"),
        ({"preset": "small"}, "--preset small cannot be used with --init"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        TrainConfig(**{"scst": True, "init": Path("runs/xe")} | settings)
