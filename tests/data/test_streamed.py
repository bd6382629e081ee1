"""Photographs in shards."""

from __future__ import annotations

import builtins
import importlib
import sys
from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

pytest.importorskip("litdata", reason='needs pip install "kdlit[streaming]"')

from kdlit.data import NetworkInput, streamed
from kdlit.data.base import hold_out
from kdlit.data.photographs import list_photographs, read_photograph
from kdlit.data.streamed import StreamedPhotographs, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:.*max number of worker:UserWarning")


def put_pictures(root, count):
    """``count`` small pictures of smooth noise in three classes; the second of each is a grey PNG."""
    draw = np.random.default_rng(count)
    for number in range(count):
        folder = root / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((40 + number, 36), Image.Resampling.BICUBIC)
        if number // 3 == 1:
            picture.convert("L").save(folder / f"{number}.png")
        else:
            picture.save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures in ``train`` (50, of which 10 are held out in the shards) and ``val`` (17)."""
    root = tmp_path_factory.mktemp("pictures")
    put_pictures(root / "train", 50)
    put_pictures(root / "val", 17)
    return root


@pytest.fixture(scope="module")
def shards(folders, tmp_path_factory):
    """The same in shards of a few pictures each."""
    root = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "Cache", lambda out, chunk_bytes: Cache(out, chunk_bytes=8000))
        write_shards(folders / "train", root / "train", val_size=10, num_workers=0)
        write_shards(folders / "val", root / "val", num_workers=0)
    assert len(list((root / "train").glob("*.bin"))) >= 5
    return root


Cache = streamed.Cache


def ready(root, **kwargs):
    settings = {"size": 32, "resize": 36, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    data = StreamedPhotographs(str(root), **(settings | kwargs))
    data.setup("fit")
    return data


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_shards_hold_the_files_as_they_are(folders, shards):
    listed = list_photographs(folders / "train")
    data = ready(shards)
    assert data.class_names == listed.class_names == ["a", "b", "c"]
    assert data.num_classes == 3
    seen = []
    for part in ("train", "val"):
        dataset = data.datasets[part]
        dataset.transform = []
        for position in range(len(dataset)):
            stored = dataset[position]
            index = stored["index"]
            seen.append(index)
            assert bytes(stored["image"]) == listed.path(index).read_bytes()
            assert bytes(stored["name"]).decode() == listed.name(index)
            assert stored["target"] == listed.target[index]
    assert sorted(seen) == list(range(50))


def test_test_pictures_are_those_of_the_folder(folders, shards):
    data = ready(shards, mean=(0.0,) * 3, std=(1.0,) * 3, size=36)
    listed = list_photographs(folders / "val")
    batches = list(data.test_dataloader())
    assert sorted(flat(batch["index"].tolist() for batch in batches)) == list(range(17))
    for batch in batches:
        assert batch["image"].shape[1:] == (3, 36, 36)
        assert batch["target"].dtype == batch["index"].dtype == torch.int64
        assert torch.equal(batch["target"], listed.target[batch["index"]])
        for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
            whole = read_photograph(listed.path(index)) / 255
            left = round((whole.shape[-1] - 36) / 2)
            torch.testing.assert_close(image, whole[..., left : left + 36])


def test_held_out_pictures_are_those_of_imagenet(folders, shards):
    data = ready(shards)
    held_out = hold_out(list_photographs(folders / "train").target, 10, 0)
    assert sorted(flat(indices(data.val_dataloader()))) == held_out.nonzero().flatten().tolist()
    assert not set(flat(indices(data.train_dataloader()))) & set(held_out.nonzero().flatten().tolist())


def test_order_follows_from_the_seed_and_changes_with_the_epoch(shards):
    loader = ready(shards).train_dataloader()
    first, second = indices(loader), indices(loader)
    assert len(first) == len(loader) == 10
    assert sorted(flat(first)) == sorted(flat(second))
    assert first != second
    again = ready(shards).train_dataloader()
    assert [indices(again), indices(again)] == [first, second]
    assert indices(ready(shards, seed=1).train_dataloader()) != first


def test_neighbours_in_the_shards_are_of_different_classes(shards):
    dataset = ready(shards).datasets["train"]
    dataset.transform = []
    labels = [dataset[position]["target"] for position in range(len(dataset))]
    assert sum(a == b for a, b in pairwise(labels)) < 25  # 37 if sorted, 13 expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_do_not_overlap(shards, monkeypatch, num_workers):
    train, test = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("GLOBAL_RANK", rank)
        data = ready(shards, num_workers=num_workers)
        train.append(indices(data.train_dataloader()))
        test.append(indices(data.test_dataloader()))
    assert len(train[0]) == len(train[1]) >= 4
    assert all(len(batch) == 4 for batch in train[0] + train[1])
    assert not set(flat(train[0])) & set(flat(train[1]))
    assert sorted(flat(test[0]) + flat(test[1])) == list(range(17))


class Recorder(L.LightningModule):
    """Notes which pictures it is given, and writes a checkpoint after one batch."""

    def __init__(self, save_after=0, path=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []
        self.save_after, self.path = save_after, path

    def training_step(self, batch):
        self.seen.append(batch["index"].tolist())
        return self.layer(batch["image"].mean().view(1)).sum()

    def on_train_batch_end(self, *_):
        if len(self.seen) == self.save_after:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(("num_workers", "save_after"), [(0, 3), (0, 10), (0, 13), (2, 7)])
def test_training_goes_on_within_the_epoch(shards, trainer, tmp_path, num_workers, save_after):
    whole, resumed = Recorder(save_after, tmp_path / "some.ckpt"), Recorder()
    trainer(max_epochs=3).fit(whole, ready(shards, num_workers=num_workers))
    assert len(whole.seen) == 30
    trainer(max_epochs=3).fit(resumed, ready(shards, num_workers=num_workers), ckpt_path=tmp_path / "some.ckpt")
    assert resumed.seen == whole.seen[save_after:]


def test_other_workers_go_on_with_pictures_not_yet_seen(shards, trainer, tmp_path):
    begun, resumed = Recorder(4, tmp_path / "some.ckpt"), Recorder()
    trainer(max_epochs=1).fit(begun, ready(shards, num_workers=2))
    trainer(max_epochs=2).fit(resumed, ready(shards), ckpt_path=tmp_path / "some.ckpt")
    assert sorted(flat(begun.seen[:4] + resumed.seen[:6])) == sorted(flat(resumed.seen[6:]))
    assert len(resumed.seen) == 16


def test_shards_from_afar_pass_through_a_bounded_cache(shards, tmp_path):
    data = ready(f"local:{shards}", cache_dir=str(tmp_path))
    near = ready(shards)
    assert indices(data.train_dataloader()) == indices(near.train_dataloader())
    assert len(list(tmp_path.rglob("*.bin"))) == len(list((shards / "train").glob("*.bin")))
    data.datasets["train"].max_cache_size = "4KB"
    loader = data.train_dataloader()
    assert sorted(flat(indices(loader))) == sorted(flat(indices(near.train_dataloader())))
    assert len(list((shards / "train").glob("*.bin"))) >= 5


def test_without_held_out_pictures_there_is_no_validation(folders, tmp_path, trainer):
    for part in ("train", "val"):
        assert write_shards(folders / part, tmp_path / part, num_workers=0) == len(list_photographs(folders / part))
    data = ready(tmp_path)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"nothing to validate on in .*--val_size, or use `kdlit test`"):
        trainer().validate(Recorder(), data)


def test_nothing_is_left_of_shards_with_broken_pictures(tmp_path):
    put_pictures(tmp_path / "in", 9)
    for name in ("a/0.jpg", "b/7.jpg"):
        file = tmp_path / "in" / name
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="cannot decode") as caught:
        write_shards(tmp_path / "in", tmp_path / "out", num_workers=1)
    assert all(f"{name}: " in str(caught.value) for name in ("a/0.jpg", "b/7.jpg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_what_is_wrong_is_said(folders, shards, tmp_path):
    with pytest.raises(ValueError, match=r"val exists; remove it or choose another folder"):
        write_shards(folders / "val", shards / "val")
    with pytest.raises(ValueError, match="shard_mb must be >= 1"):
        write_shards(folders / "val", tmp_path / "out", shard_mb=0)
    with pytest.raises(FileNotFoundError, match=r"no shards in .*/train; set --data.root .*kdlit.data.streamed"):
        StreamedPhotographs(str(folders))
    with pytest.raises(ValueError, match="resize must be >= 300"):
        StreamedPhotographs(str(shards), size=300)
    with pytest.raises(ValueError, match="batch_size is 41 on each device, but too few"):
        ready(shards, batch_size=41).train_dataloader()


def test_classes_must_agree(folders, shards, tmp_path):
    put_pictures(tmp_path / "in", 9)
    (tmp_path / "in" / "c").rename(tmp_path / "in" / "d")
    write_shards(tmp_path / "in", tmp_path / "val", num_workers=0)
    (tmp_path / "train").symlink_to(shards / "train")
    with pytest.raises(ValueError, match="only one of them has c, d; write the shards again"):
        ready(tmp_path)


def test_command_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["streamed", str(folders / "val"), str(tmp_path / "val"), "--num_workers=0"])
    streamed.main()
    assert capsys.readouterr().out == f"17 pictures are in {tmp_path / 'val'}\n"
    with pytest.raises(SystemExit, match="error: .*val exists"):
        streamed.main()


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **kwargs):
        if name.startswith("litdata"):
            raise ModuleNotFoundError("No module named 'litdata'")
        return real(name, *arguments, **kwargs)

    monkeypatch.delitem(sys.modules, "kdlit.data.streamed")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r'litdata.*: pip install "kdlit\[streaming\]"'):
        importlib.import_module("kdlit.data.streamed")


def test_each_network_and_each_view_gets_its_pictures(shards):
    teacher = NetworkInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=48, resize=48)
    settings = {"size": 32, "resize": 36, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    data = StreamedPhotographs(str(shards), teacher_input=teacher, strong_view=True, **settings)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    sizes = {name: value.shape[-1] for name, value in batch.items() if value.ndim == 4}
    assert sizes == {"image": 32, "image_strong": 32, "image_teacher": 48, "image_teacher_strong": 48}
    batch = next(iter(data.test_dataloader()))
    assert {name: tuple(value.shape) for name, value in batch.items() if value.ndim == 4} == {
        "image": (4, 3, 32, 32),
        "image_teacher": (4, 3, 48, 48),
    }
    data = StreamedPhotographs(str(shards), transforms=[v2.CenterCrop(20)], **settings)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 32, 32)
