"""Puts errors of memory that ran out, of a device or of the host, into one sentence. Standard library only."""

from __future__ import annotations

import logging
from importlib import import_module

WORDS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # of CUDA, torch's allocator for the host, cuBLAS and cuDNN
SENTENCES = 3  # of torch's message on a device: what ran out, how much was asked for, the size of the device and what is free

log = logging.getLogger("sonic")


def out_of_memory(error: BaseException, would_help: str | None = None, *job: object) -> str:
    """One sentence on memory that ran out; "" for other errors (those of torch are RuntimeErrors).

    `would_help` is the import path of a function that says by (*job, error) what would need less; "" where a command does not know it.
    """
    if not (isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS))):
        return ""
    parts = [part.strip(" .") for part in " ".join(str(error).split()).split(". ")[:SENTENCES]]
    what = ", ".join(parts) if WORDS[0] in parts[0] else f"out of memory: {', '.join(parts)}".rstrip(": ")
    if would_help is None:
        return what
    module, _, name = would_help.rpartition(".")
    try:
        helps = getattr(import_module(module), name)(*job, error) if would_help else ""
    except (ValueError, OSError) as fault:  # the planner does not plan this job
        log.debug("what would help is not known: %s", fault)
        helps = ""
    return f"{what}; {f'less is needed with {helps}' if helps else 'end what else uses it, or use a device with more'}"
