"""Caption a photograph, or answer a question about it, with a folder of pipeline.export.

    python caption_onnx.py FOLDER PHOTO [--beam N] [--prompt "what colour is it?"]

Needs onnxruntime, numpy and Pillow. Photographs are stretched or cropped, as in model.json.
"""

import argparse
import functools
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

BOS, EOS, UNK, NEVER = 1, 2, 3, [0, 1, 3]  # NEVER: <pad>, <bos> and <unk> are not generated


@functools.cache
def session(path):
    return onnxruntime.InferenceSession(str(path))


def run(folder, model, name, inputs):
    graph = session(Path(folder) / f"{name}.onnx")
    feed = dict(zip(model["inputs"][name], inputs, strict=True))
    return graph.run(None, {each.name: feed[each.name] for each in graph.get_inputs()})


def read_photo(path, framing):
    photo, (height, width) = (
        ImageOps.exif_transpose(Image.open(path)).convert("RGB"),
        framing["size"],
    )
    frame, (w, h) = (0.0, 0.0, 1.0, 1.0), photo.size
    if framing["resize"] == "crop":  # the largest central part with the shape of the input
        scale = max(height / h, width / w)
        part_w, part_h = min(w, round(width / scale)), min(h, round(height / scale))
        x, y = (w - part_w) // 2, (h - part_h) // 2
        photo = photo.crop((x, y, x + part_w, y + part_h))
        frame = (x / w, y / h, (x + part_w) / w, (y + part_h) / h)
    photo = photo.resize((width, height), Image.Resampling[framing["interpolation"].upper()])
    pixels = np.asarray(photo, np.uint8).transpose(2, 0, 1)[None]
    return [pixels, np.array([frame], np.float32)]


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
        finished += [
            (p / length**penalty, text) for p, text in zip(log_p[:, EOS], texts, strict=True)
        ]
        log_p[:, EOS] = -np.inf
        flat = log_p.ravel()
        order = np.argsort(-flat, kind="stable")[:beams]
        row, words, live = order // log_p.shape[1], order % log_p.shape[1], flat[order]
        texts = [[*texts[r], int(word)] for r, word in zip(row, words, strict=True)]
        finished = sorted(finished, key=lambda each: -each[0])[:beams]
        if length == model["max_length"]:
            finished += [(p / length**penalty, text) for p, text in zip(live, texts, strict=True)]
        elif len(finished) == beams and finished[-1][0] >= live[0] / length**penalty:
            break
        else:
            cache, own = [part[row] for part in cache], [part[[0] * len(row)] for part in memory]
            inputs = [words[:, None], np.array(places + length), *cache, *own]
            scores, *cache = run(folder, model, "step", inputs)
    return " ".join(model["words"][word] for word in max(finished, key=lambda each: each[0])[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("photo")
    parser.add_argument("--beam", type=int)
    parser.add_argument("--prompt", default="")
    options = parser.parse_args()
    model = json.loads((Path(options.folder) / "model.json").read_text(encoding="utf-8"))
    regions = run(options.folder, model, "backbone", read_photo(options.photo, model["framing"]))
    memory = run(options.folder, model, "encoder", regions)
    ids = {word: number for number, word in enumerate(model["words"])}
    prompt = [ids.get(word, UNK) for word in re.findall(r"\w+", options.prompt.lower())]
    beams = options.beam or model["decoding"]["beam"]
    penalty = model["decoding"]["length_penalty"]
    print(
        generate(
            options.folder,
            model,
            memory,
            prompt[max(0, len(prompt) - model["max_prompt"]) :],
            beams,
            penalty,
        )
    )


if __name__ == "__main__":
    main()
