"""Checkpoints on disk: sharded tensors written asynchronously by torch DCP, metadata as JSON, in a temporary folder then renamed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from sonic.parallel.mesh import World
from sonic.system.heartbeat import heartbeat, pause_watchdog

LOG = logging.getLogger(__name__)
METADATA, TEMPORARY, DAMAGED, LEFT = "facts.json", ".aside_", "damaged_", "left_"

State = dict[str, Tensor]
StateOf = Callable[[set[str]], State]  # names in a checkpoint -> our tensors to fill


class Checkpoints:
    """The checkpoints of one run. A crash at any time leaves only complete ones; damaged ones are reported and skipped."""

    def __init__(self, folder: Path, *, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self._under_way: tuple[int, Future] | None = None

    def save(self, step: int, state: State, metadata: Mapping[str, object]) -> None:
        """Copy `state` and write it in the background. A failure to write is logged as a warning; earlier checkpoints stay."""
        self.settle()
        temporary = self.folder / f"{TEMPORARY}{step:08d}"
        fault = _make_anew(temporary) if self.world.main else None
        if self.world.from_first_rank(fault is not None):
            self._report_lost(step, fault)
            return
        written: Future = dcp.async_save(
            state, checkpoint_id=str(temporary), process_group=self.world.writers, no_dist=self.world.ranks == 1
        )
        done: Future = Future()
        written.add_done_callback(lambda future: self._publish(future, done, temporary, record={"step": step, **metadata}))
        self._under_way = (step, done)

    def settle(self) -> None:
        """Wait until the checkpoint under way is written."""
        if self._under_way is None:
            return
        (step, done), self._under_way = self._under_way, None
        with pause_watchdog():  # the disk may take long
            error = done.exception()
        if error is not None:
            self._report_lost(step, error)
        self.world.wait()

    def _report_lost(self, step: int, error: BaseException | None) -> None:
        LOG.warning("the checkpoint of step %d could not be written (%s); training goes on, those before it stay", step, error)

    def load(self, state_of: StateOf) -> dict:
        """Fill our tensors from the newest good checkpoint. Returns its metadata, {} when there is none."""
        name = self._from_main(self._newest_good)
        return self.read(self.folder / str(name), state_of) if name else {}

    def read(self, checkpoint: Path, state_of: StateOf) -> dict:
        """Fill our tensors from one checkpoint and return its metadata. Raises ValueError when it is damaged or does not fit."""
        metadata = self._from_main(lambda: _checked(checkpoint))
        if isinstance(metadata, str):
            raise ValueError(metadata)
        names = set(dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)
        state = state_of(names)
        unfit = f"checkpoint {checkpoint} is of another model or objective ({{}}); use a new name=, or the recipe that wrote it"
        if missing := sorted(set(state) - names):
            raise ValueError(unfit.format(f"it lacks {missing[0]} and {len(missing) - 1} more"))
        try:
            dcp.load(state, checkpoint_id=str(checkpoint), planner=_Reading(), no_dist=self.world.ranks == 1)
        except (CheckpointException, ValueError) as error:
            raise ValueError(unfit.format(str(error).strip().splitlines()[-1])) from error
        return metadata

    def leave_behind(self, step: int) -> None:
        """Rename the checkpoints of steps after `step`, from which training continues, so that they do not count as the newest."""
        if self.world.main:
            beyond = [path for path in newest_first(self.folder) if int(path.name.removeprefix("step_")) > step]
            for checkpoint in beyond:
                self._rename(checkpoint, LEFT)
            if beyond:
                LOG.warning("training goes on from step %d; %d checkpoints beyond it are now %s/%s*", step, len(beyond), self.folder, LEFT)
        self.world.wait()

    def _publish(self, written: Future, done: Future, temporary: Path, *, record: dict) -> None:
        """On the main process: write the metadata with digests, and rename the finished checkpoint to its final name."""
        try:
            written.result()
            if self.world.main:
                files = [path for path in sorted(temporary.iterdir()) if path.is_file()]
                (temporary / METADATA).write_text(json.dumps({**record, "sha256": {path.name: _digest(path) for path in files}}, indent=1))
                _flush(temporary / METADATA)
                final = self.folder / f"step_{record['step']:08d}"
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                _flush(self.folder)
                prune(self.folder, self.keep)
            done.set_result(None)
        except BaseException as error:  # reported by `settle`
            shutil.rmtree(temporary, ignore_errors=True)
            done.set_exception(error)

    def _newest_good(self) -> str:
        for checkpoint in newest_first(self.folder):
            metadata = _checked(checkpoint)
            if not isinstance(metadata, str):
                return checkpoint.name
            self._mark_damaged(checkpoint, metadata)
        return ""

    def _mark_damaged(self, checkpoint: Path, reason: object) -> None:
        LOG.warning("%s; falling back to the one before", reason)
        self._rename(checkpoint, DAMAGED)

    def _rename(self, checkpoint: Path, start: str) -> None:
        """Rename a checkpoint so that `newest_first` skips it, replacing an older one of the same name."""
        shutil.rmtree(self.folder / f"{start}{checkpoint.name}", ignore_errors=True)
        checkpoint.rename(self.folder / f"{start}{checkpoint.name}")

    def _from_main(self, ask: Callable[[], object]) -> object:
        return self.world.from_first_rank(ask() if self.world.main else None)


class _Reading(dcp.DefaultLoadPlanner):
    """A load planner that sends a heartbeat with every tensor."""

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        heartbeat()
        super().commit_tensor(read_item, tensor)


def newest_first(folder: Path) -> Iterator[Path]:
    """Finished checkpoints of a folder, newest first."""
    return iter(sorted(folder.glob("step_*"), reverse=True))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what crashed runs left half-written."""
    for old in [*list(newest_first(folder))[keep:], *folder.glob(f"{TEMPORARY}*")]:
        shutil.rmtree(old, ignore_errors=True)


def _make_anew(folder: Path) -> OSError | None:
    """Make an empty folder; returns the error when that fails."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _checked(checkpoint: Path) -> dict | str:
    """The metadata of a checkpoint whose files match their digests; else a sentence about what is wrong."""
    try:
        metadata = json.loads((checkpoint / METADATA).read_text())
        damaged = [name for name, digest in metadata["sha256"].items() if _digest(checkpoint / name) != digest]
    except (OSError, json.JSONDecodeError, KeyError, AttributeError) as error:  # AttributeError: an older format
        return f"checkpoint {checkpoint} cannot be read ({error})"
    return f"checkpoint {checkpoint} is damaged: {damaged[0]} does not match its digest" if damaged else metadata


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        state = sha256()
        while chunk := file.read(1 << 20):
            heartbeat()
            state.update(chunk)
    return state.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
