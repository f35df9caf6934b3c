"""The batches of every epoch: pixels, labels, sample indices and targets, from memory, a file or the decoder."""

from train.feed.base import Feed, batch_bounds, epoch_order, pair_order
from train.feed.batch import Batch, BatchTargets, MixedLabels, NoTargets, TargetSource, ViewSource, WindowSource
from train.feed.resident import HostFeed, ResidentFeed
from train.feed.streaming import StreamingFeed
from train.feed.targets import CachedTargets, CachedView
from train.feed.tiers import MEMORY_SHARE, Tier, choose_tier, memory_shares, open_feed
from train.feed.windows import mixed_seed

__all__ = [
    "MEMORY_SHARE",
    "Batch",
    "BatchTargets",
    "CachedTargets",
    "CachedView",
    "Feed",
    "HostFeed",
    "MixedLabels",
    "NoTargets",
    "ResidentFeed",
    "StreamingFeed",
    "TargetSource",
    "Tier",
    "ViewSource",
    "WindowSource",
    "batch_bounds",
    "choose_tier",
    "epoch_order",
    "memory_shares",
    "mixed_seed",
    "open_feed",
    "pair_order",
]
