"""A conversation about a photograph, with a checkpoint of --task dialog."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import DataError
from data.files import atomic_write_text
from data.images import Photograph, UnreadableImage, describe
from data.sources import check_caption, parse_json
from pipeline.cli import UserError
from pipeline.tasks.dialog import VisualDialog, dialog_prompt


class Chat:
    """A conversation about a photograph. The photograph is encoded once.

        chat = Chat(load_captioner("runs/visdial"), "photo.jpg")
        chat.ask("is it sunny?")  # "yes"

    rounds: the questions so far and their answers.
    has_history: whether the model reads the caption and the rounds so far, or each question alone.
    forgotten: whether the last prompt was longer than the model reads, so that the oldest rounds no
        longer fit.
    """

    def __init__(
        self,
        captioner: Any,
        photo: Photograph,
        caption: str = "",
        rounds: Sequence[tuple[str, str]] = (),
    ) -> None:
        """
        captioner: a PhotoCaptioner.
        photo: as in `PhotoCaptioner.caption`.
        caption: the caption of the photograph, which dialogues of VisDial begin with.

        Raises UnreadableImage, and UserError if the checkpoint was not trained on dialogues, or
        reads no caption.
        """
        checkpoint = captioner.checkpoint
        task = checkpoint.new_task()
        if not isinstance(task, VisualDialog):
            raise UserError(
                f"{captioner.folder} was trained for --task {task.name}, not on dialogues; train "
                "with --task dialog"
            )
        self.has_history = task.options.history
        if caption and not self.has_history:
            raise UserError(
                f"{captioner.folder} was trained with --no-history and reads no caption; omit it"
            )
        self._captioner, self.caption = captioner, caption
        self.rounds, self.forgotten = [*rounds], False
        self.photo = photo
        self.look(photo)

    def look(self, photo: Photograph) -> None:
        """Change the photograph. The rounds so far remain. Raises UnreadableImage."""
        regions, (reason,) = self._captioner.extract([photo])
        if regions is None:
            raise UnreadableImage(f"{describe(photo, 0)}: {reason}")
        self.photo, self._regions = photo, regions

    def ask(self, question: str, **options: Any) -> str:
        """Return the answer to a question, and add both to `rounds`.

        options: fields of models.generation.options.Generation.
        """
        check_caption(question, "QUESTION", "question")
        rounds = self.rounds if self.has_history else []
        prompt = dialog_prompt(self.caption, rounds, question)
        self.forgotten = bool(self._captioner.checkpoint.count_cut([prompt]))
        answer = self._captioner.continue_prompts(self._regions, [prompt], options)[0][0].text
        self.rounds.append((question, answer))
        return answer

    def reset(self) -> None:
        """Forget all rounds."""
        self.rounds, self.forgotten = [], False

    def save(self, file: Path) -> None:
        """Write the conversation as JSON. An existing file is replaced only by itself.

        Raises UserError if the photograph has no path, or the file exists and is no conversation.
        """
        if not isinstance(self.photo, str | Path):
            raise UserError("only a conversation about a photograph with a path can be saved")
        if "\0" in str(file):
            raise UserError("a file name cannot contain a NUL character")
        if file.is_dir():
            raise UserError(f"{file} is a folder; name the file")
        if file.exists():
            try:
                read_conversation(file)
            except (DataError, UserError) as error:
                raise UserError(f"{file} exists and is not a conversation; name another") from error
        record = {
            "photo": str(self.photo),
            "caption": self.caption,
            "rounds": [{"question": q, "answer": a} for q, a in self.rounds],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def read_conversation(file: Path) -> tuple[Path, str, list[tuple[str, str]]]:
    """Return the photograph, the caption and the rounds of a file of `Chat.save`.

    Raises UserError if the file is not such a file.
    """
    record = parse_json(file)
    rounds = record.get("rounds") if isinstance(record, dict) else None
    texts = [record.get("photo"), record.get("caption")] if isinstance(record, dict) else [None]
    if isinstance(rounds, list) and all(isinstance(each, dict) for each in rounds):
        texts += [each.get(key) for each in rounds for key in ("question", "answer")]
    else:
        texts.append(None)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file} is not a conversation that /save wrote")
    photo, caption, *lines = (check_caption(text, f"{file}", "text") for text in texts)
    return Path(photo), caption, list(zip(lines[::2], lines[1::2], strict=True))
