"""Distil in the Hugging Face Trainer: `python examples/loops/hf_trainer.py --cache digits`.

`CachedDistillation` is a mixin for any `Trainer` with a `CachedDataset` as its training set. Accelerate calls
`set_epoch` on the dataset, so every epoch shows the next view.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from teacher_cache import CachedDataset, losses


class CachedDistillation:
    """Adds distillation from `teacher_logits` to the loss of a `Trainer`. In evaluation the labels alone count."""

    distill_weight, temperature = 0.9, 4.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        targets = inputs.get("teacher_logits")
        known = {name: inputs[name] for name in ("pixel_values", "labels")}
        outputs = model(**known)
        loss = outputs.loss
        if targets is not None:
            loss = loss + self.distill_weight * losses.kd(outputs.logits, targets, self.temperature)
        return (loss, outputs) if return_outputs else loss


class DistillationTrainer(CachedDistillation, Trainer):
    pass


def train(cache: str, epochs: int = 3, batch_size: int = 64, output_dir: str | None = None) -> dict[str, float]:
    """Train a small ResNet of transformers, and give the metrics of the test split."""
    data = CachedDataset(cache)
    torch.manual_seed(0)
    student = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 1, 1],
            layer_type="basic",
            downsample_in_first_stage=False,
            num_labels=len(data.class_names),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=output_dir or folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=256,
            learning_rate=4e-3,
            remove_unused_columns=False,  # teacher_logits is not an input of the model
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model=student,
            args=arguments,
            train_dataset=data,
            eval_dataset=data.test(),
            data_collator=data.collate_fn,
            compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(1) == found.label_ids))},
        )
        trainer.train()
        return trainer.evaluate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="digits", help="path, URL, name or fingerprint")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    print(f"test top-1 {train(given.cache, given.epochs, given.batch_size)['eval_accuracy']:.2%}")
