"""Distil with Lightning: `python examples/loops/lightning_module.py --cache digits`.

The module and the data module are short enough to copy. Lightning calls `set_epoch` on the loader's batch
sampler, so every epoch shows the next view.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F

from teacher_cache import CachedDataset, create_student, losses


class CachedDistillationModule(L.LightningModule):
    """A student, trained on labels and cached logits."""

    def __init__(self, student: str, num_classes: int, distill_weight: float = 0.9, temperature: float = 4.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student = create_student(student, num_classes=num_classes)
        self.distill_weight, self.temperature = distill_weight, temperature

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        logits = self.student(batch["pixel_values"])
        on_labels = F.cross_entropy(logits, batch["labels"])
        from_teacher = losses.kd(logits, batch["teacher_logits"], self.temperature)
        self.log_dict({"label_loss": on_labels, "kd_loss": from_teacher}, prog_bar=True)
        return on_labels + self.distill_weight * from_teacher

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        right = self.student(batch["pixel_values"]).argmax(1) == batch["labels"]
        self.log("test_top1", right.float().mean(), batch_size=len(right), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CachedDataModule(L.LightningDataModule):
    """The views of a cache for training, its test split for validation."""

    def __init__(self, cache: str, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.cache, self.batch_size, self.num_workers = cache, batch_size, num_workers

    def setup(self, stage: str) -> None:
        self.data = CachedDataset(self.cache)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return self.data.loader(self.batch_size * self.trainer.world_size, num_workers=self.num_workers, **ranks)

    def val_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(self.data.test(), batch_size=256, collate_fn=CachedDataset.collate_fn)


def train(cache: str, student: str = "resnet8", epochs: int = 3, batch_size: int = 64, **options: Any) -> float:
    """Train a student, and give its top-1 on the test split."""
    L.seed_everything(0)
    data = CachedDataModule(cache, batch_size)
    data.setup("fit")
    module = CachedDistillationModule(student, len(data.data.class_names))
    # The loader gives each rank its part already.
    trainer = L.Trainer(max_epochs=epochs, use_distributed_sampler=False, **options)
    trainer.fit(module, datamodule=data)
    return float(trainer.callback_metrics["test_top1"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="digits", help="path, URL, name or fingerprint")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    print(f"test top-1 {train(given.cache, given.student, given.epochs, given.batch_size):.2%}")
