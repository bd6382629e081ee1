"""Splits, loaders and what a data module refuses."""

from __future__ import annotations

import math
from collections import Counter

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from kdlit.data import NetworkInput, TeacherConfidence
from kdlit.data.base import Pictures, hold_out, symmetric_noise
from kdlit.data.sampling import EpochSampler
from kdlit.losses import CrossEntropyLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import Diary, TinyData, TinyNet


def ready(**kwargs):
    data = TinyData(**kwargs)
    data.setup("fit")
    return data


def test_held_out_pictures_are_spread_over_the_classes_and_not_trained_on():
    data = ready(val_size=30)
    train, val = data._pictures["train"], data._pictures["val"]
    assert (len(train), len(val)) == (66, 30)
    assert torch.bincount(val.target).tolist() == [6] * 5
    everything = {tuple(image.flatten().tolist()) for image in TinyData().load()["train"].image}
    parts = [{tuple(image.flatten().tolist()) for image in part.image} for part in (train, val)]
    assert parts[0] | parts[1] == everything
    assert not parts[0] & parts[1]


def test_the_split_depends_on_its_own_seed_alone():
    torch.manual_seed(1)
    first = ready(val_size=30)._pictures["val"].image
    torch.manual_seed(2)
    assert torch.equal(first, ready(val_size=30)._pictures["val"].image)
    assert not torch.equal(first, ready(val_size=30, split_seed=1)._pictures["val"].image)


def test_a_share_and_a_count_hold_out_the_same():
    target = torch.arange(40) % 4
    assert torch.equal(hold_out(target, 0.25, 0), hold_out(target, 10, 0))
    assert hold_out(target, 0, 0).sum() == 0
    with pytest.raises(ValueError, match="val_size must leave pictures to train on, got 40 of 40"):
        hold_out(target, 40, 0)


def test_one_epoch_shows_every_training_picture_once_with_its_label():
    data = ready(val_size=0)
    index = torch.cat([batch["index"] for batch in data.train_dataloader()])
    assert sorted(index.tolist()) == list(range(96))
    assert index.tolist() != sorted(index.tolist())
    for batch in data.train_dataloader():
        assert torch.equal(batch["target"], data._pictures["train"].target[batch["index"]])
        assert batch["image"].dtype == torch.float32


def test_two_views_show_the_same_pictures_differently():
    data = ready(strong_view=True)
    batch = next(iter(data.train_dataloader()))
    assert batch["image_strong"].shape == batch["image"].shape
    assert not torch.equal(batch["image_strong"], batch["image"])
    assert torch.equal(batch["target"], data._pictures["train"].target[batch["index"]])
    assert "image_strong" not in next(iter(data.val_dataloader()))
    assert "image_strong" not in next(iter(ready().train_dataloader()))


def test_augmentation_has_the_distribution_of_the_per_picture_recipe():
    """One bright pixel in the middle of 3x3, padding 1: nine places equally likely, and left-right symmetry."""

    class OnePixel(TinyData):
        def load(self):
            self.class_names = ["a"]
            image = torch.zeros(9000, 1, 3, 3, dtype=torch.uint8)
            image[:, :, 1, 0] = 255
            pictures = Pictures(image, torch.zeros(9000, dtype=torch.int64))
            return {"train": pictures, "test": pictures}

    data = OnePixel(val_size=0, batch_size=9000)
    data.views.student = NetworkInput((0.0,), (1.0,))
    data.setup("fit")
    places = next(iter(data.train_dataloader()))["image"].squeeze(1)
    recipe = v2.Compose([v2.RandomCrop(3, padding=1), v2.RandomHorizontalFlip()])
    expected = torch.stack([recipe(one) for one in data._pictures["train"].image]).squeeze(1) / 255
    assert (places.mean(0) - expected.mean(0)).abs().max() < 4 * math.sqrt(2 * 0.17 / 9000)
    assert places.sum().item() / 9000 == pytest.approx(2 / 3, abs=0.02)


def test_workers_change_nothing():
    plain, helped = ready(strong_view=True), ready(strong_view=True, num_workers=2)
    for loader in ("train_dataloader", "test_dataloader"):
        one, other = getattr(plain, loader)(), getattr(helped, loader)()
        for _ in range(2):  # epochs: workers stay alive between them
            for a, b in zip(one, other, strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_epoch_has_its_own_order_and_augmentation():
    loader = ready(val_size=0, batch_size=96).train_dataloader()
    first, second = next(iter(loader)), next(iter(loader))
    assert first["index"].tolist() != second["index"].tolist()
    order = first["index"].argsort(), second["index"].argsort()
    assert not torch.equal(first["image"][order[0]], second["image"][order[1]])


def test_the_seed_of_the_run_settles_order_and_augmentation():
    def images(seed):
        L.seed_everything(seed, verbose=False)
        loader = ready().train_dataloader()
        torch.rand(7)  # what else is drawn does not matter
        return torch.cat([batch["image"] for batch in loader])

    assert torch.equal(images(1), images(1))
    assert not torch.equal(images(1), images(2))


def test_drawing_pictures_leaves_the_global_generator_alone():
    data = ready(strong_view=True, auto_augment=True)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def plain_module():
    return ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))


# Inside and at the end of an epoch of four steps; workers are slow to start, so one case with them stands for all.
@pytest.mark.parametrize(("step", "workers"), [(2, 0), (4, 0), (6, 0), (8, 0), (6, 2)])
def test_a_resumed_run_goes_on_with_the_very_next_batch(trainer, tmp_path, step, workers, recwarn):
    path = tmp_path / "at.ckpt"
    whole = Diary(save_at=step, path=path)
    trainer(max_epochs=3, callbacks=[whole], limit_val_batches=0).fit(plain_module(), TinyData(num_workers=workers))
    assert len(whole.batches) == 12
    L.seed_everything(99, verbose=False)
    rest = Diary()
    trainer(max_epochs=3, callbacks=[rest], limit_val_batches=0).fit(
        plain_module(), TinyData(num_workers=workers), ckpt_path=path
    )
    assert rest.batches == whole.batches[step:]
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_processes_share_an_epoch_without_overlap_and_without_a_missing_batch():
    for size in (97, 96, 95):
        shares = [list(EpochSampler(size, 8, seed=3, processes=(rank, 3))) for rank in range(3)]
        assert {len(share) for share in shares} == {size // 3}
        everything = [key for share in shares for key in share]
        assert len(set(everything)) == len(everything) == size // 3 * 3
    alone = list(EpochSampler(96, 8, seed=3))
    shares = [list(EpochSampler(96, 8, seed=3, processes=(rank, 2))) for rank in range(2)]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == alone


def test_a_loader_handed_over_knows_the_processes(monkeypatch):
    sampler = EpochSampler(10, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert len(sampler) == len(list(sampler)) == 5


def test_own_loops_see_every_epoch_anew():
    data = ready()
    orders = [[batch["index"].tolist() for batch in data.train_dataloader()] for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    loader = ready().train_dataloader()
    assert [[batch["index"].tolist() for batch in loader] for _ in range(3)] == orders


def test_the_training_pictures_can_be_looked_at_beside_and_after_a_fit(trainer):
    class Look(L.Callback):
        counts = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.counts.append(len(list(trainer.datamodule.train_dataloader())))
            self.counts.append(len(list(trainer.train_dataloader)))

    data = TinyData()
    fitting = trainer(max_epochs=2, callbacks=[Look()])
    fitting.fit(plain_module(), data)
    assert Look.counts == [4, 4, 4, 4]
    assert len(list(data.train_dataloader())) == 4
    assert trainer().validate(plain_module(), data.train_dataloader(), verbose=False)[0]["val/top1"] >= 0


def test_each_run_has_its_own_order(trainer):
    data = TinyData()
    orders = []
    for seed in (1, 2, 1):
        L.seed_everything(seed, verbose=False)
        diary = Diary()
        trainer(callbacks=[diary], limit_val_batches=0).fit(plain_module(), data)
        orders.append(diary.batches)
    assert orders[0] == orders[2] != orders[1]


def test_the_middle_of_an_epoch_cannot_be_resumed_with_other_batches(trainer, tmp_path):
    path = tmp_path / "at.ckpt"
    saver = Diary(save_at=2, path=path)
    trainer(callbacks=[saver], limit_val_batches=0).fit(plain_module(), TinyData())
    with pytest.raises(ValueError, match=r"middle of an epoch with .* \(16, 1\), which cannot go on with \(8, 1\)"):
        trainer(limit_val_batches=0).fit(plain_module(), TinyData(batch_size=8), ckpt_path=path)


def test_data_sets_work_in_plain_loaders_too():
    dataset = ready().datasets["test"]
    whole = dataset.__getitems__(range(40)).batch
    for batch in (next(iter(DataLoader(dataset, 40))), next(iter(DataLoader(Subset(dataset, range(40)), 40)))):
        assert all(torch.equal(batch[name], whole[name]) for name in whole)
    assert len(list(dataset)) == 40
    with pytest.raises(IndexError, match="sample 40 of 40"):
        dataset[40]


def test_mistakes_in_workers_end_in_one_line():
    class Careless(TinyData):
        def augment(self, image, draws):
            raise ValueError("first line\nlast line")

    data = Careless(num_workers=1)
    data.setup("fit")
    with pytest.raises(ValueError, match="^first line\nlast line$"):
        list(data.train_dataloader())


def test_a_subset_is_even_over_the_classes_and_the_same_in_every_run():
    data = ready(subset=0.5)
    assert len(data._pictures["train"]) == 32
    assert max(Counter(data._pictures["train"].target.tolist()).values()) == 7
    assert torch.equal(data._pictures["train"].image, ready(subset=0.5)._pictures["train"].image)
    assert len(data._pictures["val"]) == 32
    more = ready(subset=0.5, split_seed=4)
    assert not torch.equal(data._pictures["train"].image, more._pictures["train"].image)


class Bright(nn.Module):
    """Sure of the class in proportion to the brightness of the picture."""

    def forward(self, image):
        return image.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("keep", ["most", "least"])
def test_a_subset_by_the_teachers_confidence_keeps_the_right_half(keep):
    data = TinyData(subset=0.5, subset_by=TeacherConfidence(Bright(), keep))
    data.setup("fit")
    everything = data._pictures["train"]
    batches = list(data.train_dataloader())
    p = Bright()(data.views.evaluation(everything.image)["image"]).softmax(1)
    p = p.gather(1, everything.target[:, None]).squeeze(1)
    kept = data.datasets["train"].pictures
    assert len(kept) == 32 == sum(len(batch["target"]) for batch in batches)
    chosen = p.argsort(descending=keep == "most", stable=True)[:32].sort().values
    assert torch.equal(kept.image, everything.image[chosen])
    assert len(data.datasets["val"]) == 32
    assert len(list(data.train_dataloader())) == 2


def test_symmetric_noise_changes_just_the_share_and_every_other_class_alike():
    target = torch.arange(100_000) % 10
    noisy = symmetric_noise(target, 10, 0.3, seed=1)
    changed = noisy != target
    assert changed.sum() == 30_000
    shift = (noisy - target)[changed] % 10
    assert torch.bincount(shift, minlength=10)[1:].float().div(30_000 / 9).sub(1).abs().max() < 0.06
    assert torch.equal(noisy, symmetric_noise(target, 10, 0.3, seed=1))
    assert not torch.equal(noisy, symmetric_noise(target, 10, 0.3, seed=2))


def test_label_noise_is_in_training_alone_and_the_same_whatever_is_held_out():
    data, clean = ready(label_noise=0.25, val_size=0), ready(val_size=0)
    noisy = data._pictures["train"].target
    assert (noisy != clean._pictures["train"].target).sum() == 24
    assert torch.equal(data._pictures["test"].target, clean._pictures["test"].target)
    divided = ready(label_noise=0.25, val_size=32)
    train = (~hold_out(clean._pictures["train"].target, 32, 0)).nonzero().flatten()
    assert torch.equal(divided._pictures["train"].target, noisy[train])
    assert torch.equal(divided._pictures["val"].target, ready(val_size=32)._pictures["val"].target)


@pytest.mark.parametrize("settings", [{"val_size": 48}, {"val_size": 0, "subset": 0.5}])
def test_label_noise_has_nothing_to_do_with_what_is_held_out(settings):
    class Large(TinyData):
        def load(self):
            return {**super().load(), "train": self._draw(4000, 1)}

    noisy = Large(label_noise=0.4, **settings)
    noisy.setup("fit")
    clean = Large(**settings)
    clean.setup("fit")
    share = (noisy._pictures["train"].target != clean._pictures["train"].target).float().mean()
    assert share == pytest.approx(0.4, abs=0.03)


def test_auto_augment_changes_colours_after_crop_and_flip():
    plain, augmented = ready(val_size=0, batch_size=96), ready(val_size=0, batch_size=96, auto_augment=True)
    a, b = (next(iter(data.train_dataloader())) for data in (plain, augmented))
    assert torch.equal(a["index"], b["index"])
    different = (a["image"] != b["image"]).flatten(1).any(1)
    assert 0.5 < different.float().mean() <= 1.0
    assert "image_strong" not in b


def test_own_transforms_replace_the_recipe_and_may_change_the_size():
    data = ready(transforms=[v2.RandomResizedCrop(12, antialias=True), v2.RandomHorizontalFlip()], strong_view=True)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["image_strong"].shape == (16, 3, 12, 12)


def test_pictures_can_be_scaled():
    data = ready(size=12)
    assert next(iter(data.train_dataloader()))["image"].shape == (16, 3, 12, 12)
    assert next(iter(data.test_dataloader()))["image"].shape == (40, 3, 12, 12)


def test_transforms_must_leave_pictures_as_bytes():
    data = ready(transforms=[v2.ToDtype(torch.float32, scale=True)])
    with pytest.raises(ValueError, match="transforms must give uint8 pictures, got torch.float32; leave scaling"):
        next(iter(data.train_dataloader()))


def test_a_teacher_with_too_few_classes_cannot_rank():
    data = ready(subset=0.5, subset_by=TeacherConfidence(TinyNet(3)))
    with pytest.raises(ValueError, match=r"teacher of subset_by gives 3 logits, but labels go up to 4"):
        data.train_dataloader()


def test_pictures_are_not_there_before_setup():
    with pytest.raises(RuntimeError, match=r"has no test pictures yet; call setup"):
        TinyData().test_dataloader()


def test_data_modules_can_be_sent_to_worker_processes(trainer):
    import pickle

    data = ready(strong_view=True)
    data.trainer = trainer()
    copy = pickle.loads(pickle.dumps(data.datasets["train"]))
    assert copy.data.trainer is None
    first = copy.__getitems__([96, 97]).batch
    assert torch.equal(first["image_strong"], data.datasets["train"].__getitems__([96, 97]).batch["image_strong"])


def test_single_samples_can_be_read_too():
    dataset = ready().test_dataloader().dataset
    sample = dataset[3]
    assert sample["image"].shape == (3, 8, 8)
    assert torch.equal(sample["image"], dataset.__getitems__([3, 4])[0]["image"])


def test_validation_without_held_out_pictures_is_refused(trainer):
    from kdlit.losses import CrossEntropyLoss
    from kdlit.modules import ClassificationDistillation
    from tests.conftest import TinyNet

    module = ClassificationDistillation(TinyNet(), {"ce": CrossEntropyLoss()}, input_size=(3, 8, 8))
    with pytest.raises(ValueError, match="nothing to validate on: val_size is 0"):
        trainer().validate(module, TinyData(val_size=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be >= 0, got -1"),
        ({"val_size": -1}, "val_size must be >= 0, got -1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be >= 1"),
        ({"subset": 0}, r"subset must lie in \(0, 1\], got 0"),
        ({"subset_by": len}, "subset=1 keeps all; set subset below 1"),
        ({"label_noise": 1.0}, r"label_noise must lie in \[0, 1\), got 1.0"),
        ({"auto_augment": True, "transforms": [nn.Identity()]}, "exclude each other"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        TinyData(**settings)


def test_batches_larger_than_the_data_are_refused():
    with pytest.raises(ValueError, match="batch_size is 100, but only 64 training pictures"):
        ready(batch_size=100)
    with pytest.raises(ValueError, match="batch_size is 16, but only 6 training pictures"):
        ready(subset=0.1)


def test_a_ranking_must_score_every_picture():
    data = ready(subset=0.5, subset_by=lambda pictures: torch.zeros(3))
    with pytest.raises(ValueError, match=r"one score for each of 64 training pictures, but gave shape \(3,\)"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="keep must be 'most' or 'least', got 'all'"):
        TeacherConfidence(Bright(), "all")


def test_a_validation_part_of_its_own_leaves_nothing_to_hold_out():
    class ThreeParts(TinyData):
        def load(self):
            return super().load() | {"val": self._draw(10, 5)}

    data = ThreeParts(val_size=0)
    data.setup("fit")
    assert len(data.datasets["val"]) == 10
    with pytest.raises(ValueError, match="validation part of its own, so val_size must be 0"):
        ThreeParts(val_size=8).setup("fit")


class Broken(TinyData):
    def __init__(self, train):
        super().__init__(val_size=0, batch_size=1)
        self.train = train

    def load(self):
        self.class_names = list("abcde")
        return {"train": self.train, "test": self._draw(10, 0)}


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (
            Pictures(torch.zeros(2, 3, 8, 8), torch.tensor([0, 5])),
            r"must lie in 0\.\.4 \(5 classes are named\), .* 0\.\.5",
        ),
        (Pictures(torch.zeros(2, 3, 8, 8), torch.tensor([-1, 0])), r"lie in -1\.\.0"),
        (Pictures(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])), "have 1 channels, but mean and std 3"),
        (Pictures(torch.zeros(0, 3, 8, 8), torch.zeros(0)), "the train data holds no picture"),
        (Pictures(torch.zeros(2, 3, 8, 8), torch.tensor([0])), "holds 2 pictures but 1 labels"),
    ],
)
def test_broken_data_is_refused_before_training(pictures, message):
    with pytest.raises(ValueError, match=message):
        Broken(pictures).setup("fit")
