"""Splits, loaders and what a data module refuses."""

from __future__ import annotations

import pytest
import torch

from kdlit.data.base import Pictures, hold_out
from tests.conftest import TinyData


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


def test_workers_give_the_same_pictures_for_evaluation():
    alone, helped = ready(), ready(num_workers=2)
    for a, b in zip(alone.test_dataloader(), helped.test_dataloader(), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["target"], b["target"])


def test_single_samples_can_be_read_too():
    dataset = ready().test_dataloader().dataset
    sample = dataset[3]
    assert sample["image"].shape == (3, 8, 8)
    assert torch.equal(sample["image"], dataset.__getitems__([3, 4])["image"][0])


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
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        TinyData(**settings)


def test_batches_larger_than_the_data_are_refused():
    with pytest.raises(ValueError, match="batch_size is 100, but only 64 training pictures"):
        ready(batch_size=100)


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
