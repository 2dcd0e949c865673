"""Error messages about backbone names and weights."""

from __future__ import annotations

import difflib


def nearest(name: str, known: list[str], cutoff: float = 0.6, prefix: str = "") -> str:
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=cutoff)
    library = prefix.rstrip("/") + ".models" if prefix else "timm"
    return (
        f"; did you mean {' or '.join(prefix + each for each in near)}?"
        if near
        else f"; {library}.list_models() lists them"
    )


def no_hub(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"the pretrained weights of {name} could not be fetched from the hub "
        f"({type(error).__name__}: {reason}); "
        "to go on without it: weights from a pip package, weights from a file (a state dict, "
        ".safetensors or .pth, fetched elsewhere), a folder that "
        "holds the hub's cache in HF_HOME, or random weights to try the path"
    )
