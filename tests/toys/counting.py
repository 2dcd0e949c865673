"""A task: how many things of a shape a drawn scene shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data.datasets.sample import SHAPES, load_scenes
from data.examples import Example
from data.sources import Source
from pipeline.tasks.base import Task

NUMBERS = ("zero", "one", "two", "three")


@dataclass(frozen=True)
class CountingOptions:
    questions_per_image: int = field(
        default=2, metadata={"help": "questions an image", "at_least": 1, "at_most": len(SHAPES)}
    )


class Counting(Task):
    name, metric, unit = "counting", "accuracy", "questions"
    Options = CountingOptions

    def examples(self, source: Source, split: str, limit: int | None = None) -> list[Example]:
        scenes, found = load_scenes(source.root), []
        for image in source.select(split)[:limit]:
            shapes = sorted(SHAPES, key=lambda shape: (hash_of(image.id, shape), shape))[
                : self.options.questions_per_image
            ]
            for shape in shapes:
                count = sum(thing.shape == shape for thing in scenes[image.id].things)
                prompt = (
                    f"how many {shape} shapes are there"
                    if image.id % 2
                    else f"number of {shape} shapes"
                )
                found.append(Example(f"{image.id}-{shape}", image.id, prompt, (NUMBERS[count],)))
        return found

    def score(self, outputs: Mapping[int | str, str], examples: Sequence[Example],
              train: Sequence[Example] = ()) -> dict[str, float]:  # fmt: skip
        right = [outputs[example.id] == example.targets[0] for example in examples]
        return {"accuracy": sum(right) / len(right)}


def hash_of(image_id: int, shape: str) -> int:
    return (image_id * 31 + len(shape) * 7 + ord(shape[0])) % 101
