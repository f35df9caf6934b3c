"""The batches of every epoch: pixels, labels, sample indices and targets, from device memory or streamed."""

from train.feed.base import Feed, batch_bounds, epoch_order, mixed_seed, pair_order
from train.feed.batch import Batch, BatchTargets, MixedLabels, NoTargets, TargetSource, ViewSource
from train.feed.choice import RESIDENT_SHARE, free_memory, open_feed
from train.feed.resident import ResidentFeed
from train.feed.streaming import StreamingFeed
from train.feed.targets import CachedTargets, CachedView

__all__ = [
    "RESIDENT_SHARE",
    "Batch",
    "BatchTargets",
    "CachedTargets",
    "CachedView",
    "Feed",
    "MixedLabels",
    "NoTargets",
    "ResidentFeed",
    "StreamingFeed",
    "TargetSource",
    "ViewSource",
    "batch_bounds",
    "epoch_order",
    "free_memory",
    "mixed_seed",
    "open_feed",
    "pair_order",
]
