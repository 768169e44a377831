"""Opens media files with FFmpeg (PyAV), whatever characters their names contain; the only place that does."""

from __future__ import annotations

import os
from pathlib import Path

import av
from av.container import Container


def open_media(path: str | Path, mode: str = "r", **options) -> Container:
    """Open a media file; options are those of `av.open`.

    FFmpeg takes anything before a colon for a protocol, so the path is passed as an absolute `file:` URL. Names that are not UTF-8
    are passed on byte for byte; metadata that is not UTF-8 does not prevent reading.
    """
    return av.open("file:" + os.path.abspath(path), mode, metadata_errors="replace", **options)
