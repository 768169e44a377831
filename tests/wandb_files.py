"""Reads the metrics and ids of offline W&B runs from the files that W&B writes."""

from __future__ import annotations

import json
import struct
import time


def records(file):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes, in blocks of 32 KiB."""
    content, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole of a record, or its end
            yield whole
            whole = b""


def read_back(folder, *, last):
    """Figures by step, and ids, of the offline W&B runs of a folder, when step `last` is among them: W&B writes on after a run."""
    until = time.monotonic() + 30
    while last not in (found := read_now(folder))[0] and time.monotonic() < until:
        time.sleep(0.2)
    return found


def read_now(folder):
    steps, ids = {}, set()
    for record in parsed(folder):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            steps.setdefault(row["_step"], {}).update(row)
    return steps, ids


def parsed(folder):
    """What the offline W&B runs of a folder have written."""
    from wandb.proto import wandb_internal_pb2 as proto

    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file):
            record = proto.Record()
            record.ParseFromString(data)
            yield record
