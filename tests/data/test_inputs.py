"""Pictures in the size and statistics of each network."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torchvision.transforms.functional as per_picture
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from kdlit.data import NetworkInput
from kdlit.losses import CrossEntropyLoss, KDLoss, MLKDTwoViewLoss
from kdlit.modules import ClassificationDistillation
from tests.conftest import TinyData, TinyNet

PICTURES = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalisation_equals_scaling_then_subtracting():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = per_picture.normalize(PICTURES.float() / 255, mean, std)
    assert torch.allclose(NetworkInput(mean, std).training(PICTURES), expected, atol=1e-6)
    kept = PICTURES.float()
    NetworkInput(mean, std).normalize(kept)
    assert torch.equal(kept, PICTURES.float())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_evaluation_scales_and_cuts_as_torchvision_does(interpolation):
    network = NetworkInput((0.5,) * 3, (0.5,) * 3, size=14, interpolation=interpolation, resize=16)
    mode = v2.InterpolationMode(interpolation)
    recipe = v2.Compose([v2.Resize(16, interpolation=mode, antialias=True), v2.CenterCrop(14)])
    expected = (recipe(PICTURES).float() / 255 - 0.5) / 0.5
    assert torch.allclose(network.evaluation(PICTURES), expected, atol=1e-6)
    assert torch.allclose(network.evaluation(list(PICTURES)), expected, atol=1e-6)


def test_training_scales_to_a_square():
    assert NetworkInput((0.5,) * 3, (0.5,) * 3, size=12).training(PICTURES).shape == (5, 3, 12, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "one value a channel"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"mean": (125.3, 123.0, 113.9)}, "divide them by 255"),
        ({"size": 0}, "size must be >= 1, got 0"),
        ({"size": 8, "resize": 7}, "resize must be >= size, got resize 7 and size 8"),
        ({"resize": 7}, "resize must be >= size"),
        ({"interpolation": "cubic"}, "cubic"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NetworkInput(**({"mean": (0.5,) * 3, "std": (0.5,) * 3} | settings))


TEACHER = NetworkInput((0.0,) * 3, (1.0,) * 3, size=4)


def ready(**kwargs):
    data = TinyData(teacher_input=TEACHER, **kwargs)
    data.setup("fit")
    return data


def test_teacher_and_student_see_the_same_augmented_picture_each_in_its_own_form():
    batch = next(iter(ready(strong_view=True).train_dataloader()))
    for student, teacher in (("image", "image_teacher"), ("image_strong", "image_teacher_strong")):
        assert batch[student].shape == (16, 3, 8, 8)
        assert batch[teacher].shape == (16, 3, 4, 4)
        pixels = (batch[student] * 0.25 + 0.5) * 255
        expected = v2.functional.resize(pixels.round().to(torch.uint8), [4, 4], antialias=True)
        assert torch.allclose(batch[teacher] * 255, expected.float(), atol=1e-3)


class Recorder(TinyNet):
    """Remembers the shapes of what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, image):
        self.seen.add(tuple(image.shape[1:]))
        return super().forward(image)


def test_each_network_is_given_its_own_pictures_in_training_and_evaluation(trainer):
    student, teacher = Recorder(), Recorder()
    module = ClassificationDistillation(
        student,
        {"mlkd": MLKDTwoViewLoss()},
        teacher,
        input_size=(3, 8, 8),
        teacher_input_size=(3, 4, 4),
    )
    data = TinyData(teacher_input=TEACHER, strong_view=True)
    fitting = trainer()
    fitting.fit(module, data)
    fitting.test(module, data, verbose=False)
    assert student.seen == {(3, 8, 8)}
    assert teacher.seen == {(3, 4, 4)}


def test_the_teachers_accuracy_is_that_on_its_own_pictures(trainer):
    """With wrong statistics the teacher's accuracy would be another, which is the classic silent error."""

    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image):
            level = (image.mean((1, 2, 3)) * 255 - 20) / 45
            return -self.scale * (level[:, None] - torch.arange(5.0)).square()

    module = ClassificationDistillation(
        TinyNet(), {"kd": KDLoss()}, Brightness(), input_size=(3, 8, 8), teacher_input_size=(3, 4, 4)
    )
    fitting = trainer()
    fitting.test(module, TinyData(teacher_input=TEACHER), verbose=False)
    assert fitting.callback_metrics["test/teacher_top1"] == 1.0
    module = ClassificationDistillation(TinyNet(), {"kd": KDLoss()}, Brightness(), input_size=(3, 8, 8))
    fitting.test(module, TinyData(), verbose=False)
    assert fitting.callback_metrics["test/teacher_top1"] < 0.5


def test_a_teacher_with_an_input_of_its_own_does_not_silently_get_the_students(trainer):
    module = ClassificationDistillation(
        TinyNet(), {"kd": KDLoss()}, TinyNet(), input_size=(3, 8, 8), teacher_input_size=(3, 4, 4)
    )
    with pytest.raises(ValueError, match=r"no image_teacher, only .*; set --data.teacher_input"):
        trainer().fit(module, TinyData())


def test_a_teacher_that_cannot_take_its_pictures_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"teacher .* cannot take pictures of input_size \(1, 4, 4\)"):
        ClassificationDistillation(
            TinyNet(), {"kd": KDLoss()}, TinyNet(), input_size=(3, 8, 8), teacher_input_size=(1, 4, 4)
        )


def test_a_users_batches_may_hold_the_teachers_pictures(trainer):
    class Mine(L.LightningDataModule):
        def train_dataloader(self):
            batch = {
                "image": torch.rand(4, 3, 8, 8),
                "image_teacher": torch.rand(4, 3, 16, 16),
                "target": torch.arange(4),
            }
            return DataLoader([batch], batch_size=None)

    teacher = Recorder()
    module = ClassificationDistillation(
        TinyNet(), {"ce": CrossEntropyLoss(), "kd": KDLoss()}, teacher, input_size=(3, 8, 8)
    )
    teacher.seen.clear()
    trainer().fit(module, Mine())
    assert teacher.seen == {(3, 16, 16)}
