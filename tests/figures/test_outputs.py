"""What networks say of the pictures of a data module."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kdlit.data import DigitPairs, NetworkInput
from kdlit.figures import NetworkOutputs, Outputs, draw_entropy_histogram, entropy_histogram, outputs_of
from kdlit.models import digit_pairs_teacher
from tests.conftest import TinyData, TinyNet
from tests.figures.conftest import made_up


class Plain(L.LightningDataModule):
    """Somebody's own data: pictures in the order of their classes, whose first pixel is their number."""

    def __init__(self, batches="tuple", size=30):
        super().__init__()
        image = torch.zeros(size, 3, 8, 8)
        image[:, 0, 0, 0] = torch.arange(size)
        self.data, self.batches = TensorDataset(image, torch.arange(size) // 6), batches

    def loader(self):
        if self.batches == "dictionary":
            return DataLoader(
                self.data,
                batch_size=7,
                collate_fn=lambda rows: {
                    "image": torch.stack([r[0] for r in rows]),
                    "target": torch.stack([r[1] for r in rows]),
                },
            )
        if self.batches == "unlabelled":
            return DataLoader(TensorDataset(self.data.tensors[0]), batch_size=7)
        if self.batches == "endless":
            return DataLoader(Endless(self.data), batch_size=7)
        return DataLoader(self.data, batch_size=7)

    def test_dataloader(self):
        return self.loader()

    def val_dataloader(self):
        return []


class Endless(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        number = 0
        while True:
            yield self.data[number % len(self.data)]
            number += 1


class Echo(nn.Module):
    """Gives the first pixel as every logit."""

    def __init__(self, classes=5):
        super().__init__()
        self.fc = nn.Linear(1, classes, bias=False)
        nn.init.ones_(self.fc.weight)

    def forward(self, image):
        return self.fc(image[:, 0, 0, :1])


@pytest.mark.parametrize("kind", ["tuple", "dictionary"])
def test_any_data_module_is_shown_in_order(kind):
    outputs = outputs_of(Echo(), Echo(), Plain(kind), pictures=None)
    assert outputs.students["student"].logits[:, 3].tolist() == list(range(30))
    assert outputs.target.tolist() == [number // 6 for number in range(30)]
    assert outputs.index.tolist() == list(range(30))
    assert outputs.teacher.features[:, 0].tolist() == list(range(30))
    assert (outputs.description, outputs.class_names[4]) == ("30 test pictures", "4")


def test_what_a_data_module_does_to_a_batch_on_its_way_is_done():
    class Doubling(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    said = outputs_of(Echo(), Echo(), Doubling(), pictures=None)
    assert said.students["student"].logits[:, 0].tolist() == list(range(0, 60, 2))


def test_some_pictures_are_drawn_from_all_of_them_and_are_always_the_same():
    first, again = (outputs_of(Echo(), Echo(), Plain(), pictures=12) for _ in range(2))
    assert first.index.equal(again.index)
    assert first.index.tolist() == first.teacher.logits[:, 0].int().tolist()
    assert len(first) == 12
    assert len(first.target.unique()) > 3
    assert first.description == "12 of 30 test pictures"
    endless = outputs_of(Echo(), Echo(), Plain("endless"), pictures=40)
    assert (len(endless), endless.available) == (40, None)


def test_networks_are_given_back_as_they_were():
    student, teacher = TinyNet(), TinyNet().eval()
    student.bn.eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    outputs = outputs_of(student, teacher, TinyData())
    assert (student.training, student.bn.training, teacher.training) == (True, False, False)
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())
    assert not student.fc._forward_pre_hooks
    assert state.equal(torch.get_rng_state())
    assert outputs.teacher.features.shape == (40, 8)
    data = TinyData()
    data.setup("test")
    (batch,) = data.test_dataloader()
    with torch.no_grad():
        assert outputs.teacher.logits.equal(teacher(batch["image"]))


def test_training_pictures_come_without_augmentation_and_evenly_over_the_classes():
    data = TinyData(val_size=0)
    first, again = (outputs_of(Echo(), Echo(), data, split="train", pictures=25) for _ in range(2))
    assert first.teacher.logits.equal(again.teacher.logits)
    assert first.target.bincount().tolist() == [5] * 5
    pixel = data.datasets["train"].pictures.image[first.index][:, 0, 0, 0]
    torch.testing.assert_close(first.teacher.logits[:, 0], pixel / 255 * 4 - 2)
    assert data.datasets["train"].augmented
    assert len(outputs_of(Echo(), Echo(), data, split="train", pictures=None)) == 96


def test_the_teacher_gets_its_own_form_of_the_pictures():
    data = TinyData(teacher_input=NetworkInput(mean=(0.0,) * 3, std=(1.0,) * 3))
    outputs = outputs_of(Echo(), Echo(), data)
    torch.testing.assert_close(outputs.students["student"].logits, outputs.teacher.logits * 4 - 2)


def test_networks_run_in_their_own_precision():
    outputs = outputs_of({"half": TinyNet().bfloat16(), "double": TinyNet().double()}, TinyNet(), TinyData())
    assert outputs.students["half"].logits.dtype == torch.float32
    assert outputs.students["double"].logits.dtype == torch.float64
    assert draw_entropy_histogram(outputs).caption


def test_both_forms_of_a_figure_are_the_same():
    student, teacher, data = TinyNet(), TinyNet(), TinyData()
    from_networks = entropy_histogram(student, teacher, data, split="val", pictures=20, bins=7)
    assert (
        from_networks.caption
        == draw_entropy_histogram(outputs_of(student, teacher, data, split="val", pictures=20), bins=7).caption
    )
    assert "20 of 32 val pictures" in from_networks.caption
    with pytest.raises(TypeError, match="unexpected keyword argument 'bin'"):
        entropy_histogram(student, teacher, data, bin=7)
    assert "student: a network" in entropy_histogram.__doc__


def test_the_quickstart_teacher_is_as_accurate_as_recorded():
    outputs = outputs_of(digit_pairs_teacher(), digit_pairs_teacher(), DigitPairs(test_size=500))
    assert (outputs.teacher.logits.argmax(1) == outputs.target).double().mean() > 0.96
    assert outputs.class_names[7] == "07"
    assert outputs.teacher.features.shape == (500, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": TinyNet(4)}, "student 'student' gives 4 logits, but its teacher 5"),
        ({"student": {}}, "there is no student"),
        ({"student": {"teacher": TinyNet()}}, "no student may be labelled 'teacher'"),
        ({"teacher": None}, "a teacher is needed"),
        ({"split": "tset"}, "split must be one of train, val, test, predict, got 'tset'"),
        ({"pictures": 0}, "pictures must be at least 1 or None, got 0"),
        ({"data": Plain(), "split": "val"}, "Plain has no val pictures; take another split"),
        ({"data": TinyData(val_size=0), "split": "val"}, "TinyData has no val pictures; take another split"),
        ({"data": Plain("unlabelled")}, "the test pictures have no labels"),
        ({"student": TinyNet(3), "teacher": TinyNet(3)}, r"target must lie in 0\.\.2"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"student": TinyNet(), "teacher": TinyNet(), "data": TinyData()} | change
    with pytest.raises(ValueError, match=message):
        outputs_of(given.pop("student"), given.pop("teacher"), given.pop("data"), **given)


def test_logits_that_are_not_finite_are_named():
    broken = TinyNet()
    nn.init.constant_(broken.fc.bias, torch.nan)
    with pytest.raises(ValueError, match="network 'DKD': logits must be finite, got nan at sample 0, class 0"):
        outputs_of({"KD": TinyNet(), "DKD": broken}, TinyNet(), TinyData())


def test_rows_and_classes_that_are_not_there_are_named(outputs):
    few = outputs.some(10)
    assert few.target.bincount().tolist() == [2] * 5
    assert few.row(int(few.index[3])) == 3
    assert outputs.some(1000) is outputs
    with pytest.raises(ValueError, match="sample 77 is not among the 40 of 100 test pictures, which lie at 0 to 39"):
        outputs.row(77)
    with pytest.raises(ValueError, match="there is no class 'leopard'; the 5 classes are class 0, class 1"):
        outputs.class_index("leopard")
    with pytest.raises(ValueError, match="there is no class 5"):
        outputs.class_index(5)
    with pytest.raises(ValueError, match="class_names must name 5 classes, got 1"):
        made_up(class_names=["one"])
    with pytest.raises(ValueError, match=r"index must have the shape of target, \(40,\), got \(3,\)"):
        made_up(index=torch.arange(3))
    with pytest.raises(ValueError, match="network 'teacher' gives features that are not finite"):
        made_up(teacher=NetworkOutputs(outputs.teacher.logits, torch.full((40, 2), torch.inf)))
    with pytest.raises(ValueError, match="there is no test picture"):
        Outputs({"a": outputs.teacher}, outputs.teacher, torch.empty(0, dtype=torch.int64), [], "test", torch.empty(0))
