"""Checkpoints on the Hugging Face hub. A repository has the same files as a checkpoint folder.

captioner = PhotoCaptioner.from_pretrained("user/name")        # or a folder
captioner.save_pretrained("folder")                            # without the training state
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

SCHEME = "hf-hub:"  # the prefix that timm uses
CARD = """---
{{ card_data }}
---

# An image captioner

Trained with Onceover: a decoder over cached region features of a CNN. `config.json` records the
decoder, the backbone, the training settings and the training set.

```python
from pipeline.decoding.captioner import PhotoCaptioner

captioner = PhotoCaptioner.from_pretrained("this-repository")
print(captioner.caption(["photo.jpg"]))
```
"""


def checkpoint_folder(name: Path | str, **options: Any) -> Path:
    """Return the folder of a checkpoint; `hf-hub:user/name` is downloaded from the hub.

    name: a folder, or `hf-hub:user/name`. The hub's local cache is used if it has the files.
    options: options of huggingface_hub's snapshot_download.

    Raises UserError if the hub does not have the repository, or cannot be reached.
    """
    if not str(name).startswith(SCHEME):
        return Path(name)
    repository = str(name).removeprefix(SCHEME)
    go_offline_if_hub_is_unreachable()
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=list(SHARED), **options)
        )
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name}: the hub has no repository with this name that you can access; check the name "
            "or log in"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} could not be fetched from the hub ({type(error).__name__}), and is not in "
            "the hub's local cache; copy the checkpoint folder to this machine and pass its path"
        ) from error


def copy_shared(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint without the training state. Each file is written atomically.

    Files in `target` that `source` does not have are removed: they belong to another checkpoint.
    """
    for name in SHARED:
        if (source / name).is_file():
            with atomic_write(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
        else:
            (target / name).unlink(missing_ok=True)


def go_offline_if_hub_is_unreachable() -> None:
    """Set the hub's client to offline mode if the hub does not answer.

    In offline mode the client uses its local cache or fails at once. Otherwise it would retry for
    a minute.
    """
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies():
        return  # connections go through the proxy, so the test below would not be valid
    try:
        port = host.port or (443 if host.scheme == "https" else 80)
        socket.create_connection((host.hostname, port), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
