"""The diffusion transformer against diffusers', its published sizes, and what it is at its start."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

from genmodels.diffusion.dit import DiT, from_diffusers, to_diffusers

SMALL = {"sample_size": 8, "width": 24, "depth": 2, "heads": 3}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("out_channels", [4, 8])
def test_it_computes_what_diffusers_computes(out_channels):
    ours = random_weights(DiT(**SMALL, out_channels=out_channels, num_classes=10))
    theirs = to_diffusers(ours).eval()
    x, timesteps, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        expected = theirs(x, timesteps, torch.tensor([0, 9, 1000])).sample  # 1000 is always its label of no class
        torch.testing.assert_close(ours(x, timesteps, class_labels=labels).sample, expected, rtol=1e-4, atol=1e-5)
        back = from_diffusers(theirs, 10)(x, timesteps, class_labels=labels).sample
        torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_diffusers_made_can_be_taken():
    theirs = random_weights(DiTTransformer2DModel(3, 8, 4, num_layers=1, sample_size=8, num_embeds_ada_norm=5))
    embeddings = theirs.transformer_blocks[0].norm1.emb
    x, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 700]), torch.tensor([2, 5])
    assert embeddings.class_embedder.embedding_table.num_embeddings == 6
    with torch.no_grad():
        found = from_diffusers(theirs)(x, timesteps, class_labels=labels).sample
        torch.testing.assert_close(found, theirs(x, timesteps, labels).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "parameters"),
    # DiT-S/2, B/2, L/2 and XL/2 for 32×32 latents, 1,000 classes and learned variance (33, 130, 458 and 675 M in the
    # paper's table 1), with the 256 fixed position embeddings, which are parameters there and a buffer here.
    [(384, 12, 6, 32_963_360), (768, 12, 12, 130_512_416), (1024, 24, 16, 458_102_816), (1152, 28, 16, 675_129_632)],
    ids=["S", "B", "L", "XL"],
)
def test_published_sizes(width, depth, heads, parameters):
    with torch.device("meta"):
        model = DiT(32, 4, 8, 2, width, depth, heads, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) + 256 * width == parameters


@pytest.mark.parametrize("text_attention", ["cross", "joint"])
def test_it_starts_as_zero_and_then_depends_on_everything(text_attention):
    model = DiT(**SMALL, text_width=6, text_attention=text_attention, num_classes=3)
    x, timesteps, text, labels = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([1, 700]),
        torch.randn(2, 5, 6),
        torch.tensor([0, 3]),
    )
    assert model(x, timesteps, text, labels).sample.abs().max() == 0
    random_weights(model)
    plain = model(x, timesteps, text, labels).sample
    for changed in (
        (x + 1, timesteps, text, labels),
        (x, timesteps + 100, text, labels),
        (x, timesteps, 2 * text, labels),
        (x, timesteps, text, torch.tensor([1, 1])),
    ):
        assert (model(*changed).sample - plain).abs().max() > 1e-3
    one = model(x[1:], timesteps[1:], text[1:], labels[1:]).sample
    torch.testing.assert_close(one, plain[1:], rtol=1e-4, atol=1e-5)  # no sample sees another


@pytest.mark.parametrize("text_attention", ["cross", "joint"])
def test_text_is_a_set_of_tokens_that_its_encoder_has_placed(text_attention):
    model = random_weights(DiT(**SMALL, text_width=6, text_attention=text_attention))
    x, timesteps, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 6)
    torch.testing.assert_close(
        model(x, timesteps, text).sample, model(x, timesteps, text.flip(1)).sample, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("text_attention", ["cross", "joint"])
def test_recomputed_activations_give_the_same_gradients(text_attention):
    gradients = []
    for recompute in (False, True):
        model = random_weights(DiT(**SMALL, text_width=6, text_attention=text_attention)).train()
        if recompute:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        model(torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 5, 6)).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_only_a_dit_of_classes_is_one_of_diffusers():
    with pytest.raises(ValueError, match="without text"):
        to_diffusers(DiT(**SMALL, text_width=6))


def test_a_folder_round_trips(tmp_path):
    model = random_weights(DiT(**SMALL, text_width=6))
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path, use_safetensors=True)
    x, timesteps, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            again(x, timesteps, text).sample, model(x, timesteps, text).sample, rtol=1e-4, atol=1e-5
        )
