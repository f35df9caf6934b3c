"""Train a small CLIP on a dataset and write it in open_clip's own `local-dir:` format.

    python examples/train_clip.py digits --samples 720 --out runs/digits-clip                  # half a minute
    python examples/train_clip.py fashion-mnist --samples 20000 --out runs/fashion-mnist-clip  # two to three minutes

It is open_clip's CLIP class with a narrow ModifiedResNet and a two-layer text transformer, trained from scratch and
contrastively on images and captions ("a blurry photo of a sandal"). Only its size differs from other CLIPs: the whole
pipeline can be run, tested and understood without a download.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts, for reproducible matrix products

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file

from cache_tools.config import Frozen, validate
from cache_tools.console import Progress, command, resolve_device
from cache_tools.errors import DataError, RecipeError
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.preprocess import prepare
from cache_tools.views import Flip, PadCrop, ViewRecipe
from pipeline.networks.prompts import prompt_class_name, render_prompts, template_set

CONTEXT_LENGTH = 24  # tokens; the longest prompt has about 15
MAX_LOGIT_SCALE = 100.0
WEIGHTS_FILE, CONFIG_FILE, REPORT_FILE = "open_clip_model.safetensors", "open_clip_config.json", "training.json"


def main(
    dataset: Annotated[
        str, typer.Argument(help="digits, fashion-mnist, cifar10, cifar100, or a folder of class folders")
    ],
    out: Annotated[Path, typer.Option(help="folder to write; use it as local-dir:OUT")],
    data_dir: Annotated[Path | None, typer.Option(help="where the dataset's files are")] = None,
    download: Annotated[bool, typer.Option("--download", help="download the dataset if it is missing")] = False,
    image_size: Annotated[int | None, typer.Option(help="canvas side for a folder, a multiple of 32")] = None,
    samples: Annotated[int | None, typer.Option(help="train on this many images, chosen by the seed", min=2)] = None,
    epochs: Annotated[int | None, typer.Option(help="default: 30 000 images seen, at least 10 epochs", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    learning_rate: Annotated[float, typer.Option()] = 2e-3,
    weight_decay: Annotated[float, typer.Option()] = 0.05,
    width: Annotated[int, typer.Option(help="width of the vision tower; CLIP RN50 has 64", min=2)] = 12,
    embed_dim: Annotated[int, typer.Option(help="dimension of the common embedding space", min=2)] = 64,
    templates: Annotated[str, typer.Option(help="richkd, openai, siglip, or a file")] = "richkd",
    padding: Annotated[int, typer.Option(help="padding of the random pad-crop", min=0)] = 4,
    flip: Annotated[bool | None, typer.Option(help="random mirroring; default: yes, except for digits")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Train a small CLIP on labelled images; captions are prompt templates filled with class names."""
    recipe = dataset_recipe(dataset, data_dir, download, image_size)
    target = resolve_device(device)
    images = open_images(recipe)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:samples])
    plan = Plan(
        dataset=recipe.name,
        num_samples=len(chosen),
        epochs=epochs or max(10, math.ceil(30_000 / len(chosen))),
        batch_size=min(batch_size, len(chosen)),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        templates=template_set(templates),
        views=ViewRecipe(base_seed=seed, ops=view_ops(padding, recipe.name != "digits" if flip is None else flip)),
        preprocessing=Preprocessing(mean=recipe.normalisation[0], std=recipe.normalisation[1]),
        seed=seed,
    )
    config = model_config(images.image_size, embed_dim, width)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config).to(target)
    fit(model, images, chosen, plan)
    elapsed_s = time.monotonic() - start
    write(model, config, plan.preprocessing, out)
    size_mb = (out / WEIGHTS_FILE).stat().st_size / 1e6
    print(f"{out}: {len(chosen):,} images × {plan.epochs} epochs in {elapsed_s:.0f} s, {size_mb:.1f} MB")
    report = plan.model_dump(mode="json") | {"torch": torch.__version__, "open_clip": open_clip.__version__}
    if recipe.test_split is not None:
        test = open_images(recipe, recipe.test_split)
        report["test_top1"] = zero_shot_top1(out, test, plan.templates, target)
        print(f"zero-shot top-1 on {len(test):,} test images: {report['test_top1']:.2%}")
    (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class Plan(Frozen):
    """The settings that, with the config, determine the weights; stored beside them."""

    dataset: str
    num_samples: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    templates: tuple[str, ...]
    views: ViewRecipe
    preprocessing: Preprocessing
    seed: int


def dataset_recipe(dataset: str, data_dir: Path | None, download: bool, image_size: int | None) -> DatasetRecipe:
    """The recipe of a named dataset or a folder; a folder without `train` is one split without a test split."""
    fields: dict[str, Any] = {"name": dataset, "data_dir": data_dir, "download": download, "image_size": image_size}
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        fields |= {"name": "folder", "data_dir": folder}
        fields |= {"test_split": "test" if (folder / "test").is_dir() else None}
    return validate(DatasetRecipe, fields, where=dataset)


def model_config(image_size: tuple[int, int], embed_dim: int, width: int) -> dict[str, Any]:
    """open_clip's `model_cfg`: a ModifiedResNet, which halves the canvas five times, and a text transformer.

    The text tower is narrow because the embeddings of the tokenizer's 49 408 tokens are most of the file.
    """
    if image_size[0] % 32:
        raise RecipeError(
            "the vision tower does not accept this canvas",
            expected="a multiple of 32 pixels",
            found=image_size[0],
            next_step="set --image-size",
        )
    vision = {
        "image_size": image_size[0],
        "layers": [1, 1, 1, 1],
        "width": width,
        "head_width": 2 * width,
        "patch_size": None,
    }
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}


def view_ops(padding: int, flip: bool) -> tuple[PadCrop | Flip, ...]:
    return (*((PadCrop(padding=padding),) if padding else ()), *((Flip(),) if flip else ()))


def fit(model: open_clip.CLIP, images: ImageSet, chosen: np.ndarray, plan: Plan) -> None:
    """Train contrastively on the samples `chosen`: epoch e uses view e, and each image has one caption of its class.

    The seed determines which sample, view and caption are combined. It also determines the weights on one machine with
    one thread count; between machines their last bits differ.
    """
    device = model.logit_scale.device
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    captions = tokenizer(render_prompts(plan.templates, images.class_names)).to(device)  # [P · C, tokens]
    zero_unused_tokens(model, captions)
    steps = len(chosen) // plan.batch_size
    groups = parameter_groups(model, plan.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)
    total = plan.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, plan.learning_rate, total_steps=total, pct_start=0.15)
    random = np.random.default_rng((plan.seed, 1))
    model.train()
    with Progress("fitting CLIP", total * plan.batch_size, "images") as progress:
        for epoch in range(plan.epochs):
            order = random.permutation(chosen)
            for step in range(steps):
                index = order[step * plan.batch_size : (step + 1) * plan.batch_size]
                labels = images.labels[index]
                caption = random.integers(0, len(plan.templates), len(index)) * len(images.class_names) + labels

                pixels = plan.views.finish(plan.views.load(images, index, index, epoch).to(device), index, epoch)
                image_BD = model.encode_image(prepare(pixels, plan.preprocessing), normalize=True)
                text_BD = encode_captions(model, captions, torch.from_numpy(caption).to(device))
                loss = unicl_loss(image_BD, text_BD, torch.from_numpy(labels).to(device), model.logit_scale.exp())
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()

                with torch.no_grad():
                    model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
                last = step + 1 == steps
                progress.advance(len(index), f"epoch {epoch + 1}/{plan.epochs}, loss {loss.item():.3f}" if last else "")


def unicl_loss(
    image_BD: torch.Tensor, text_BD: torch.Tensor, labels_B: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Contrastive loss in which every caption of an image's class is right (UniCL, Yang et al., CVPR 2022, eq. 2–3).

    With CLIP's one-hot targets two sandals in a batch would repel each other's captions. Rows have unit length. The
    loss is the batch mean of the cross-entropies image → text and text → image, with targets uniform over equal labels.
    """
    logits_BB = scale * image_BD @ text_BD.T
    same_BB = (labels_B[:, None] == labels_B[None, :]).float()
    targets_BB = same_BB / same_BB.sum(1, keepdim=True)
    return (F.cross_entropy(logits_BB, targets_BB) + F.cross_entropy(logits_BB.T, targets_BB)) / 2


def encode_captions(model: open_clip.CLIP, captions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Unit rows [B, D] of the captions numbered `chosen`; each distinct caption is encoded once."""
    distinct, positions = chosen.unique(return_inverse=True)
    return model.encode_text(captions[distinct], normalize=True)[positions]


def zero_unused_tokens(model: open_clip.CLIP, captions: torch.Tensor) -> None:
    """Zero the embeddings of tokens that no caption has. They are never trained, and zeros compress well."""
    used = torch.zeros(len(model.token_embedding.weight), 1, device=captions.device)
    used[captions.unique()] = 1
    with torch.no_grad():
        model.token_embedding.weight.mul_(used)


def parameter_groups(model: open_clip.CLIP, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; not for gains, biases, the logit scale and embeddings."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in named if p.ndim < 2 or "embedding" in name]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def write(model: open_clip.CLIP, config: dict[str, Any], preprocessing: Preprocessing, out: Path) -> None:
    """Write open_clip's folder: the config, and float16 weights for half the size (open_clip computes in float32)."""
    state = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise DataError("training diverged: weights are not finite", next_step="use a smaller --learning-rate")
    preprocess = {
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
        "resize_mode": "shortest",
    }
    save_file(state, out / WEIGHTS_FILE)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (out / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def zero_shot_top1(folder: Path, images: ImageSet, templates: tuple[str, ...], device: torch.device) -> float:
    """Zero-shot top-1 of the written model, loaded and classified by open_clip itself."""
    name = f"local-dir:{folder}"
    model, _ = open_clip.create_model_from_pretrained(name, device=device)
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(
        model,
        tokenizer=open_clip.get_tokenizer(name),
        classnames=[prompt_class_name(name) for name in images.class_names],
        templates=[lambda words, template=template: template.replace("{}", words) for template in templates],
        device=device,
    )
    mean, std = (model.visual.preprocess_cfg[key] for key in ("mean", "std"))
    preprocessing = Preprocessing(mean=tuple(mean), std=tuple(std))
    right = 0
    for start in range(0, len(images), 500):
        pixels = torch.from_numpy(images.load(slice(start, start + 500))).to(device)
        features = model.encode_image(prepare(pixels, preprocessing), normalize=True)
        predicted = (features @ classifier).argmax(1).cpu().numpy()
        right += int((predicted == images.labels[start : start + 500]).sum())
    return right / len(images)


if __name__ == "__main__":
    typer.run(command(main))
