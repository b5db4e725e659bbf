"""Where cached features stand: records in memory, or in safetensors shards that a kill or a flipped bit cannot spoil.

A store on disk is a folder. `manifest.json` says what its records are of; shards named NNNNN-CHECKSUM-LENGTH hold a
fixed number of them each. A shard appears whole (renamed from a temporary name), and its name says how it must read.
Any number of processes may fill one store: each takes the shards that nobody has taken.
"""

import json
import re
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data.records import Record, decode
from dense_heads.errors import UserError
from dense_heads.ops.files import write_atomically

FORMAT = 2  # part of every identity: another layout of records or shards is another cache
MANIFEST = "manifest.json"
_OPEN_SHARDS = 128  # a process may hold some thousand files open; each is mapped, not read
_SHARD = re.compile(r"(\d{5,})-([0-9a-f]{8})-(\d+)\.safetensors")


class FeatureStore(Protocol):
    """Records by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def read(self, number: int) -> Record:
        """One of them."""
        ...


class MemoryStore:
    """Records of this process; gone with it."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __len__(self) -> int:
        return len(self.records)

    def read(self, number: int) -> Record:
        """A record."""
        return self.records[number]


class DiskStore:
    """Records in checked, memory-mapped shards of one folder.

    Args:
        folder: of the store; must hold a manifest.

    Raises:
        UserError: the manifest is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.num_records, self.per_shard = int(self.manifest["records"]), int(self.manifest["records_per_shard"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no feature store: {MANIFEST} cannot be read ({error}). Remove the folder; the features "
                "are computed again."
            ) from error
        self._shards: dict[int, Path] = {}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self.missing()

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether a store was begun there."""
        return (folder / MANIFEST).is_file()

    @staticmethod
    def create(folder: Path, identity: Mapping[str, Any], num_records: int, per_shard: int) -> None:
        """Begin a store, unless another process did meanwhile."""
        manifest = {"records": num_records, "records_per_shard": per_shard, "identity": dict(identity)}
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not DiskStore.is_at(folder):
                write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def __len__(self) -> int:
        return self.num_records

    @property
    def num_shards(self) -> int:
        """How many shards hold all records."""
        return -(-self.num_records // self.per_shard)

    def records_of(self, shard: int) -> range:
        """The records of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.num_records))

    def num_in(self, shards: Sequence[int]) -> int:
        """How many records these shards hold."""
        return sum(len(self.records_of(shard)) for shard in shards)

    def missing(self) -> list[int]:
        """The shards that are not there, by a look into the folder."""
        self._shards = {int(found[1]): path for path, found in _shards_in(self.folder)}
        return [shard for shard in range(self.num_shards) if shard not in self._shards]

    def check(self, whole: bool = True) -> Iterator[Path]:
        """Read every shard that is there; removes and yields those whose length or checksum is not what it must be.

        `whole=False` looks at lengths only.
        """
        for number, path in sorted(self._shards.items()):
            if not _is_sound(path, whole):
                path.unlink(missing_ok=True)
                self._shards.pop(number)
                self._open.pop(number, None)
                yield path

    def claim(self, shard: int) -> BaseFileLock | None:
        """The right to write a shard, until released; None if another process has it, or the shard is there."""
        places = self.folder / "locks"
        places.mkdir(exist_ok=True)
        lock = FileLock(places / f"{shard:05d}", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        for left in self.folder.glob(f".{shard:05d}-*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        if any(self.folder.glob(f"{shard:05d}-*.safetensors")):
            lock.release()
            return None
        return lock

    def write(self, shard: int, records: Sequence[Record]) -> None:
        """Write a claimed shard as a whole."""
        numbers = self.records_of(shard)
        assert len(records) == len(numbers)
        tensors: dict[str, Tensor] = {}
        for number, record in zip(numbers, records, strict=True):
            tensors |= {f"{number}/{name}": tensor for name, tensor in record.tensors.items()}
        values = {number: record.values for number, record in zip(numbers, records, strict=True)}
        content = save(tensors, metadata={"records": json.dumps(values)})  # one key: the order of several is random
        path = self.folder / f"{shard:05d}-{zlib.crc32(content):08x}-{len(content)}.safetensors"
        write_atomically(path, content)
        self._shards[shard] = path

    def finish(self) -> None:
        """Remove what only writers need, once every shard is there."""
        shutil.rmtree(self.folder / "locks", ignore_errors=True)
        (self.folder / ".lock").unlink(missing_ok=True)

    def read(self, number: int) -> Record:
        """A record; its tensors are views of the mapped file.

        Raises:
            UserError: the shard is gone or broken since it was checked.
        """
        shard = number // self.per_shard
        file, names, values = self._opened(shard)
        prefix = f"{number}/"
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names[number]}
        return Record(tensors, values[str(number)])

    def _opened(self, shard: int) -> Any:
        if shard not in self._open:
            path = self._shards.get(shard, self.folder / f"{shard:05d}-*")
            try:
                file: Any = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}). Start again: it is then computed anew.") from error
            names: dict[int, list[str]] = {number: [] for number in self.records_of(shard)}
            for name in file.keys():
                names[int(name.partition("/")[0])].append(name)
            self._open[shard] = file, names, json.loads(file.metadata()["records"])
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # a mapped file does not travel to another process


class CachedDataset(Dataset[dict[str, Any]]):
    """A data set whose images have been through the backbone: items as before, features in place of pixels.

    Asked by (epoch, index) it gives the view `epoch % num_views` of the sample; asked by index the only one.
    """

    def __init__(self, store: FeatureStore, num_samples: int, num_views: int = 1) -> None:
        assert len(store) == num_samples * num_views
        self.store, self.num_samples, self.num_views = store, num_samples, num_views

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The features that `mode=embed` wrote into a folder."""
        store = DiskStore(Path(folder))
        if missing := store.missing():
            raise UserError(f"{folder}: {len(missing)} of its {store.num_shards} shards are missing. Embed again.")
        return cls(store, len(store))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return decode(self.store.read((epoch % self.num_views) * self.num_samples + index))


def _shards_in(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in folder.glob("*.safetensors"):
        if found := _SHARD.fullmatch(path.name):
            yield path, found


def _is_sound(path: Path, whole: bool) -> bool:
    found = _SHARD.fullmatch(path.name)
    assert found is not None
    try:
        if path.stat().st_size != int(found[3]):
            return False
        return not whole or zlib.crc32(path.read_bytes()) == int(found[2], 16)
    except OSError:
        return False
