r"""CRD: Tian, Krishnan and Isola, ICLR 2020, Contrastive Representation Distillation.

Student and teacher features are embedded on a sphere. Given one network's embedding of a picture (the anchor), the loss
tells the other network's embedding of the same picture from those of K other pictures, drawn from a memory that holds
one embedding of every training picture and network.

RepDistiller's code is followed: a normaliser that the first batch sets for good, 1e-7 under both logarithms, other
pictures of other classes only. It differs in two points:

- Negatives are drawn with replacement, as the paper's noise model has it; the code draws K different ones.
- The loss reads the memory and the normalisers; they move after the optimizer's step, with the embeddings the loss saw.

Nothing of shape ``(B, K + 1, D)`` is ever held: scores are taken piece by piece, forward and backward.

Several processes (DDP) each draw negatives for their own batch. Before the memory moves, the embeddings of all are put
together, so that all memories stay equal, and equal to that of one process that had seen the whole batch. The
normalisers are then those of the whole first batch; during that first step each process uses its own batch's. With
``WeightedLoss(..., gather=True)`` each process embeds and scores the whole batch: the first step is exact, too, and the
same embeddings, put together once more, move the memories to the same place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdlit.losses.feature import FeatureLoss, Shape
from kdlit.losses.functional import _values_are_cheap, check_one_of, check_positive, full_precision
from kdlit.losses.gathering import of_all_processes
from kdlit.losses.last_layer import single_layer, unit
from kdlit.models.layers import FeatureLayers
from kdlit.types import Batch, ModelOutput

EPS = 1e-7
PIECE = 2**24  # numbers in the largest intermediate result
DENSE = 32  # up to this many rows of memory for each that is scored, scoring all is faster (measured on a CPU)


@full_precision
def contrast_scores(
    anchor: Tensor, memory: Tensor, contrast_index: Tensor, *, temperature: float | Tensor = 0.07
) -> Tensor:
    r"""Scores of some rows of the memory: :math:`s_{bk} = \langle f_b, m_{j_{bk}} \rangle / \tau`.

    Args:
        anchor: :math:`f`, embeddings of one network, shape ``(B, D)``; the only input but the temperature that receives
            a gradient.
        memory: :math:`m`, embeddings of the other network, shape ``(N, D)``.
        contrast_index: :math:`j`, rows of the memory, int64, shape ``(B, K + 1)``.
        temperature: :math:`\tau > 0`.

    Returns:
        Shape ``(B, K + 1)``.

    Raises:
        ValueError: If the temperature is not positive or shapes do not fit.
    """
    check_positive("temperature", temperature)
    if anchor.shape[1:] != memory.shape[1:] or len(anchor) != len(contrast_index):
        raise ValueError(
            "anchor must have the width of memory and the batch of contrast_index, got shapes "
            f"{tuple(anchor.shape)}, {tuple(memory.shape)} and {tuple(contrast_index.shape)}"
        )
    scores: Tensor = _Scores.apply(anchor / temperature, memory.detach(), contrast_index)
    return scores


class _Scores(torch.autograd.Function):
    """Inner products of each anchor with its rows of the memory, without all these rows in one tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, memory: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(memory, index)
        if _is_dense(memory, index):
            pieces = [(a @ memory.T).gather(1, i) for a, i in _pieces(len(memory), anchor, index)]
        else:
            pieces = [
                (memory.index_select(0, i.flatten()).view(*i.shape, -1) @ a[:, :, None]).squeeze(2)
                for a, i in _pieces(index.shape[1] * memory.shape[1], anchor, index)
            ]
        return torch.cat(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        memory, index = ctx.saved_tensors
        if not _is_dense(memory, index):
            return F.embedding_bag(index, memory, per_sample_weights=grad, mode="sum"), None, None
        pieces = [
            grad.new_zeros(len(i), len(memory)).scatter_add_(1, i, g) @ memory
            for g, i in _pieces(len(memory), grad, index)
        ]
        return torch.cat(pieces), None, None


def _is_dense(memory: Tensor, index: Tensor) -> bool:
    return len(memory) <= DENSE * index.shape[1]


def _pieces(numbers: int, one: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Divide the batch, so that an intermediate result of so many numbers a sample stays below the limit."""
    size = max(1, PIECE // numbers)
    return zip(torch.split(one, size), torch.split(index, size), strict=True)


@full_precision
def log_normalizer(scores: Tensor, *, num_samples: int) -> Tensor:
    r"""Logarithm of :math:`Z = N \cdot \mathrm{mean}_{bk}\, e^{s_{bk}}`, without a graph.

    Args:
        scores: shape ``(B, K + 1)``.
        num_samples: :math:`N`, rows of the memory.
    """
    return scores.detach().logsumexp(dim=(0, 1)) + math.log(num_samples / scores.numel())


@full_precision
def crd_loss(scores: Tensor, log_z: Tensor, *, num_samples: int) -> Tensor:
    r"""Noise-contrastive loss of one network's anchors; the method adds those of both.

    .. math:: L = -\frac{1}{B} \sum_b \Big[ \log \frac{x_{b0}}{x_{b0} + c + \epsilon}
              + \sum_{k \geq 1} \log \frac{c}{x_{bk} + c + \epsilon} \Big], \quad
              x = e^s / Z, \; c = K / N

    computed from logarithms of all these, so that large scores do no harm.

    Args:
        scores: :math:`s`, from :func:`contrast_scores`, shape ``(B, K + 1)``; column 0 is the picture itself. Receives
            a gradient.
        log_z: :math:`\log Z`, a tensor of one number, a constant.
        num_samples: :math:`N`, rows of the memory.

    Returns:
        Scalar, at least 0.

    Example:
        >>> import torch
        >>> scores = torch.zeros(1, 2)  # the picture and one negative look alike: x = c = 1/2
        >>> crd_loss(scores, torch.tensor(2.0).log(), num_samples=2)  # -2 log 1/2
        tensor(1.3863)
    """
    negatives = scores.shape[1] - 1
    noise = negatives / num_samples
    log_ratio = scores - (log_z.detach() + math.log(noise + EPS))
    positive = F.softplus(-log_ratio[:, 0])
    negative = F.softplus(log_ratio[:, 1:]).sum(dim=1) + negatives * math.log1p(EPS / noise)
    return (positive + negative).mean()


class CRDLoss(FeatureLoss):
    """Contrastive representation distillation (Tian et al. 2020): see :func:`crd_loss`.

    Two linear layers (``embed_s``, ``embed_t``) are trained with the student. The memories and the normalisers are
    buffers, so a resumed run goes on with them. The memories start as the same random numbers in every run.

    Batches must hold ``index``. If it holds a picture twice, the last one counts for the memory.

    Args:
        student_layers: one layer with a feature of shape ``(B, D)``; None: what the student's classifier is given.
        teacher_layers: likewise of the teacher.
        feat_dim: width of the embeddings, > 0.
        negatives: how many negatives are drawn for each picture, > 0, with replacement.
        temperature: divides the inner products, > 0.
        momentum: share of the old embedding when the memory moves, from 0 to 1.
        num_samples: how many training pictures there are; None: as many as the data has labels.
        negatives_from: ``other_classes``, or ``other_samples`` for all pictures but the anchor's own, which is all
            there is where the data does not tell its labels.

    Raises:
        ValueError: If an argument is out of its range; at :meth:`setup`, if a layer gives another shape; at
            :meth:`on_fit_start`, if the number of training pictures is unknown or contradicted, or there are no
            negatives.
    """

    memory_student: Tensor
    memory_teacher: Tensor
    log_z_student: Tensor
    log_z_teacher: Tensor
    _by_class: Tensor
    _class_start: Tensor
    _class_size: Tensor
    across_batch = True

    def __init__(
        self,
        student_layers: Sequence[str] | str | None = None,
        teacher_layers: Sequence[str] | str | None = None,
        feat_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        num_samples: int | None = None,
        negatives_from: str = "other_classes",
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        check_one_of("negatives_from", negatives_from, ("other_classes", "other_samples"))
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum!r}")
        self.feat_dim = check_positive("feat_dim", feat_dim)
        self.negatives = check_positive("negatives", negatives)
        self.temperature = check_positive("temperature", temperature)
        self.momentum = momentum
        self.num_samples = num_samples
        self.negatives_from = negatives_from
        self._seen: tuple[Tensor, ...] | None = None  # what forward computed and the memories have not taken in yet
        self._start_memory(0)
        if num_samples is not None:
            self.on_fit_start(None)

    def default_layers(self, layers: FeatureLayers) -> Sequence[str]:
        """The pooled feature."""
        return (layers.pool,)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        """Make the embeddings."""
        (_, student_width), (_, teacher_width) = single_layer(self, student, teacher, "(B, D)")
        self.embed_s = nn.Linear(student_width, self.feat_dim)
        self.embed_t = nn.Linear(teacher_width, self.feat_dim)

    # The memory

    def on_fit_start(self, target: Tensor | None) -> None:
        """Size the memory, unless it has that size already, and learn which pictures are of other classes."""
        if target is None and self.num_samples is None:
            raise ValueError(
                "CRDLoss needs num_samples, the number of training pictures: the data does not tell its labels "
                "(train_target)"
            )
        size = len(target) if target is not None else self.num_samples or 0
        if self.num_samples not in (None, size):
            raise ValueError(f"num_samples is {self.num_samples}, but the data has {size} training pictures")
        if size < 2:
            raise ValueError(f"num_samples must be at least 2, got {size}")
        if size != len(self.memory_student):
            self._start_memory(size)
        if target is None or self.negatives_from == "other_samples":
            target = torch.arange(size)  # each picture a class of its own
        # The pictures of a class are one block of _by_class; negatives are all but one block.
        _, label, count = torch.unique(target.cpu(), return_inverse=True, return_counts=True)
        if len(count) < 2:
            raise ValueError(f"CRDLoss has no negatives: all {size} training pictures are of one class")
        start = count.cumsum(0) - count
        for name, table in (
            ("_by_class", label.argsort(stable=True)),
            ("_class_start", start[label]),
            ("_class_size", count[label]),
        ):
            self.register_buffer(name, table.to(self.memory_student.device), persistent=False)

    def _start_memory(self, size: int) -> None:
        old = getattr(self, "memory_student", torch.empty(0))
        # A generator of its own, so that all processes start alike and a resumed run draws nothing more than others.
        generator = torch.Generator().manual_seed(0)
        bound = math.sqrt(3 / self.feat_dim)
        for name in ("student", "teacher"):
            memory = torch.empty(size, self.feat_dim).uniform_(-bound, bound, generator=generator)
            self.register_buffer(f"memory_{name}", memory.to(old))
            self.register_buffer(f"log_z_{name}", torch.full((), torch.nan).to(old))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """An empty memory takes on the size of the one that is loaded."""
        for name in ("memory_student", "memory_teacher"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and not len(own):
                self.register_buffer(name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def contrast(self, index: Tensor) -> Tensor:
        """Draw negatives for some pictures, uniformly and on the device of ``index``.

        Args:
            index: positions of the pictures, int64, shape ``(B,)``.

        Returns:
            Rows of the memory, int64, shape ``(B, negatives + 1)``; column 0 is ``index``.
        """
        start, size = self._class_start[index, None], self._class_size[index, None]
        draws = torch.randint(2**62, (len(index), self.negatives), device=index.device)
        draws %= len(self._by_class) - size
        draws += size * (draws >= start)
        return torch.cat([index[:, None], self._by_class[draws]], dim=1)

    # The loss

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Scalar loss of one batch: the sum over both networks' anchors."""
        index, size = self._checked(batch["index"]), len(self.memory_student)
        f = unit(self.embed_s(student.features[self.student_layers[0]]))
        g = unit(self.embed_t(teacher.features[self.teacher_layers[0]].detach()))
        contrast_index = self.contrast(index)
        loss, log_z = f.new_zeros(()), []
        for anchor, memory, known in (
            (f, self.memory_teacher, self.log_z_student),
            (g, self.memory_student, self.log_z_teacher),
        ):
            scores = contrast_scores(anchor, memory, contrast_index, temperature=self.temperature)
            log_z.append(torch.where(known.isnan(), log_normalizer(scores, num_samples=size), known))
            loss = loss + crd_loss(scores, log_z[-1], num_samples=size)
        if self.training:
            self._seen = (index, f.detach(), g.detach(), torch.stack(log_z))
        return loss

    def _checked(self, index: Tensor) -> Tensor:
        size = len(self.memory_student)
        if not size:
            raise RuntimeError("on_fit_start must be called before the first batch: it sizes the memory")
        if _values_are_cheap(index) and not 0 <= index.min() <= index.max() < size:
            raise ValueError(
                f"batch['index'] must lie in 0..{size - 1} (there are {size} training pictures), got "
                f"{index.min().item()}..{index.max().item()}"
            )
        return index

    @torch.no_grad()
    def on_train_batch_end(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> None:
        """Move the memories towards the embeddings that :meth:`forward` computed, those of all processes."""
        if self._seen is None:
            return
        (index, f, g, log_z), self._seen = self._seen, None
        index, f, g, log_z = of_all_processes(index, f, g, log_z.expand(len(index), -1))
        largest = log_z.amax(dim=0)
        log_z = largest + (log_z - largest).exp().mean(dim=0).log()  # that of the whole batch
        last = _last_of_each(index)  # where a picture is there twice, both write the same: their order is no matter
        for memory, embedding in ((self.memory_student, f), (self.memory_teacher, g)):
            mixed = self.momentum * memory[index] + (1 - self.momentum) * embedding[last].to(memory)
            memory.index_copy_(0, index, unit(mixed))
        for known, value in zip((self.log_z_student, self.log_z_teacher), log_z, strict=True):
            known.copy_(torch.where(known.isnan(), value, known))


def _last_of_each(index: Tensor) -> Tensor:
    """For each place, the last place that holds the same number."""
    order = index.argsort(stable=True)
    return order[torch.searchsorted(index[order], index, right=True) - 1]
