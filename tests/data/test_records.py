"""Records: an item's tensors and values come back as they went in, features in place of pixels."""

import pytest
import torch
from safetensors.torch import load, save

from dense_heads.data.feature_store import CachedDataset, DiskStore, MemoryStore
from dense_heads.data.records import Record, decode, encode
from dense_heads.errors import UserError
from dense_heads.structures import Level, Levels, Padding, SeenView

LEVELS = (Level(3, True), Level(7, True), Level(7, False))


def levels(seed, grid=(2, 3), size=(27, 40)):
    generator = torch.Generator().manual_seed(seed)
    return Levels(
        {level: torch.randn(1, 5, *grid, generator=generator) for level in LEVELS},
        {level: torch.randn(1, 5, generator=generator) for level in LEVELS},
        size,
        Padding(1, 0, 1, 1),
    )


def item(largest):
    return {
        "image": torch.zeros(3, 27, 40),
        "image_id": "a/b",
        "original_size": (54, 80),
        "scale": 0.1,
        "mask": torch.tensor([[0, 1], [largest, 2]]),
        "depth_m": torch.tensor([0.0, 1 / 3]),
        "boxes": torch.zeros(0, 4),
        "instance_masks": torch.tensor([[True, False]]),
    }


@pytest.mark.parametrize("largest", [5, 255, 256, -1, 70_000, 2**40])
@pytest.mark.parametrize("training", [True, False])
def test_a_record_gives_back_its_item(largest, training):
    seen = [SeenView((27, 40), [levels(0)])]
    if not training:
        seen = [SeenView((27, 40), [levels(0), levels(1)]), SeenView((54, 80), [levels(2, (4, 6), (54, 80))])]
    record = encode(item(largest), seen, training, torch.float32)
    content = save(record.tensors)  # names and layouts that a file takes
    back = decode(Record(load(content), record.values))
    for key, value in item(largest).items():
        if key == "image":
            assert key not in back
        elif isinstance(value, torch.Tensor):
            assert back[key].dtype == value.dtype and torch.equal(back[key], value)
        else:
            assert back[key] == value and type(back[key]) is type(value)
    found = [back["features"]] if training else [window for view in back["views"] for window in view.windows]
    expected = [window for view in seen for window in view.windows]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.image_size, ours.padding) == (theirs.image_size, theirs.padding)
        assert ours.patch_maps.keys() == theirs.patch_maps.keys()
        assert all(torch.equal(ours.patch_maps[key], theirs.patch_maps[key]) for key in LEVELS)
        assert all(torch.equal(ours.cls_tokens[key], theirs.cls_tokens[key]) for key in LEVELS)
    if not training:
        assert [view.size for view in back["views"]] == [(27, 40), (54, 80)]


def test_labels_take_little_room_and_features_the_type_that_was_asked_for():
    record = encode(item(255), [SeenView((27, 40), [levels(0)])], True, torch.bfloat16)
    assert record.tensors["item.mask"].dtype == torch.uint8
    assert record.tensors["map.0.0.7.1.1"].dtype == torch.bfloat16
    assert record.num_bytes == sum(tensor.nbytes for tensor in record.tensors.values())


def records(num, seed=0):
    return [
        encode({"image_id": str(n)}, [SeenView((27, 40), [levels(seed + n)])], True, torch.float32) for n in range(num)
    ]


def filled(folder, num=7, per_shard=3):
    made = records(num)
    DiskStore.create(folder, {"what": "test"}, num, per_shard)
    store = DiskStore(folder)
    for shard in store.missing():
        lock = store.claim(shard)
        store.write(shard, [made[number] for number in store.records_of(shard)])
        lock.release()
    return store, made


def test_a_store_on_disk_reads_like_one_in_memory(tmp_path):
    store, made = filled(tmp_path / "store")
    memory = MemoryStore()
    memory.records = made
    assert store.num_shards == 3 and DiskStore(tmp_path / "store").missing() == []
    for views, samples in ((1, 7), (7, 1)):
        on_disk, in_memory = (CachedDataset(kind, samples, views) for kind in (store, memory))
        for key in [(epoch, index) for epoch in range(9) for index in range(samples)]:
            ours, theirs = on_disk[key], in_memory[key]
            assert ours["image_id"] == theirs["image_id"] == str((key[0] % views) * samples + key[1])
            assert torch.equal(ours["features"].patch_maps[LEVELS[0]], theirs["features"].patch_maps[LEVELS[0]])


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_spoilt_shard_is_noticed_named_and_missing_then(tmp_path, harm):
    filled(tmp_path / "store")
    path = sorted((tmp_path / "store").glob("00001-*"))[0]
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(b"" if harm == "empty" else content[:-10] if harm == "cut" else content)
    fresh = DiskStore(tmp_path / "store")
    assert list(fresh.check(whole=False)) == ([] if harm == "flip" else [path])
    assert list(fresh.check()) == ([path] if harm == "flip" else [])
    assert fresh.missing() == [1] and not path.exists()


def test_a_shard_has_one_writer(tmp_path):
    store, made = filled(tmp_path / "store")
    assert store.claim(0) is None  # it is there
    next((tmp_path / "store").glob("00000-*")).unlink()
    (tmp_path / "store" / ".00000-left-behind").write_text("by a killed process")
    lock = store.claim(0)
    assert lock is not None and DiskStore(tmp_path / "store").claim(0) is None
    assert not list((tmp_path / "store").glob(".00000-*"))
    store.write(0, made[:3])
    lock.release()
    assert store.claim(0) is None and store.missing() == []


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    for content in ("", "{", "[]", '{"records": "x"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="Remove the folder"):
            DiskStore(tmp_path)
