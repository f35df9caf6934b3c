from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cache_tools import fusion
from cache_tools.errors import RecipeError, WeightsError
from cache_tools.format.recipe import Preprocessing
from cache_tools.preprocess import prepare
from pipeline.networks.clip import Clip, load_clip
from pipeline.networks.clip_source import resolve_source
from pipeline.networks.prompts import template_set
from pipeline.networks.references import resolve_path
from pipeline.networks.weights import weights_digest
from pipeline.recipe import ClipSpec
from tests.support.hub_copies import add_to_hub_cache, use_hub_cache
from tests.support.tiny_clip import CONFIG, make_folder

CPU = torch.device("cpu")
CLASSES = ("apple", "aquarium_fish", "T-shirt/top", "zero", "pickup_truck")
WORDS = tuple(name.replace("_", " ") for name in CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(ClipSpec(name=f"local-dir:{folder}"), CLASSES, CPU)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def reference(
    model_name: str, templates: tuple[str, ...], words: tuple[str, ...], pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """open_clip's transform on PIL images and zero-shot classifier: (classifier [D, C], cosine [N, C], scale)."""
    network, _, transform = open_clip.create_model_and_transforms(model_name)
    network.eval()
    tokenizer = open_clip.get_tokenizer(model_name)
    classifier = open_clip.build_zero_shot_classifier(network, tokenizer, words, templates)
    images = [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels]
    with torch.no_grad():
        features = network.encode_image(torch.stack(images), normalize=True)
        return classifier, features @ classifier, float(network.logit_scale.exp())


@pytest.mark.parametrize("templates", ["richkd", "openai", "siglip"])
def test_logits_equal_open_clips_zero_shot_classifier(folder: Path, pixels: torch.Tensor, templates: str) -> None:
    name = f"local-dir:{folder}"
    ours = load_clip(ClipSpec(name=name, templates=templates), CLASSES, CPU)
    classifier, cosine, scale = reference(name, template_set(templates), WORDS, pixels)
    output = ours(pixels)
    torch.testing.assert_close(ours.class_embeddings, classifier.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.cosine, cosine, rtol=0, atol=1e-6)
    assert ours.identity.logit_scale == scale == pytest.approx(37.0)
    torch.testing.assert_close(scale * output.cosine, scale * cosine, rtol=0, atol=1e-5)


def test_shipped_clip_equals_open_clips_zero_shot_classifier() -> None:
    name = f"local-dir:{resolve_path('package:digits-clip')}"
    if not (resolve_path("package:digits-clip") / "open_clip_config.json").is_file():
        pytest.skip("pipeline/assets/digits-clip has not been made (examples/train_clip.py)")
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    ours = load_clip(ClipSpec(name="local-dir:package:digits-clip"), digits, CPU)
    _, cosine, scale = reference(name, template_set("richkd"), digits, pixels)
    torch.testing.assert_close(
        ours.identity.logit_scale * ours(pixels).cosine, scale * cosine, rtol=0, atol=1e-5 * max(1.0, scale)
    )
    assert ours.identity.architecture == "local-dir:digits-clip"


def test_canvas_is_resized_as_open_clip_resizes_images(folder: Path, clip: Clip) -> None:
    """torch's antialiased bicubic differs from PIL's in the last bit: a pixel may round to the next level."""
    rough = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    canvases = np.stack(
        [np.asarray(Image.fromarray(image).resize((80, 80), Image.Resampling.BICUBIC)) for image in rough]
    )
    pixels = torch.from_numpy(canvases).permute(0, 3, 1, 2).contiguous()
    _, cosine, _ = reference(f"local-dir:{folder}", template_set("richkd"), WORDS, pixels)
    torch.testing.assert_close(clip(pixels).cosine, cosine, rtol=0, atol=2e-3)


def test_embeddings_and_outputs_have_the_promised_shapes(clip: Clip, pixels: torch.Tensor) -> None:
    assert clip.text_features.shape == (12, 5, 32)
    torch.testing.assert_close(clip.text_features.norm(dim=-1), torch.ones(12, 5))
    assert torch.equal(clip.class_embeddings, fusion.class_embeddings(clip.text_features))
    output = clip(pixels)
    assert output.features.shape == (6, 32)
    assert output.cosine.shape == (6, 5)
    assert output.features.dtype == output.cosine.dtype == torch.float32
    assert not output.cosine.requires_grad
    assert (output.features.norm(dim=1) - 1).abs().max() > 0.05  # raw: the length is kept
    assert torch.equal(fusion.cosine(output.features, clip.class_embeddings), output.cosine)


def test_text_features_are_template_by_class(clip: Clip, folder: Path) -> None:
    network = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a sketch of a aquarium fish"])
    with torch.no_grad():
        alone = network.encode_text(tokens, normalize=True)[0]
    torch.testing.assert_close(clip.text_features[8, 1], alone, rtol=0, atol=1e-6)


def test_many_prompts_go_through_in_batches(folder: Path, monkeypatch: pytest.MonkeyPatch, clip: Clip) -> None:
    monkeypatch.setattr("pipeline.networks.clip.TEXT_BATCH", 7)
    small = load_clip(ClipSpec(name=f"local-dir:{folder}"), CLASSES, CPU)
    torch.testing.assert_close(small.text_features, clip.text_features, rtol=0, atol=1e-6)


def test_for_timing_one_prompt_stands_for_all(folder: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[int] = []
    encode = open_clip.CLIP.encode_text

    def counted(network: Any, text: torch.Tensor, **options: Any) -> torch.Tensor:
        embedded.append(len(text))
        return encode(network, text, **options)

    monkeypatch.setattr(open_clip.CLIP, "encode_text", counted)
    timed = load_clip(ClipSpec(name=f"local-dir:{folder}"), CLASSES, CPU, for_timing=True)
    assert embedded == [1]
    assert timed.identity == clip.identity
    torch.testing.assert_close(timed.text_features, clip.text_features[:1, :1].expand_as(clip.text_features))


def test_identity_does_not_depend_on_the_path(folder: Path, clip: Clip, tmp_path: Path) -> None:
    identity = clip.identity
    assert identity.architecture == "local-dir:tiny"
    assert identity.feature_dim == 32
    assert identity.templates == template_set("richkd")
    assert identity.preprocessing == Preprocessing(
        size=(32, 32), interpolation="bicubic", mean=(0.3, 0.4, 0.5), std=(0.2, 0.25, 0.3)
    )
    again = load_clip(ClipSpec(name=f"local-dir:{make_folder(tmp_path / 'tiny')}"), CLASSES, CPU)
    assert again.identity == identity
    words = load_clip(ClipSpec(name=f"local-dir:{folder}", class_names=("a", "b", "c", "d", "e")), CLASSES, CPU)
    assert identity.class_names == WORDS, "as they are in the prompts, not as the dataset has them"
    assert words.identity.class_names == ("a", "b", "c", "d", "e")
    assert words.identity.config_digest == identity.config_digest
    assert words.identity.weights_digest == identity.weights_digest


def test_words_for_the_prompts_replace_class_names(folder: Path, clip: Clip) -> None:
    spec = ClipSpec(name=f"local-dir:{folder}", class_names=WORDS)
    assert torch.equal(load_clip(spec, ("n01", "n02", "n03", "n04", "n05"), CPU).text_features, clip.text_features)
    with pytest.raises(RecipeError, match="expected 4; found 5"):
        load_clip(spec, CLASSES[:4], CPU)


def test_mixed_precision_gives_float32_near_the_exact_numbers(folder: Path, clip: Clip, pixels: torch.Tensor) -> None:
    mixed = load_clip(ClipSpec(name=f"local-dir:{folder}"), CLASSES, CPU, precision="bfloat16")
    assert torch.equal(mixed.text_features, clip.text_features)
    exact, output = clip(pixels), mixed(pixels)
    assert output.features.dtype == output.cosine.dtype == torch.float32
    assert not torch.equal(output.features, exact.features)
    torch.testing.assert_close(output.cosine, exact.cosine, rtol=0, atol=0.02)


def test_a_siglip_style_model_has_a_logit_bias(tmp_path: Path, pixels: torch.Tensor) -> None:
    name = f"local-dir:{make_folder(tmp_path / 'bias', init_logit_bias=-10.0, custom_text=True)}"
    biased = load_clip(ClipSpec(name=name, templates="siglip"), CLASSES, CPU)
    assert biased.logit_bias == -10.0
    _, cosine, _ = reference(name, template_set("siglip"), WORDS, pixels)
    torch.testing.assert_close(biased(pixels).cosine, cosine, rtol=0, atol=1e-6)


def test_a_squashing_model_rejects_canvases_that_are_not_square(clip: Clip) -> None:
    squashing = Clip(clip.network, clip.identity, clip.text_features, resize_mode="squash")
    oblong = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    assert clip(oblong).cosine.shape == (1, 5)
    with pytest.raises(WeightsError, match="needs square view canvases"):
        squashing(oblong)


def test_loading_prints_nothing_and_does_not_change_logging(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers, filters = list(logging.getLogger().handlers), list(logging.getLogger().filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_clip(ClipSpec(name=f"local-dir:{folder}"), CLASSES, CPU)
    assert logging.getLogger().handlers == handlers
    assert logging.getLogger().filters == filters
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded half-precision weights, 86 MB."""
    path = tmp_path_factory.mktemp("builtin") / "vit-s.pt"
    config = open_clip.get_model_config(TestBuiltinConfig.name)
    torch.manual_seed(0)
    state = open_clip.CLIP(**config).state_dict()
    torch.save({"state_dict": {f"module.{key}": value.half() for key, value in state.items()}}, path)
    return path


class TestBuiltinConfig:
    """open_clip's own configs, with a checkpoint file: ViT-S-32-alt is the smallest."""

    name = "ViT-S-32-alt"

    def test_local_checkpoint(self, checkpoint: Path) -> None:
        ours = load_clip(ClipSpec(name=self.name, weights=str(checkpoint), templates="siglip"), CLASSES[:2], CPU)
        assert ours.identity.architecture == self.name
        assert ours.identity.preprocessing.size == (224, 224)
        assert ours.identity.feature_dim == 256
        network = open_clip.create_model(self.name, str(checkpoint)).eval()
        classifier = open_clip.build_zero_shot_classifier(
            network, open_clip.get_tokenizer(self.name), WORDS[:2], template_set("siglip")
        )
        torch.testing.assert_close(ours.class_embeddings, classifier.T, rtol=0, atol=1e-6)

    def test_checkpoint_of_another_config(self, checkpoint: Path) -> None:
        with pytest.raises(WeightsError, match=r"do not fit the config \(ViT-S-32, .*; found text pos_embed") as info:
            load_clip(ClipSpec(name="ViT-S-32", weights=str(checkpoint)), CLASSES, CPU)
        assert "\n" not in str(info.value)
        assert len(str(info.value)) < 400

    def test_openai_archive_needs_quick_gelu(self, tmp_path: Path) -> None:
        """OpenAI publishes TorchScript. The config is checked before the content."""
        path = tmp_path / "ViT-B-32.pt"
        with warnings.catch_warnings(action="ignore"):  # torch would rather have us use torch.export
            torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
        with pytest.raises(WeightsError, match=r"need a config with QuickGELU .*Use ViT-B-32-quickgelu\."):
            load_clip(ClipSpec(name="ViT-B-32", weights=str(path)), CLASSES, CPU)
        assert resolve_source("ViT-B-32-quickgelu", str(path)).pretrained == str(path)

    def test_openai_archive_loads_with_quick_gelu(self, tmp_path: Path, pixels: torch.Tensor) -> None:
        """TorchScript with OpenAI's three extra numbers, loaded into a config of open_clip."""
        config = CONFIG | {"quick_gelu": True}
        (tmp_path / "tiny-test-quickgelu.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-test-quickgelu.json")
        network = open_clip.CLIP(**config).eval()
        digest = weights_digest(network)
        del network.attn_mask  # a plain attribute in OpenAI's code
        for name, value in {"input_resolution": 32, "context_length": 24, "vocab_size": 49408}.items():
            network.__dict__.pop(name, None)
            network.register_buffer(name, torch.tensor(value))
        with warnings.catch_warnings(action="ignore"):  # torch would rather have us use torch.export
            images = torch.zeros(1, 3, 32, 32)
            traced = torch.jit.trace_module(network, {"encode_image": (images,)}, check_trace=False)
            torch.jit.save(traced, tmp_path / "tiny.pt")
        spec = ClipSpec(name="tiny-test-quickgelu", weights=str(tmp_path / "tiny.pt"))
        ours = load_clip(spec, CLASSES, CPU)
        assert ours.identity.weights_digest == digest
        with torch.no_grad():
            expected = network.encode_image(prepare(pixels, ours.identity.preprocessing))
        torch.testing.assert_close(ours(pixels).features, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("disguise", ["a folder deeper", "behind a pickle"])
    def test_a_fake_torchscript_file_runs_no_code(self, tmp_path: Path, disguise: str) -> None:
        path, planted = tmp_path / "evil.pt", tmp_path / "planted"

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (planted,)

        if disguise == "a folder deeper":
            torch.save({"weight": Evil()}, path)
        else:
            path.write_bytes(pickle.dumps(Evil()))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("evil/x/constants.pkl" if disguise == "a folder deeper" else "evil/constants.pkl", b"x")
        with pytest.raises(WeightsError), warnings.catch_warnings(action="ignore"):
            load_clip(ClipSpec(name="ViT-B-32-quickgelu", weights=str(path)), CLASSES, CPU)
        assert not planted.exists()

    def test_plain_copy_of_openai_weights_is_recognised_by_its_name(self, tmp_path: Path) -> None:
        path = tmp_path / "vit_base_patch32_clip_224.openai.safetensors"
        save_file({"logit_scale": torch.ones(1)}, path)
        with pytest.raises(WeightsError, match=r"Use ViT-B-32-quickgelu\."):
            load_clip(ClipSpec(name="ViT-B-32", weights=str(path)), CLASSES, CPU)


def test_a_local_copy_of_a_hub_model_needs_no_network(
    folder: Path, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_hub_cache(tmp_path, "org/tiny", *folder.iterdir())
    use_hub_cache(monkeypatch, tmp_path)
    loaded = load_clip(ClipSpec(name="hf-hub:org/tiny"), CLASSES, CPU)
    assert loaded.identity.weights_digest == clip.identity.weights_digest
    assert torch.equal(loaded.class_embeddings, clip.class_embeddings)


class TestNames:
    """Names and weights that fail before any download."""

    @pytest.fixture(autouse=True)
    def no_downloads(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub.constants as hub

        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def fails(self, match: str, **spec: Any) -> None:
        with pytest.raises(WeightsError, match=match) as info:
            load_clip(ClipSpec(**spec), CLASSES, CPU)
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize(
        ("name", "tag"),
        [("ViT-B-32", "openai"), ("ViT-L/14", "openai"), ("RN50", "yfcc15m"), ("ViT-H-14", "dfn5b")],
    )
    def test_quick_gelu_tag_in_a_plain_config(self, name: str, tag: str) -> None:
        right = f"{name.replace('/', '-')}-quickgelu"
        self.fails(rf"need a config with QuickGELU .*Use {right}\.", name=name, weights=tag)

    def test_every_quick_gelu_tag_has_a_config_to_recommend(self) -> None:
        for name, tag in open_clip.list_pretrained():
            wants = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
            config = open_clip.get_model_config(name)
            if config is None or not wants or config.get("quick_gelu"):
                continue
            with pytest.raises(WeightsError, match=f"Use {name}-quickgelu"):
                resolve_source(name, tag)
            assert resolve_source(f"{name}-quickgelu", tag).config["quick_gelu"]

    def test_unknown_name(self) -> None:
        self.fails("no such CLIP .*'ViT-B-32'", name="VIT-B-32", weights="openai")

    def test_unknown_tag(self) -> None:
        self.fails("no such pretrained tag .*laion2b_s34b_b79k.*Did you mean", name="ViT-B-32", weights="laion2b_s34")

    def test_missing_file(self) -> None:
        self.fails("no such CLIP weights .*nothing.pt", name="ViT-B-32", weights="there/is/nothing.pt")

    def test_no_weights(self) -> None:
        self.fails("CLIP has no weights .*one of openai, ", name="ViT-B-32")

    def test_weights_with_a_folder(self, folder: Path) -> None:
        self.fails("already contains its weights", name=f"local-dir:{folder}", weights="openai")

    def test_tag_that_cannot_be_downloaded(self) -> None:
        self.fails("cannot load CLIP .*network access", name="ViT-B-32", weights="laion2b_s34b_b79k")

    def test_hub_model_that_cannot_be_downloaded(self) -> None:
        self.fails("cannot download CLIP from the hub .*local-dir", name="hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")

    def test_missing_folder(self, tmp_path: Path) -> None:
        self.fails("no CLIP in that folder .*none", name=f"local-dir:{tmp_path / 'none'}")
        self.fails("no CLIP in that folder .*assets/none", name="local-dir:package:none")

    def test_folder_without_weights_is_an_error(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "tiny")
        (folder / "open_clip_model.safetensors").unlink()
        self.fails("no CLIP weights in that folder", name=f"local-dir:{folder}")

    def test_folder_with_half_the_weights_is_an_error(self, tmp_path: Path, folder: Path) -> None:
        half = make_folder(tmp_path / "tiny")
        network = open_clip.create_model(f"local-dir:{folder}")
        vision = {key: value for key, value in network.state_dict().items() if key.startswith("visual.")}
        save_file(vision, half / "open_clip_model.safetensors")
        self.fails(r"do not fit the config .*; expected '.*'; found no such tensor", name=f"local-dir:{half}")

    def test_folder_with_another_width(self, tmp_path: Path, folder: Path) -> None:
        other = make_folder(tmp_path / "tiny", embed_dim=16)
        (other / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
        self.fails(r"expected 'text_projection' of shape .*\[32, 16\].*\[32, 32\]", name=f"local-dir:{other}")

    def test_damaged_folder(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "tiny")
        weights = folder / "open_clip_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        self.fails("cannot load CLIP .*check the file|Check the file", name=f"local-dir:{folder}")
        (folder / "open_clip_config.json").write_text("{")
        self.fails("cannot read the CLIP config", name=f"local-dir:{folder}")

    def test_openai_folder_needs_quick_gelu(self, tmp_path: Path) -> None:
        self.fails("need a config with QuickGELU", name=f"local-dir:{make_folder(tmp_path / 'vit-openai')}")
        right = make_folder(tmp_path / "right-openai", quick_gelu=True)
        assert load_clip(ClipSpec(name=f"local-dir:{right}"), CLASSES, CPU).identity.feature_dim == 32
