"""Writers, options by their names, and work on every core."""

from __future__ import annotations

import threading

import pytest
import torch

from data.segmentation import segmented
from data.subwords import Subwords
from data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from models import ModelError
from models.generation.options import Generation
from pipeline.cli import UserError
from pipeline.decoding.captioner import (
    CaptionGenerator,
    cast_linears_to_bf16,
    make_generation,
    on_every_core,
)
from pipeline.decoding.options import NAMES, DecodingOptions, by_option
from pipeline.runtime import Machine
from tests.test_captioner import WORDS, some_regions, tiny

CPU = Machine(torch.device("cpu"), "fp32", 0, 1)
VOCABULARY = Vocabulary(["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefg"])


def writer(**options):
    return CaptionGenerator(tiny(), VOCABULARY, CPU, Generation(**options))


def test_the_search_s_special_words_are_the_vocabulary_s():
    options = Generation()
    assert (options.bos_token_id, options.eos_token_id, options.suppress_tokens) == (
        BOS,
        EOS,
        (PAD, BOS, UNK),
    )
    assert len(VOCABULARY) == WORDS


def test_every_option_is_a_setting_of_the_search():
    names = {NAMES.get(name, name) for name in DecodingOptions.__dataclass_fields__}
    names -= {"extensions", "consensus"}  # the latter chooses among what a search found
    assert names < set(Generation.__dataclass_fields__)


def test_captions_come_with_their_log_probabilities_best_first():
    found = writer(num_beams=4, num_return_sequences=3, length_penalty=0.5)(some_regions(3))
    for captions in found:
        assert len({caption.text for caption in captions}) == 3
        assert [caption.score for caption in captions] == sorted(
            (caption.score for caption in captions), reverse=True
        )
        for caption in captions:
            length = min(len(caption.text.split()) + 1, 7)
            assert caption.score == pytest.approx(caption.log_p / length**0.5, abs=1e-4)


def test_samples_follow_from_the_seed_and_the_batch():
    draws = writer(do_sample=True, num_return_sequences=6)
    regions = some_regions(3)
    assert draws(regions, 1) == draws(regions, 1) != draws(regions, 2)
    assert CaptionGenerator(draws.captioner, VOCABULARY, CPU, draws.options, seed=1)(
        regions, 1
    ) != draws(regions, 1)


@pytest.mark.parametrize("option", ["bad_words", "force_words"])
@pytest.mark.parametrize("pieces", [False, True])
def test_phrases_of_a_run_by_characters_are_cut_as_its_captions_are(option, pieces):
    captions = [
        segmented(text, "characters") for text in ("一只狗在草地上奔跑", "两只狗和iPhone 在桌上")
    ]
    if pieces:
        pytest.importorskip("tokenizers")
        vocabulary = Subwords.build(captions, 60, "characters")
    else:
        vocabulary = Vocabulary.build(captions, 1, "characters")
    found = getattr(
        make_generation({}, vocabulary, {option: ("草地", "狗和iPhone")}), f"{option}_ids"
    )
    assert [vocabulary.decode(ids) for ids in found] == [
        vocabulary.decode(vocabulary.encode(words))
        for words in (["草", "地"], ["狗", "和", "iphone"])
    ]
    assert pieces or [len(ids) for ids in found] == [2, 3]


def test_options_mean_the_same_by_either_name():
    ours = make_generation(
        {"beam": 5, "length_penalty": 1.0},
        VOCABULARY,
        {"nbest": 2, "bad_words": ("a", "B c", "zebra")},
    )
    assert ours == Generation(num_return_sequences=2, bad_words_ids=((4,), (5, 6)))
    assert make_generation({"beam": 5}, VOCABULARY, {"num_beams": 2}) == Generation(num_beams=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beam": 0}, "--beam is 0"),
        ({"nbest": 7}, "--nbest 7 is above --beam 5"),
        ({"beam_groups": 2}, "--beam 5 is not a multiple of --beam-groups 2"),
        (
            {"top_p": 0.5},
            "--temperature, --top-k and --top-p need --sample",
        ),
        (
            {"force_words": ("a zebra",)},
            "--force-words: 'a zebra' cannot be generated: .*vocabulary does not have 'zebra'",
        ),
        ({"temperature": -1.0, "sample": True}, "--temperature is -1.0"),
        ({"temperature": 1e-40, "sample": True}, "--temperature is 1e-40"),
        ({"length_penalty": float("nan")}, "--length-penalty is nan"),
        ({"length_penalty": 30.0}, "--length-penalty is 30.0"),
        ({"beam_groups": 5, "diversity": float("inf")}, "--diversity is inf"),
        ({"force_words": ("<eos>",)}, "<eos>"),
        (
            {"sample": True, "beam_groups": 2},
            "--sample cannot be combined with --beam-groups",
        ),
    ],
)
def test_errors_name_the_options(given, message):
    with pytest.raises(UserError, match=message), by_option():
        make_generation({"beam": 5}, VOCABULARY, given)


@pytest.mark.parametrize("name", ["beam", "nbest", "consensus"])
def test_more_captions_of_an_image_than_memory_has_room_for_are_refused(name):
    assert DecodingOptions(**{name: 1000}).given() == {name: 1000}
    with pytest.raises(UserError, match=f"--{name} is 1001, it must be at most 1,000"):
        DecodingOptions(**{name: 1001})


def test_errors_in_python_name_what_python_was_given():
    with pytest.raises(ModelError, match="num_return_sequences 7 is above num_beams 5"):
        make_generation({"beam": 5}, VOCABULARY, {"num_return_sequences": 7})


def test_errors_of_the_search_name_the_options_too():
    with pytest.raises(UserError, match="--max-length is 9"), by_option():
        writer(max_length=9)(some_regions(1))


def test_weights_kept_in_bf16_give_the_scores_of_autocast_to_the_bit():
    captioner, regions, tokens = tiny(), some_regions(3), torch.randint(4, WORDS, (3, 2, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = captioner.decode(tokens, captioner.encode(regions))
        cast_linears_to_bf16(captioner, Machine(torch.device("cpu"), "bf16", 0, 1))
        after = captioner.decode(tokens, captioner.encode(regions))
    assert torch.equal(before, after) and captioner.word.weight.dtype == torch.float32


def test_work_on_every_core_keeps_its_order_and_its_threads_to_one(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together, seen = threading.Barrier(3, timeout=30), set()

    def work(part):
        if part < 3:
            together.wait()  # three at once
        seen.add(threading.get_ident())
        return part * part

    assert list(on_every_core(work, range(20), CPU)) == [n * n for n in range(20)]
    assert len(seen) == 3 and threading.get_ident() not in seen


def test_too_little_memory_is_one_message(monkeypatch):
    def fails(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 "
            "bytes"
        )

    write = writer()
    monkeypatch.setattr(write.captioner, "encode", fails)
    with pytest.raises(UserError, match="out of memory"):
        write(some_regions(1))


def test_an_error_on_one_core_is_raised():
    def work(part):
        raise UserError(f"part {part}")

    with pytest.raises(UserError, match="part 0"):
        list(on_every_core(work, range(5), CPU))
