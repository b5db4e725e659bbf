"""The feature cache: features of a frozen backbone computed once, kept in memory or on disk, shared by all they fit."""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock

from dense_heads.data.feature_store import DiskStore, MemoryStore
from dense_heads.errors import UserError
from dense_heads.training.feature_pass import FeaturePass
from dense_heads.training.progress import progress

log = logging.getLogger("dense_heads")

_SPARE = 0.95  # of what is free may be filled
_WAIT_SECONDS = 0.2  # between looks at the shards that other processes write

_in_memory: dict[str, MemoryStore] = {}  # identity -> features of this process: a sweep's trials share them


def in_memory(wanted: FeaturePass, key: str) -> MemoryStore:
    """The features in this process's memory, computed if they are not there.

    Raises:
        UserError: they would not fit.
    """
    if key not in _in_memory:
        store, total = MemoryStore(), len(wanted.keys)
        with progress(f"features of {wanted.what}", total) as done:
            for records in wanted.records([number] for number in range(total)):
                store.records += records
                if len(store) == 1:
                    free = psutil.virtual_memory().available
                    _announce(wanted, store.records[0].num_bytes, "memory", free, "cache=disk")
                done(len(store))
        _in_memory[key] = store
    return _in_memory[key]


def on_disk(
    wanted: FeaturePass, folder: Path, identity: Mapping[str, Any], check: bool = True, shard_bytes: int = 64 * 2**20
) -> DiskStore:
    """The features in `folder`: what is there is checked, what is missing or broken is computed.

    Several processes may ask for one folder: they share the work. One that is killed loses its unfinished shards.

    Args:
        wanted: the pass that gives what is missing.
        folder: named after the identity.
        identity: everything that the features depend on, as plain values; kept in the manifest.
        check: read every shard and compare its checksum; else its length only.
        shard_bytes: about the size of a shard: what a kill may cost.

    Raises:
        UserError: they would not fit, or the folder holds something else.
    """
    store = _opened(wanted, folder, identity, shard_bytes)
    broken = [path.name for path in store.check(check)]
    if broken:
        log.warning("%s: broken and computed again: %s", folder, ", ".join(broken))
    missing = store.missing()
    if not missing:
        log.info("features of %s: read from %s", wanted.what, folder)
        return store
    if len(missing) < store.num_shards:
        log.info("features of %s: %d of %d shards missing in %s", wanted.what, len(missing), store.num_shards, folder)
    total = len(store)
    with progress(f"features of {wanted.what}", total) as done:
        done(total - store.num_in(missing))
        while missing:
            claims = _Claims(store, missing)
            for records in wanted.records(claims):
                shard, lock = claims.taken.pop(0)
                store.write(shard, records)
                lock.release()
                missing.remove(shard)
                done(total - store.num_in(missing))
            missing = store.missing()
            if missing:  # other processes write them; should one be killed, its shards can be claimed here
                time.sleep(_WAIT_SECONDS)
    store.finish()
    return store


class _Claims:
    """The records of each missing shard that this process can take, shard by shard; `taken` holds the locks."""

    def __init__(self, store: DiskStore, missing: Sequence[int]) -> None:
        self.store, self.missing = store, list(missing)
        self.taken: list[tuple[int, BaseFileLock]] = []

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.missing:
            if (lock := self.store.claim(shard)) is not None:
                self.taken.append((shard, lock))
                yield list(self.store.records_of(shard))


def _opened(wanted: FeaturePass, folder: Path, identity: Mapping[str, Any], shard_bytes: int) -> DiskStore:
    """The store of a folder; a new one is sized by its first record, and announced."""
    if not DiskStore.is_at(folder):
        (record,) = next(iter(wanted.records([[0]])))
        parent = next(place for place in (folder, *folder.parents) if place.exists())
        _announce(wanted, record.num_bytes, str(folder), shutil.disk_usage(parent).free, "cache.dir=FOLDER")
        per_shard = max(1, min(len(wanted.keys), shard_bytes // max(1, record.num_bytes)))
        DiskStore.create(folder, identity, len(wanted.keys), per_shard)
    store = DiskStore(folder)
    if store.manifest.get("identity") != identity:
        raise UserError(f"{folder} holds features of something else. Remove the folder; they are computed again.")
    return store


def _announce(wanted: FeaturePass, record_bytes: int, where: str, free: int, instead: str) -> None:
    """Say how large the cache will be, before it is written.

    Raises:
        UserError: it is more than what is free.
    """
    size = record_bytes * len(wanted.keys)
    text = f"features of {wanted.what}: {len(wanted.keys)} x {in_bytes(record_bytes)} = about {in_bytes(size)}"
    if size > free * _SPARE:
        raise UserError(
            f"{text} do not fit into {where}: {in_bytes(free)} are free. Lower cache.views, use fewer blocks or "
            f"cache.dtype=bfloat16, or {instead}."
        )
    log.info("%s, into %s (%s free)", text, where, in_bytes(free))


def in_bytes(size: float) -> str:
    """A number of bytes for a person."""
    unit = next((unit for unit in ("B", "kB", "MB", "GB") if size < 1000 ** (1 + "BkMG".index(unit[0]))), "TB")
    return f"{size / 1000 ** ('BkMGT'.index(unit[0])):.3g} {unit}"
