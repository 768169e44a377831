"""The one place where media files are opened with FFmpeg (PyAV), whatever their names look like."""

from __future__ import annotations

import os
from pathlib import Path

import av
from av.container import Container


def open_media(path: str | Path, mode: str = "r", **options) -> Container:
    """An opened media file; options are those of `av.open`.

    FFmpeg takes what stands before a colon for a protocol, so the name is given as an absolute one of its `file:` protocol. Bytes
    that are not UTF-8 pass through as the file system has them; tags that are not UTF-8 do not stop a file from being read.
    """
    return av.open("file:" + os.path.abspath(path), mode, metadata_errors="replace", **options)
