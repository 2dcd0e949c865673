"""Caption a photograph, or answer a question about it, with a folder of pipeline.export.

    python caption_onnx.py FOLDER PHOTO [--beam N] [--prompt "what colour is it?"]

Needs onnxruntime, numpy and Pillow. It is an example for other programs, and refuses what it does
not do as Onceover does: dialogues, subwords, scripts without spaces, letterbox, unusual prompts.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BOS, EOS, UNK, NEVER = 1, 2, 3, [0, 1, 3]  # NEVER: <pad>, <bos> and <unk> are not generated
# The words of prompts that need no rules of the Penn Treebank: red, well-lit, dog's.
WORD = re.compile(r"[A-Za-z]+|[A-Za-z]{2,}(-[A-Za-z]{2,})+|[A-Za-z]{2,}'s")
TREEBANK = {"cannot", "gimme", "gonna", "gotta", "lemme", "wanna"}  # it splits these in two


@functools.cache
def session(path):
    return onnxruntime.InferenceSession(str(path))


def run(folder, model, name, inputs):
    graph = session(Path(folder) / f"{name}.onnx")
    feed = dict(zip(model["inputs"][name], inputs, strict=True))
    return graph.run(None, {each.name: feed[each.name] for each in graph.get_inputs()})


def reason_to_refuse(folder, model, prompt):
    framing = model["framing"] or {}
    return (
        (not (folder / "encoder.onnx").exists() and "export it with --format onnx")
        or (model["task"] == "dialog" and "dialogues are not supported")
        or (model["unit"] != "words" and "a vocabulary of subwords is not supported")
        or (model["segment"] != "words" and "texts without spaces are not supported")
        or (not framing and "the folder has no backbone; export it without --no-backbone")
        or (framing["resize"] not in ("stretch", "crop") and "its --resize is not supported")
        or (model["task"] == "vqa" and not prompt and "pass a question: --prompt")
        or (not model["max_prompt"] and prompt and "this decoder reads no prompt")
    )


def split_words(prompt):
    """The words of a prompt as Onceover splits them; None if this takes more rules."""
    parts = re.sub(r"\?\s*$", "", prompt).replace(", ", " ").split()
    if all(WORD.fullmatch(part) and part.lower() not in TREEBANK for part in parts):
        return " ".join(parts).lower().replace("'s", " 's").split()


def read_photo(path, framing):
    photo, (height, width) = ImageOps.exif_transpose(Image.open(path)), framing["size"]
    photo, frame = photo.convert("RGB"), (0.0, 0.0, 1.0, 1.0)
    if framing["resize"] == "crop":  # the largest central part with the shape of the input
        w, h = photo.size
        scale = max(height / h, width / w)
        part_w, part_h = min(w, round(width / scale)), min(h, round(height / scale))
        x, y = (w - part_w) // 2, (h - part_h) // 2
        photo = photo.crop((x, y, x + part_w, y + part_h))
        frame = (x / w, y / h, (x + part_w) / w, (y + part_h) / h)
    photo = photo.resize((width, height), Image.Resampling[framing["interpolation"].upper()])
    return [np.asarray(photo).transpose(2, 0, 1)[None], np.array([frame], np.float32)]


def log_softmax(scores):
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def generate(folder, model, memory, prompt, beams, penalty):
    """The best text by beam search, as Onceover decodes by default."""
    places = model["max_prompt"]
    tokens = np.array([[0] * (places - len(prompt)) + prompt + [BOS]])
    scores, *cache = run(folder, model, "begin", [tokens, *memory])
    if model["answers"]:
        return model["answers"][int(scores[0].argmax())]
    live, texts, finished = np.zeros(1), [[]], []
    for length in range(1, model["max_length"] + 1):
        scores[:, NEVER] = -np.inf
        log_p = live[:, None] + log_softmax(scores)
        ended = zip(log_p[:, EOS] / length**penalty, texts, strict=True)
        finished = sorted([*finished, *ended], key=lambda each: -each[0])[:beams]
        log_p[:, EOS] = -np.inf
        order = np.argsort(-log_p, axis=None, kind="stable")[:beams]
        row, words, live = order // log_p.shape[1], order % log_p.shape[1], log_p.ravel()[order]
        texts = [[*texts[r], int(word)] for r, word in zip(row, words, strict=True)]
        if length == model["max_length"]:
            finished += zip(live / length**penalty, texts, strict=True)
        elif len(finished) == beams and finished[-1][0] >= live[0] / length**penalty:
            break
        else:
            cache, own = [part[row] for part in cache], [part[[0] * len(row)] for part in memory]
            inputs = [words[:, None], np.array(places + length), *cache, *own]
            scores, *cache = run(folder, model, "step", inputs)
    return " ".join(model["words"][word] for word in max(finished, key=lambda each: each[0])[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photo")
    parser.add_argument("--beam", type=int)
    parser.add_argument("--prompt", default="")
    options = parser.parse_args()
    try:
        model = json.loads((options.folder / "model.json").read_text(encoding="utf-8"))
        if reason := reason_to_refuse(options.folder, model, options.prompt):
            sys.exit(f"{options.folder}: {reason}")
        pixels = read_photo(options.photo, model["framing"])
    except OSError as error:
        sys.exit(str(error))
    if (prompt := split_words(options.prompt)) is None:
        sys.exit("--prompt: use words of English letters, commas, and '?' at the end alone")
    ids = {word: number for number, word in enumerate(model["words"])}
    prompt = [ids.get(word, UNK) for word in prompt]
    prompt = prompt[max(0, len(prompt) - model["max_prompt"]) :]
    memory = run(options.folder, model, "encoder", run(options.folder, model, "backbone", pixels))
    beams = options.beam or model["decoding"]["beam"]
    penalty = model["decoding"]["length_penalty"]
    print(generate(options.folder, model, memory, prompt, beams, penalty))


if __name__ == "__main__":
    main()
