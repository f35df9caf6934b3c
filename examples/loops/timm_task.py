"""Distil a timm model with timm's own parts: `python examples/loops/timm_task.py --cache digits`.

`CachedDistillationTask` takes the place of `timm.task.LogitDistillationTask`, which runs a teacher in every step. It
is a `TrainingTask`, so timm's `train.py` can use it too: there a batch is a pair of tensors, which `pairs` makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import AverageMeter, accuracy
from torch import nn

from teacher_cache import CachedDataset, losses


class CachedDistillationTask(TrainingTask):
    """Cross-entropy with the labels and distillation from cached logits.

    `forward` takes images [B, 3, H, W] and one tensor [B, 1 + C]: the label, then the teacher's logits.
    """

    def __init__(
        self, student_model: nn.Module, *, distill_loss_weight: float = 0.9, temperature: float = 4.0, **options: object
    ) -> None:
        super().__init__(**options)
        self.trainable_module = student_model
        self.distill_loss_weight, self.temperature = distill_loss_weight, temperature

    def prepare_distributed(self, device_ids: list[int] | None = None, **options: object) -> CachedDistillationTask:
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **options
        )
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.trainable_module(input)
        task_loss = nn.functional.cross_entropy(output, target[:, 0].long())
        kd_loss = losses.kd(output, target[:, 1:], self.temperature)
        loss = task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


def pairs(loader: Iterable[dict[str, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches as timm's loops take them: images, and labels with the teacher's logits in one tensor."""
    for batch in loader:
        yield batch["pixel_values"], torch.cat([batch["labels"][:, None].float(), batch["teacher_logits"]], dim=1)


def train(cache: str, model: str = "resnet10t", epochs: int = 3, batch_size: int = 64) -> float:
    """Train a model of timm, and give its top-1 on the test split in per cent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    data = CachedDataset(cache)
    student = timm.create_model(model, num_classes=len(data.class_names))
    student = student.to(device, memory_format=torch.channels_last)  # a third faster on a CPU
    task = CachedDistillationTask(student, device=device)
    loader = data.loader(batch_size)
    optimizer = create_optimizer_v2(student, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    for epoch in range(epochs):
        loss = train_epoch(task, loader, optimizer, scheduler, epoch, device)
        print(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}")
    student.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for batch in torch.utils.data.DataLoader(data.test(), batch_size=256, collate_fn=data.collate_fn):
            (right,) = accuracy(student(batch["pixel_values"].to(device)), batch["labels"].to(device), topk=(1,))
            top1.update(right.item(), len(batch["labels"]))
    return float(top1.avg)


def train_epoch(
    task: CachedDistillationTask,
    loader: torch.utils.data.DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    epoch: int,
    device: torch.device,
) -> float:
    """Train for an epoch as timm's `train.py` does, and give the mean loss."""
    meter = AverageMeter()
    for update, (images, target) in enumerate(pairs(loader), start=epoch * len(loader) + 1):
        result = task(images.to(device), target.to(device))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        scheduler.step_update(update)
        meter.update(result["loss"].item(), len(images))
    return float(meter.avg)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="digits", help="path, URL, name or fingerprint")
    parser.add_argument("--model", default="resnet10t", help="a model of timm")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    print(f"test top-1 {train(given.cache, given.model, given.epochs, given.batch_size):.2f}%")
