"""Checkpoints of a run: written beside training, whole or not at all, checked when read."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pretraining.layout import Layout
from pretraining.optional import need

Json = dict[str, Any]

DELETED = "deleted"
"""Where old checkpoints go first: a killed deletion must not leave half of one under a name that counts."""


class SaveError(RuntimeError):
    """A checkpoint could not be written."""


class BadCheckpoint(RuntimeError):
    """Something in a checkpoint does not match its checksum."""


class DamagedError(RuntimeError):
    """There are checkpoints and none can be read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: steps that were done.
      state: of the layout that it was read for.
      facts: whatever `Checkpoints.save` was given beside the state.
    """

    step: int
    state: Any
    facts: Json


class Checkpoints:
    """The checkpoints in a folder, on a file system that all processes share.

    A checkpoint is written under a temporary name by a thread of its own and renamed when it is whole, so a process
    can be killed at any moment. It holds a fingerprint of every array; what does not match it is not used.
    """

    def __init__(self, folder: pathlib.Path, layout: Layout, keep: int = 3, *, read_only: bool = False):
        """Opens the folder, or makes it.

        Args:
          folder: of nothing but checkpoints.
          layout: of the state to save and restore.
          keep: newest checkpoints that stay.
          read_only: change nothing in the folder; `save` is not to be called.

        Raises:
          ValueError: ``keep`` below 1, or nothing to read.
          MissingPackage: orbax is not installed.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint must stay; with 2 a damaged one has a predecessor")
        if read_only and not folder.is_dir():
            raise ValueError(f"no folder {folder}: name the --out folder of a run, or its checkpoints")
        self._orbax = orbax()
        self.folder = folder.absolute()
        self._read_only = read_only
        self._layout = layout
        self._keep = keep
        self._manager = self._open()
        self._writing: int | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a whole checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, facts: Json) -> None:
        """Starts to write a checkpoint; returns when the state has been copied and may be changed.

        Args:
          step: steps done; more than in any checkpoint there is.
          state: of the layout.
          facts: what to keep beside it: JSON, and NumPy arrays within dicts.

        Raises:
          SaveError: this one or the one before cannot be written.
        """
        self.check()
        self._delete()
        arrays, sums = self._layout.pack(state)
        body = {"facts": _encode(facts), "fingerprints": sums, "arrays": _shapes(arrays)}
        args = self._orbax.args
        try:
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(arrays), meta=args.JsonSave({"body": body, "crc32": _crc(body)})
                ),
                force=True,
            )
        except Exception as error:
            raise self._failure(step, error) from error
        self._writing = step

    def check(self) -> None:
        """Raises SaveError if writing has failed in the meantime."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failure(self._writing, error) from error

    def wait(self) -> None:
        """Returns when the last checkpoint is whole.

        Raises:
          SaveError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failure(self._writing, error) from error

    def restore(self) -> Restored | None:
        """The newest checkpoint that is whole; None: there is none.

        Damaged ones are moved to a folder ``checkpoints.damaged`` with a warning.

        Raises:
          ValueError: a checkpoint of another model or optimizer.
          DamagedError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            found = self._try(step)
            if isinstance(found, Restored):
                return found
            moved = "" if self._read_only else f"; it is moved to {self._set_aside(step)}"
            rest = [other for other in steps if other < step]
            then = f"falling back to step {rest[-1]}" if rest else "there is no older one"
            warnings.warn(
                f"the checkpoint of step {step} in {self.folder} is damaged ({found}){moved}; {then}", stacklevel=2
            )
        if steps:
            raise DamagedError(
                f"all {len(steps)} checkpoints in {self.folder} are damaged: restore the folder from a copy, or begin "
                "anew with another --out"
            )
        return None

    def close(self) -> None:
        """Waits for the last checkpoint, then lets go of the folder."""
        self.wait()
        self._manager.close()
        self._delete()

    def _open(self) -> Any:
        return self._orbax.CheckpointManager(
            self.folder,
            options=self._orbax.CheckpointManagerOptions(
                preservation_policy=self._orbax.checkpoint_managers.LatestN(n=self._keep),
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
                create=not self._read_only,
                todelete_subdir=DELETED,
            ),
        )

    def _delete(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _try(self, step: int) -> Restored | str:
        """The checkpoint, or what is wrong with it; the same on all processes."""
        restored, wrong = None, ""
        try:
            restored = self._read(step)
        except BadCheckpoint as error:
            wrong = str(error)
        except _OtherModel:
            raise
        except Exception as error:
            wrong = short(error)
        if jax.process_count() > 1:
            fine = multihost_utils.process_allgather(np.int32(restored is not None))
            if restored is not None and not fine.all():
                return f"processes {np.flatnonzero(fine == 0).tolist()} cannot read it"
        return restored or wrong

    def _read(self, step: int) -> Restored:
        args = self._orbax.args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        body = open_body(meta)
        wanted = self._layout.canonical
        if body["arrays"] != (shapes := _shapes(wanted)):
            names = sorted(name for name in body["arrays"] | shapes if body["arrays"].get(name) != shapes.get(name))
            first = names[0]
            raise _OtherModel(
                f"the checkpoint of step {step} in {self.folder} is of another model or optimizer: {len(names)} arrays "
                f"differ, the first is {first}: {body['arrays'].get(first)} there, {shapes.get(first)} here. Give the "
                "options it was made with, or another --out"
            )
        arrays = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(wanted)))["state"]
        arrays = {name: arrays[name] for name in wanted}
        sums = self._layout.fingerprints(arrays)
        if wrong := [name for name in wanted if sums[name] != body["fingerprints"][name]]:
            raise BadCheckpoint(f"{len(wrong)} arrays do not match their checksums, the first is {wrong[0]}")
        return Restored(step, self._layout.unpack(arrays), _decode(body["facts"]))

    def _set_aside(self, step: int) -> pathlib.Path:
        aside = self.folder.with_name(f"{self.folder.name}.damaged") / str(step)
        self._manager.close()
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                shutil.rmtree(aside)
            (self.folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager = self._open()
        return aside

    def _failure(self, step: int | None, error: Exception) -> SaveError:
        """The error for people; what was written of the checkpoint goes, as the disk may be full."""
        if jax.process_index() == 0:
            for part in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
        last = last_checkpoint(self.folder, besides=step)
        is_full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
        remedy = "the disk is full: make room and start again" if is_full else "start again when that is mended"
        return SaveError(f"no checkpoint of step {step} in {self.folder}: {short(error)}; {last}; {remedy}")


def orbax() -> Any:
    """Orbax's checkpoints.

    Raises:
      MissingPackage: it is not installed.
    """
    return need("orbax.checkpoint", "checkpoints", "orbax-checkpoint")


def short(error: Exception) -> str:
    """An error without the pages that libraries append."""
    first = (str(error).strip().splitlines() or [""])[0].split(". See full TensorStore details")[0]
    return f"{type(error).__name__}: {first[:300]}"


class _OtherModel(ValueError):
    """The checkpoint is whole and of another model."""


def last_checkpoint(folder: pathlib.Path, besides: int | None = None) -> str:
    """Which is the last whole checkpoint of a folder, in words, but for one that is being written."""
    whole = {int(path.name) for path in folder.glob("*") if path.name.isdigit()} - {besides}
    return f"the last whole checkpoint is of step {max(whole)}" if whole else "there is no whole checkpoint yet"


def _shapes(arrays: Mapping[str, Any]) -> Json:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}


def open_body(meta: Json) -> Json:
    """What `Checkpoints.save` wrote beside the arrays.

    Raises:
      BadCheckpoint: it is not what was written.
    """
    if _crc(meta["body"]) != meta["crc32"]:
        raise BadCheckpoint("its metadata do not match their checksum")
    return meta["body"]


def _crc(body: Json) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _encode(value: Any) -> Any:
    """JSON of dicts, lists and arrays."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        text = base64.b64encode(array.tobytes()).decode()
        return {"array": text, "dtype": str(array.dtype), "shape": list(array.shape)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"array", "dtype", "shape"}:
        return np.frombuffer(base64.b64decode(value["array"]), value["dtype"]).reshape(value["shape"]).copy()
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
