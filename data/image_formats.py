"""The suffixes of readable image files. Needs only Pillow, not torch."""

from __future__ import annotations

import contextlib

from PIL import Image as PillowImage

HEIC = (".heic", ".heif", ".hif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

with contextlib.suppress(ImportError):  # the extra [heic]
    import pillow_heif

    pillow_heif.register_heif_opener()


def _readable_suffixes() -> frozenset[str]:
    """The suffixes of the formats that Pillow decodes without another program."""
    no_decoder = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
    registered = PillowImage.registered_extensions()
    return frozenset(
        suffix
        for suffix, kind in registered.items()
        if kind == "MPO" or (kind in PillowImage.OPEN and kind not in no_decoder)
    )


SUFFIXES = _readable_suffixes()
