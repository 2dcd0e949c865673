"""The GPU branches, run without a GPU (tests/pretended_gpu.py)."""

from __future__ import annotations

import pytest
import torch

from models.decoders.registry import DECODERS, create_decoder
from models.generation.beam_search import beam_search
from models.generation.options import Generation
from models.generation.ranking import candidate_log_p
from models.generation.sampling import sample
from models.losses import Noise, caption_loss, class_loss, self_critical_loss
from models.regions import Regions
from tests.pretended_gpu import GPU, move, no_host_sync, pretended_gpu

IMAGES, REGIONS, CHANNELS, WORDS, PROMPT = 3, 4, 6, 30, 2
SEARCHES = (
    Generation(num_beams=4),
    Generation(num_beams=4, num_beam_groups=2, diversity_penalty=0.5, num_return_sequences=2),
    Generation(early_stopping=True, no_repeat_ngram_size=2, min_length=2, bad_words_ids=((5, 6),)),
)


def small_decoder(name, **sizes):
    torch.manual_seed(0)
    heads = {} if name == "lstm" else {"heads": 2, "decoder_layers": 1, "feedforward": 16}
    config = DECODERS[name].Config(
        WORDS, CHANNELS, width=8, max_length=5, max_prompt=PROMPT, **heads, **sizes
    )
    return create_decoder(name, config).eval()


def some_regions():
    """Regions of images with fewer regions than the largest, and prompts."""
    torch.manual_seed(1)
    regions = Regions(
        torch.randn(IMAGES, REGIONS, CHANNELS).half(),
        torch.rand(IMAGES, REGIONS, 4).sort(dim=2).values,
        torch.tensor([REGIONS, 2, REGIONS]),
    )
    return regions, torch.tensor([[0, 7], [8, 9], [5, 6]])


def on_gpu(regions):
    return Regions(*(part.to(GPU) for part in regions))


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu():
        here, there = torch.ones(2), torch.ones(2).to(GPU)
        assert there.device == GPU and (there + 1).cpu().tolist() == [2, 2]
        assert torch.arange(2, device=GPU).device == GPU and there.to(here).device == here.device
        with pytest.raises(AssertionError, match="on the CPU and on the GPU"):
            here + there
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        for wait in (
            lambda: there.sum().item(),
            lambda: there[there > 0],
            lambda: there.cpu(),
            lambda: here.to(GPU),
            lambda: bool(there.any()),
        ):
            wait()
            with no_host_sync(), pytest.raises(AssertionError, match=r"waits|from the host"):
                wait()


@pytest.mark.parametrize("name", DECODERS)
def test_a_cuda_graph_can_capture_beam_search_and_it_finds_what_the_cpu_finds(name):
    regions, prompts = some_regions()
    plain, moved = small_decoder(name), small_decoder(name)
    with torch.inference_mode():
        memory = plain.encode(regions)
        wanted = [beam_search(plain, memory, options, prompts) for options in SEARCHES]
    with torch.inference_mode(), pretended_gpu():
        moved, there = move(moved), on_gpu(regions)
        memory, prompts = moved.encode(there), prompts.to(GPU)
        with no_host_sync():
            found = [beam_search(moved, memory, options, prompts) for options in SEARCHES]
        for ours, reference in zip(found, wanted, strict=True):
            assert torch.equal(ours.tokens.cpu(), reference.tokens)
            torch.testing.assert_close(ours.log_p.cpu(), reference.log_p)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_samples_ranks_and_losses_of_a_gpu_are_those_of_the_cpu(name):
    regions, prompts = some_regions()
    decoder = small_decoder(name, classes=3)
    policy = Generation(do_sample=True, num_return_sequences=3, num_beams=1)
    uniforms = torch.rand(IMAGES, 3, 5)
    candidates = torch.randint(4, WORDS, (IMAGES, 4, 2))
    tokens = torch.randint(4, WORDS, (IMAGES, 2, 5))
    tokens[:, :, PROMPT], tokens[0, 1, 4:] = 1, 0
    lengths, labels = torch.full((IMAGES, 2), PROMPT), torch.rand(2 * IMAGES, 3)

    def results(decoder, regions, prompts, candidates):
        memory = decoder.encode(regions)
        samples = sample(decoder, memory, policy, uniforms=uniforms, prompts=prompts)
        drawn = sample(decoder, memory, policy, uniforms=uniforms).tokens.cpu()
        advantages = torch.linspace(-1, 1, IMAGES * 3).view(IMAGES, 3)
        loss, log_p = self_critical_loss(decoder, memory, drawn, advantages, policy)
        questions = tokens[:, :, : PROMPT + 1]
        yield from (samples.tokens, samples.log_p, loss, log_p)
        yield candidate_log_p(decoder, memory, prompts, candidates)
        yield caption_loss(decoder, regions, tokens, 0, 0.1, Noise(), lengths)[0]
        yield class_loss(decoder, regions, questions, labels, 0, Noise(), lengths)[0]

    with torch.no_grad():
        wanted = list(results(decoder, regions, prompts, candidates))
    with torch.no_grad(), pretended_gpu():
        there = on_gpu(regions), prompts.to(GPU), candidates.to(GPU)
        found = list(results(move(decoder), *there))
        # noise draws random numbers on the device
        noise = Noise(regions=0.3, words=0.3, sampled=0.5, unknown=3)
        noisy = caption_loss(decoder.train(), there[0], tokens, 0, 0.1, noise, lengths)[0]
        assert torch.isfinite(noisy.cpu())
        for ours, reference in zip(found, wanted, strict=True):
            assert ours.device == GPU
            torch.testing.assert_close(ours.cpu(), reference)
