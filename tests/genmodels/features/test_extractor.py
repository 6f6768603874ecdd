"""Every extractor against its network called by hand; the models are tiny and made here."""

import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from genmodels.features.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from genmodels.features.config import FeaturesConfig
from genmodels.features.extractor import open_extractor
from genmodels.features.resize import resize
from genmodels.text import tokenizer as tokenizers


def config(kind, path):
    return TypeAdapter(FeaturesConfig).validate_python({"kind": kind, "path": str(path)})


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tokenizers.train_tokenizer(["a red seven", "a blue two on white"], 600, 12)
    tokenizer.save_pretrained(folder)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "vocab_size": 600, "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    vision = {**common, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(Classifier(ClassifierConfig(image_size=16, heads={"digit": 10, "ink": 8})), folder)
    return folder


def pixels(pictures, size, mean, deviation):
    images = torch.from_numpy(resize(pictures, size)).permute(0, 3, 1, 2) / 255
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


@torch.no_grad()
def test_dinov2_gives_its_class_token(dinov2, pictures):
    extractor = open_extractor(config("dinov2", dinov2))
    images = pixels(pictures, 28, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = Dinov2Model.from_pretrained(dinov2)(images).last_hidden_state[:, 0]
    found = extractor(pictures)
    assert found.features.shape == (5, extractor.dimensions) and found.probabilities is None
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="use kind clip"):
        extractor.texts(["a red seven"])


@torch.no_grad()
def test_clip_embeds_pictures_and_sentences_in_one_space(clip, pictures):
    extractor = open_extractor(config("clip", clip))
    model = CLIPModel.from_pretrained(clip).eval()
    images = pixels(pictures, 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    sentences = ["a red seven", "a blue two on white", "two", "", "white " * 40]
    tokens = tokenizers.encode(tokenizers.load(clip), sentences)
    outputs = model(input_ids=tokens, pixel_values=images)
    for found, expected in (
        (extractor(pictures).features, outputs.image_embeds),
        (extractor.texts(sentences), outputs.text_embeds),
    ):
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        assert found.shape == (5, 12)
        np.testing.assert_allclose(unit, expected.numpy(), atol=1e-5)


@torch.no_grad()
def test_a_classifier_gives_features_and_the_first_heads_probabilities(classifier, pictures):
    extractor = open_extractor(config("classifier", classifier))
    images = torch.from_numpy(resize(pictures, 16)).permute(0, 3, 1, 2) / 127.5 - 1
    features, logits = load_classifier(classifier)(images)
    found = extractor(pictures)
    np.testing.assert_allclose(found.features, features.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.probabilities, logits["digit"].softmax(1).numpy(), atol=1e-5)


def test_the_digest_is_of_weights_and_scaling_and_not_of_the_place(clip, dinov2, classifier, tmp_path):
    places = {"clip": clip, "dinov2": dinov2, "classifier": classifier}
    extractors = {kind: open_extractor(config(kind, path)) for kind, path in places.items()}
    digests = {extractor.digest for extractor in extractors.values()}
    assert len(digests) == 3 and all(len(digest) == 16 for digest in digests)
    moved = shutil.copytree(clip, tmp_path / "moved")
    assert open_extractor(config("clip", moved)).digest == extractors["clip"].digest
    (moved / "preprocessor_config.json").unlink()
    assert open_extractor(config("clip", moved)).digest != extractors["clip"].digest
    network = load_classifier(classifier)
    with torch.no_grad():
        network.heads["ink"].bias += 1
    save_classifier(network, tmp_path / "other")
    assert open_extractor(config("classifier", tmp_path / "other")).digest != extractors["classifier"].digest


@pytest.mark.parametrize("kind", ["clip", "dinov2", "classifier", "inception"])
def test_what_is_not_there_is_named(kind, tmp_path):
    with pytest.raises(ValueError, match=r"holds no|torch-fidelity"):
        open_extractor(config(kind, tmp_path / "nothing"))
