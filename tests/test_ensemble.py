"""An ensemble is the mean of its captioners' probabilities."""

from __future__ import annotations

import torch

from models.generation.beam_search import beam_search
from models.generation.ensemble import Ensemble
from models.generation.options import Generation
from tests.test_captioner import close, some_regions, some_tokens, tiny


def another(**changes):
    captioner = tiny(**changes)
    for parameter in captioner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return captioner


def test_probabilities_are_the_mean_of_the_captioners_own():
    members, regions, tokens = (
        [tiny(), another(decoder_layers=1)],
        some_regions(3),
        some_tokens(3, 2, 5),
    )
    both = Ensemble(members)
    found = both.decode(tokens, both.encode(regions)).exp()
    wanted = sum(one.decode(tokens, one.encode(regions)).softmax(-1) for one in members) / 2
    assert close(found, wanted)


def test_cached_decoding_equals_full_decoding():
    both, regions, tokens = Ensemble([tiny(), another()]), some_regions(2), some_tokens(2, 3, 5)
    memory = both.encode(regions)
    cache = both.init_cache(memory, 3)
    steps = [both.decode(tokens[:, :, t : t + 1], memory, cache) for t in range(5)]
    assert close(torch.cat(steps, 2), both.decode(tokens, memory))


def test_a_captioner_with_itself_writes_its_own_captions():
    captioner, regions = tiny(), some_regions(40)  # some finish before others and leave
    options = Generation(num_beams=4, num_return_sequences=3, max_length=7)
    both = Ensemble([captioner, captioner])
    alone, together = (beam_search(one, one.encode(regions), options) for one in (captioner, both))
    assert torch.equal(alone.tokens, together.tokens) and close(alone.scores, together.scores)


def test_captions_are_as_long_as_all_can_write():
    assert Ensemble([tiny(), another(max_length=5)]).config.max_length == 5
