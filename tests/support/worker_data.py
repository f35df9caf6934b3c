"""A dataset that holds everything of a cache that training code may hold, for the workers of a DataLoader."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from cache_tools.images.image_set import ImageSet
from cache_tools.reader import TeacherCache


class EverythingOf(Dataset[dict[str, torch.Tensor]]):
    """Rows from a view that was loaded before, from one loaded in the worker, and from plain reads in the worker."""

    def __init__(self, cache: TeacherCache, images: ImageSet) -> None:
        self.cache, self.images, self.view = cache, images, cache.load_view(1)

    def __len__(self) -> int:
        return self.cache.num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        found = {
            "before": self.view.logits([sample])[0],
            "here": self.cache.load_view(1).logits([sample])[0],
            "key": torch.from_numpy(self.cache.sample_keys[sample]),
            "pixels": torch.from_numpy(self.images.load(np.array([sample])))[0],
        }
        if self.cache.recipe.store == "components":
            found["teacher"] = self.view.teacher_logits([sample])[0]
            found["read"] = torch.from_numpy(self.cache.read_array("clip_features", 2, slice(sample, sample + 1)))[0]
        else:
            found["read"] = torch.from_numpy(self.cache.read_array("fused_features", 2, slice(sample, sample + 1)))[0]
        return found
