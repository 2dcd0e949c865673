"""Log-probabilities of candidate texts: one pass over a shared prompt against each text alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.decoders.transformer import Transformer, TransformerConfig
from models.generation.ensemble import Ensemble
from models.generation.ranking import candidate_log_p
from models.losses import caption_loss
from models.regions import Regions

WORDS, LONGEST, PROMPT = 30, 6, 7


def decoder(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(
        words=WORDS, channels=8, max_length=LONGEST, max_prompt=PROMPT, width=32, heads=4,
        encoder_layers=1, decoder_layers=2, feedforward=64,
    )  # fmt: skip
    return Transformer(config).eval()


def regions(images: int) -> Regions:
    counts = torch.tensor([5, 3, 0, 4, 1])[:images]
    return Regions(torch.randn(images, 5, 8).half(), torch.rand(images, 5, 4), counts)


def texts(images: int, candidates: int) -> Tensor:
    """Random candidates [B,K,LONGEST]; in each image the last one is padding only."""
    tokens = torch.randint(4, WORDS, (images, candidates, LONGEST))
    lengths = torch.randint(1, LONGEST + 1, (images, candidates))
    lengths[:, -1] = 0
    return tokens * (torch.arange(LONGEST) < lengths[:, :, None])


def alone(model: Transformer, rows: Regions, prompt: list[int], words: list[int]) -> float:
    """log p of one text after its prompt, which is read again for each text."""
    tokens = torch.tensor([[[*prompt, 1, *words, 2]]])
    loss, _ = caption_loss(model, rows, tokens, 0, prompt_lengths=torch.tensor([[len(prompt)]]))
    return -float(loss)


@pytest.mark.parametrize("has_prompts", [True, False])
def test_candidates_in_one_pass_have_the_log_probability_of_each_alone(has_prompts):
    model, images = decoder(), 5
    rows, candidates = regions(images), texts(images, 40)
    lengths = [0, 3, PROMPT, 1, 5] if has_prompts else [0] * images
    prompts = [torch.randint(4, WORDS, (length,)).tolist() for length in lengths]
    padded = torch.tensor([[0] * (PROMPT - len(p)) + p for p in prompts])
    with torch.inference_mode():
        memory = model.encode(rows)
        log_p = candidate_log_p(model, memory, padded if has_prompts else None, candidates)
        for b in range(images):
            own = Regions(*(part[b : b + 1] for part in rows))
            for k in range(39):
                words = [word for word in candidates[b, k].tolist() if word]
                expected = alone(model, own, prompts[b], words)
                assert float(log_p[b, k]) == pytest.approx(expected, abs=1e-4)
    assert (log_p[:, 39] == -torch.inf).all()


def test_an_ensemble_ranks_by_the_mean_probability_of_each_word():
    members = [decoder(0), decoder(1)]
    ensemble, rows, candidates = Ensemble(members), regions(2), texts(2, 4)
    prompts = torch.randint(4, WORDS, (2, 3))
    with torch.inference_mode():
        log_p = candidate_log_p(ensemble, ensemble.encode(rows), prompts, candidates)
        for b in range(2):
            own = Regions(*(part[b : b + 1] for part in rows))
            for k in range(3):
                words = [word for word in candidates[b, k].tolist() if word]
                read, total = [*prompts[b].tolist(), 1], 0.0
                for word in [*words, 2]:  # word by word
                    lengths = torch.tensor([[3]])
                    p = torch.tensor(0.0)
                    for member in members:
                        given = torch.tensor([[[*read, word]]])
                        loss, _ = caption_loss(member, own, given, 0, prompt_lengths=lengths)
                        before = torch.tensor(0.0)
                        if len(read) > 4:
                            before, _ = caption_loss(
                                member, own, given[:, :, :-1], 0, prompt_lengths=lengths
                            )
                        p = p + (before - loss).exp() / 2
                    total += float(p.log())
                    read.append(word)
                assert float(log_p[b, k]) == pytest.approx(total, abs=1e-4)
