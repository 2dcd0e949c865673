"""Generate captions from photographs or from cached regions.

from pipeline.decoding import load_captioner

captioner = load_captioner("runs/f8k")
captioner.caption("photo.jpg")
"""

from typing import Any

__all__ = ["PhotoCaptioner", "load_captioner"]


def __getattr__(name: str) -> Any:
    """Import torch only if a captioner is used, because scoring a file of captions needs no
    torch.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.decoding import captioner

    return getattr(captioner, name)
