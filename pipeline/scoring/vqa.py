"""Accuracy of answers to questions, as the official VQA evaluation computes it.

The official code (GT-Vision-Lab/VQA, vqaEvaluation/vqaEval.py) is followed to the letter; its
oddities are listed in docs/formats.md. Antol et al. 2015; Goyal et al. 2017.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

Variant = Literal["vqa", "okvqa", "equality"]
VARIANTS = ("vqa", "okvqa")  # for questions with several answers

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = {"a", "an", "the"}
# in the order of the official list; colon, apostrophe and period are not in it
PUNCTUATION = r';/[]"{}()=+\_-><@`,?!'
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # the look-behind is mistyped officially: it never holds
COMMA_IN_NUMBER = re.compile(r"\d,\d")
MOST_PERIODS = 32  # officially re.UNICODE, given in place of the count
# The official table of contractions, without the entries that change nothing: those with capital
# letters, which lower-cased words never equal, and those of a word to itself.
CONTRACTIONS = dict(
    pair.split(" ")
    for pair in """
aint ain't|arent aren't|cant can't|couldve could've|couldnt couldn't|couldn'tve couldn't've
couldnt've couldn't've|didnt didn't|doesnt doesn't|dont don't|hadnt hadn't|hadnt've hadn't've
hadn'tve hadn't've|hasnt hasn't|havent haven't|hed he'd|hed've he'd've|he'dve he'd've|hes he's
howd how'd|howll how'll|hows how's|isnt isn't|itd it'd|itd've it'd've|it'dve it'd've|itll it'll
maam ma'am|mightnt mightn't|mightnt've mightn't've|mightn'tve mightn't've|mightve might've
mustnt mustn't|mustve must've|neednt needn't|notve not've|oclock o'clock|oughtnt oughtn't
ow's'at 'ow's'at|'ows'at 'ow's'at|'ow'sat 'ow's'at|shant shan't|shed've she'd've|she'dve she'd've
shouldve should've|shouldnt shouldn't|shouldnt've shouldn't've|shouldn'tve shouldn't've
somebody'd somebodyd|somebodyd've somebody'd've|somebody'dve somebody'd've|somebodyll somebody'll
somebodys somebody's|someoned someone'd|someoned've someone'd've|someone'dve someone'd've
someonell someone'll|someones someone's|somethingd something'd|somethingd've something'd've
something'dve something'd've|somethingll something'll|thats that's|thered there'd
thered've there'd've|there'dve there'd've|therere there're|theres there's|theyd they'd
theyd've they'd've|they'dve they'd've|theyll they'll|theyre they're|theyve they've|twas 'twas
wasnt wasn't|wed've we'd've|we'dve we'd've|weve we've|werent weren't|whatll what'll|whatre what're
whats what's|whatve what've|whens when's|whered where'd|wheres where's|whereve where've|whod who'd
whod've who'd've|who'dve who'd've|wholl who'll|whos who's|whove who've|whyll why'll|whyre why're
whys why's|wont won't|wouldve would've|wouldnt wouldn't|wouldnt've wouldn't've
wouldn'tve wouldn't've|yall y'all|yall'll y'all'll|y'allll y'all'll|yall'd've y'all'd've
y'alld've y'all'd've|y'all'dve y'all'd've|youd you'd|youd've you'd've|you'dve you'd've|youll you'll
youre you're|youve you've
""".strip()
    .replace("\n", "|")
    .split("|")
)


@functools.lru_cache(maxsize=1 << 17)  # people repeat answers
def strip_punctuation(text: str) -> str:
    """Remove punctuation, or replace it by a space.

    A mark is removed if it stands beside a space somewhere in the text, or if the text has a comma
    between digits; else it becomes a space. Periods that no digit follows are removed.
    """
    stripped, comma = text, COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        remove = comma or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if remove else " ")
    return PERIOD.sub("", stripped, count=MOST_PERIODS)


@functools.lru_cache(maxsize=1 << 17)
def normalize(answer: str) -> str:
    """Return an answer in the form that is compared: lower case, without punctuation and articles,
    number words as digits, contractions with their apostrophe.
    """
    text = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(
    answer: str, annotations: Sequence[Mapping[str, object]], variant: Variant = "vqa"
) -> float:
    """The accuracy of an answer to one question, in 0..1.

    annotations: the entries of people's answers, `answer` among their fields.
    variant: "vqa": the mean over all people of min(1, n / 3), where n counts equal answers of the
        others; 0, 1, 2, 3, 4 equal answers of ten give 0, 0.3, 0.6, 0.9, 1. "okvqa": min(1, n / 3)
        over all people (OK-VQA, A-OKVQA). "equality": whether any answer is equal after
        normalisation, for questions with one answer.
    """
    given = normalize(answer)
    people = [str(entry["answer"]) for entry in annotations]
    if variant == "equality":
        return float(given in map(normalize, people))
    if len(set(people)) > 1:
        people = [strip_punctuation(person) for person in people]
    equal = [person == given for person in people]
    if variant == "okvqa":
        return min(1.0, sum(equal) / 3)
    matching = [
        {**entry, "answer": given} for entry, match in zip(annotations, equal, strict=True) if match
    ]
    # For a person with another answer, no matching entry is left out.
    total = (len(people) - len(matching)) * min(1.0, len(matching) / 3)
    for entry in matching:  # entries that equal this one in all fields are left out with it
        total += min(1.0, (len(matching) - matching.count(entry)) / 3)
    return total / len(people)
