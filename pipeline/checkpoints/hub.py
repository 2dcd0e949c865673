"""Checkpoints from and to the Hugging Face hub: a repository there has a checkpoint's files, as a
folder here has.

captioner = PhotoCaptioner.from_pretrained("user/name")        # or a folder
captioner.save_pretrained("folder")                            # without what only training needs
captioner.push_to_hub("user/name")
"""

from __future__ import annotations

import shutil
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from data.files import atomic_write
from pipeline.checkpoints.checkpoint import SHARED
from pipeline.cli import UserError

SCHEME = "hf-hub:"  # as timm has it
CARD = """---
{{ card_data }}
---

# An image captioner

Trained with Onceover: a decoder over cached region features of a CNN. `config.json` says which
decoder, which backbone, trained how, and on what.

```python
from pipeline.decoding.captioner import PhotoCaptioner

captioner = PhotoCaptioner.from_pretrained("this-repository")
print(captioner.caption(["photo.jpg"]))
```
"""


def checkpoint_folder(name: Path | str, **options: Any) -> Path:
    """The folder of a checkpoint: the one named, or, for `hf-hub:user/name`, the hub's, fetched or
    from its local cache.

    options: of huggingface_hub's snapshot_download. UserError where the hub has it not or cannot be
        reached.
    """
    if not str(name).startswith(SCHEME):
        return Path(name)
    repository = str(name).removeprefix(SCHEME)
    do_not_wait_for_an_absent_hub()
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=list(SHARED), **options)
        )
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: the hub has no repository of that name that is open to you"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} could not be fetched from the hub ({type(error).__name__}), and is not in "
            "its local cache; "
            "copy the checkpoint's folder here and name that"
        ) from error


def copy_shared(source: Path, target: Path) -> None:
    """Copy a checkpoint's files except those that only training needs, each completely or not at
    all.
    """
    for name in SHARED:
        if (source / name).is_file():
            with atomic_write(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
        else:
            (target / name).unlink(missing_ok=True)  # of another checkpoint that was there


def do_not_wait_for_an_absent_hub() -> None:
    """If the hub's host does not answer, use the local cache or fail at once; the hub's client
    would retry for a minute.
    """
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies():
        return  # a proxy answers for the hub
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname, port), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
