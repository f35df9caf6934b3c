"""Run a recipe: train to the last epoch in a folder of its own, and store the result."""

from train.run.state import Run
from train.run.train import claimed_run, print_served, print_stage, run_device, train_group, train_on, train_student

__all__ = [
    "Run",
    "claimed_run",
    "print_served",
    "print_stage",
    "run_device",
    "train_group",
    "train_on",
    "train_student",
]
