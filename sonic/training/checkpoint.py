"""Checkpoints on disk: sharded tensors by torch DCP beside the training, facts as JSON, written aside and renamed."""

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
StateOf = Callable[[set[str]], State]  # names in a checkpoint -> tensors of ours to fill


class Checkpoints:
    """The checkpoints of one run. A crash at any moment leaves whole ones only; damaged ones are said and passed over."""

    def __init__(self, folder: Path, *, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        self._under_way: tuple[int, Future] | None = None

    def save(self, step: int, state: State, metadata: Mapping[str, object]) -> None:
        """Copy `state` and write it beside what comes next. A checkpoint that cannot be written is said; those before it stay."""
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
        written.add_done_callback(lambda found: self._publish(found, done, temporary, record={"step": step, **metadata}))
        self._under_way = (step, done)

    def settle(self) -> None:
        """Wait until nothing is being written."""
        if self._under_way is None:
            return
        (step, done), self._under_way = self._under_way, None
        with pause_watchdog():  # as long as the disk needs
            error = done.exception()
        if error is not None:
            self._report_lost(step, error)
        self.world.wait()

    def _report_lost(self, step: int, error: BaseException | None) -> None:
        LOG.warning("the checkpoint of step %d could not be written (%s); training goes on, those before it stay", step, error)

    def load(self, state_of: StateOf) -> dict:
        """Fill our tensors from the newest good checkpoint. Gives its facts; {} = there is none."""
        name = self._from_main(self._newest_good)
        return self.read(self.folder / str(name), state_of) if name else {}

    def read(self, checkpoint: Path, state_of: StateOf) -> dict:
        """Fill our tensors from one checkpoint. Gives its facts. Raises ValueError when it is damaged or of something else."""
        metadata = self._from_main(lambda: _checked(checkpoint))
        if isinstance(metadata, str):
            raise ValueError(metadata)
        names = set(dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata)
        state = state_of(names)
        strange = f"checkpoint {checkpoint} is of another model or objective ({{}}); use a new name=, or the recipe that wrote it"
        if lost := sorted(set(state) - names):
            raise ValueError(strange.format(f"it lacks {lost[0]} and {len(lost) - 1} more"))
        try:
            dcp.load(state, checkpoint_id=str(checkpoint), planner=_Reading(), no_dist=self.world.ranks == 1)
        except (CheckpointException, ValueError) as error:
            raise ValueError(strange.format(str(error).strip().splitlines()[-1])) from error
        return metadata

    def leave_behind(self, step: int) -> None:
        """Rename the checkpoints beyond `step`, where training goes on: they would pass for newer than those that come."""
        if self.world.main:
            beyond = [path for path in newest_first(self.folder) if int(path.name.removeprefix("step_")) > step]
            for checkpoint in beyond:
                self._rename(checkpoint, LEFT)
            if beyond:
                LOG.warning("training goes on from step %d; %d checkpoints beyond it are now %s/%s*", step, len(beyond), self.folder, LEFT)
        self.world.wait()

    def _publish(self, written: Future, done: Future, temporary: Path, *, record: dict) -> None:
        """On the main process: say what was written, and let it appear."""
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
        except BaseException as error:  # handed over to `settle`
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
        """Out of the sight of `newest_first`, in the place of what was called so before."""
        shutil.rmtree(self.folder / f"{start}{checkpoint.name}", ignore_errors=True)
        checkpoint.rename(self.folder / f"{start}{checkpoint.name}")

    def _from_main(self, ask: Callable[[], object]) -> object:
        return self.world.from_first_rank(ask() if self.world.main else None)


class _Reading(dcp.DefaultLoadPlanner):
    """Gives a sign with every tensor."""

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        heartbeat()
        super().commit_tensor(read_item, tensor)


def newest_first(folder: Path) -> Iterator[Path]:
    """Finished checkpoints of a folder."""
    return iter(sorted(folder.glob("step_*"), reverse=True))


def prune(folder: Path, keep: int) -> None:
    """Leave the `keep` newest checkpoints, and nothing half-written of runs that died."""
    for old in [*list(newest_first(folder))[keep:], *folder.glob(f"{TEMPORARY}*")]:
        shutil.rmtree(old, ignore_errors=True)


def _make_anew(folder: Path) -> OSError | None:
    """Make an empty folder, or say why not."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _checked(checkpoint: Path) -> dict | str:
    """The facts of a checkpoint whose files are as they were written; a sentence for one whose are not."""
    try:
        metadata = json.loads((checkpoint / METADATA).read_text())
        wrong = [name for name, digest in metadata["sha256"].items() if _digest(checkpoint / name) != digest]
    except (OSError, json.JSONDecodeError, KeyError, AttributeError) as error:  # the last is what an older form gives
        return f"checkpoint {checkpoint} cannot be read ({error})"
    return f"checkpoint {checkpoint} is damaged: {wrong[0]} does not match its digest" if wrong else metadata


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
