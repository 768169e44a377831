"""Checkpoints on disk: sharded tensors written asynchronously by torch DCP, metadata as JSON, in a temporary folder then renamed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
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
OPTIONAL = "moments."  # older checkpoints lack the optimizer moments of weights that no gradient has reached; they are zero

State = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run. A crash at any time leaves only complete ones; damaged ones are reported and skipped."""

    def __init__(self, folder: Path, *, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self.newest = 0  # step of the last that was written or loaded
        self._under_way: tuple[int, Future] | None = None
        self._found: tuple[Path, dict] | None = None

    def save(self, step: int, state: State, metadata: Mapping[str, object]) -> None:
        """Copy `state` and write it in the background. A failure to write is logged as a warning; earlier checkpoints stay."""
        self.settle()
        temporary, done = self.folder / f"{TEMPORARY}{step:08d}", Future()
        written = dcp.async_save(state, checkpoint_id=str(temporary), process_group=self.world.writers, no_dist=self.world.ranks == 1)
        written.add_done_callback(lambda future: self._publish(future, done, temporary, record={"step": step, **metadata}))
        self._under_way = (step, done)

    def settle(self) -> None:
        """Wait until the checkpoint under way is written."""
        if self._under_way is None:
            return
        (step, done), self._under_way = self._under_way, None
        with pause_watchdog():  # the disk may take long
            error = done.exception()
        if error is None:
            self.newest = step
        else:
            reason = _last_line(error)
            LOG.warning("the checkpoint of step %d could not be written (%s); training goes on, those before it stay", step, reason)
        self.world.wait()

    def find(self, resume: str) -> dict:
        """Choose the checkpoint that `load` takes: the newest valid one (resume=auto), the named one, or none (never). Collective.

        Returns its metadata; {} = the training starts from the beginning. Raises ValueError when the named one is damaged.
        """
        if self._found is None:
            found = self.world.from_first_rank(self._chosen(resume) if self.world.main else None)
            if isinstance(found, str):
                raise ValueError(found)
            self._found = found
        return self._found[1]

    def load(self, resume: str, state_of: Callable[[], State], restore: Callable[[State], None]) -> dict:
        """Fill the tensors of `state_of()` from the checkpoint that `find` chooses, and give them to `restore`. Returns its metadata.

        Checkpoints newer than a named one are renamed. Raises ValueError when the checkpoint is damaged, or of another model.
        """
        metadata = self.find(resume)
        (checkpoint, _), self._found = self._found, None
        self.newest = metadata.get("step", 0)
        if metadata:
            state = state_of()
            self._fill(state, checkpoint)
            restore(state)
        if resume != "auto" and self.world.main:
            self._leave_behind(metadata.get("step", 0))
        self.world.wait()
        return metadata

    def _chosen(self, resume: str) -> tuple[Path, dict] | str:
        """The checkpoint to load and its metadata ({} = none), or a sentence about what is wrong with the named one."""
        for unfinished in self.folder.glob(f"{TEMPORARY}*"):  # by a run that crashed
            shutil.rmtree(unfinished, ignore_errors=True)
        if resume not in ("auto", "never"):
            metadata = _checked(Path(resume))
            return metadata if isinstance(metadata, str) else (Path(resume), metadata)
        for checkpoint in newest_first(self.folder) if resume == "auto" else ():
            metadata = _checked(checkpoint)
            if not isinstance(metadata, str):
                return checkpoint, metadata
            LOG.warning("%s; falling back to the one before", metadata)
            self._rename(checkpoint, DAMAGED)
        return self.folder, {}

    def _fill(self, state: State, checkpoint: Path) -> None:
        unfit = f"checkpoint {checkpoint} is of another model or objective ({{}}); use a new name=, or the recipe that wrote it"
        stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
        if missing := sorted(name for name in state if name not in stored and not name.startswith(OPTIONAL)):
            raise ValueError(unfit.format(f"it lacks {missing[0]} and {len(missing) - 1} more"))
        try:
            dcp.load(state, checkpoint_id=str(checkpoint), planner=_Reading(allow_partial_load=True), no_dist=self.world.ranks == 1)
        except (CheckpointException, ValueError) as error:
            raise ValueError(unfit.format(_last_line(error))) from error

    def _leave_behind(self, step: int) -> None:
        """Rename the checkpoints of steps after `step`, from which training continues, so that they do not count as the newest."""
        beyond = [path for path in newest_first(self.folder) if int(path.name.removeprefix("step_")) > step]
        for checkpoint in beyond:
            self._rename(checkpoint, LEFT)
        if beyond:
            LOG.warning("training goes on from step %d; %d checkpoints beyond it are now %s/%s*", step, len(beyond), self.folder, LEFT)

    def _publish(self, written: Future, done: Future, temporary: Path, *, record: dict) -> None:
        """On the main process: write the metadata with digests, rename the finished checkpoint to its final name, delete old ones."""
        try:
            written.result()
            if self.world.main:
                digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
                (temporary / METADATA).write_text(json.dumps({**record, "sha256": digests}, indent=1))
                _flush(temporary / METADATA)
                final = self.folder / f"step_{record['step']:08d}"
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                _flush(self.folder)
                for old in newest_first(self.folder)[self.keep :]:
                    shutil.rmtree(old, ignore_errors=True)
            done.set_result(None)
        except BaseException as error:  # reported by `settle`
            shutil.rmtree(temporary, ignore_errors=True)
            done.set_exception(error)

    def _rename(self, checkpoint: Path, start: str) -> None:
        """Rename a checkpoint so that `newest_first` skips it, replacing an older one of the same name."""
        shutil.rmtree(self.folder / f"{start}{checkpoint.name}", ignore_errors=True)
        checkpoint.rename(self.folder / f"{start}{checkpoint.name}")


class _Reading(dcp.DefaultLoadPlanner):
    """A load planner that sends a heartbeat with every tensor."""

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        heartbeat()
        super().commit_tensor(read_item, tensor)


def newest_first(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


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


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1]
