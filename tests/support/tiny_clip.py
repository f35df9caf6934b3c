"""A CLIP with random weights, small enough to create one in every test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NORMALISATION = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3]}


def make_folder(folder: Path, **changes: Any) -> Path:
    """Write a CLIP with random weights in open_clip's local-dir format."""
    folder.mkdir()
    config = CONFIG | changes
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": NORMALISATION | {"interpolation": "bicubic"}})
    )
    torch.manual_seed(0)
    plain = {key: value for key, value in config.items() if key != "custom_text"}
    custom = config.get("custom_text", False)
    network = open_clip.CustomTextCLIP(**plain) if custom else open_clip.CLIP(**plain)
    with torch.no_grad():
        network.logit_scale.fill_(np.log(37.0))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder
