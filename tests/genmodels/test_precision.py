"""bfloat16 is near float32, and "auto" means one of the two."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from genmodels import precision
from genmodels.precision import autocast, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has_instructions", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_device_is_fast_at(monkeypatch, has_instructions, expected):
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda device: has_instructions)
    assert resolve_precision("auto", CPU) == expected
    assert [resolve_precision(given, CPU) for given in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="'fp8', must be one of fp32, bf16, auto"):
        resolve_precision("fp8", CPU)


def test_attention_and_its_gradients_are_near_those_of_float32():
    generator = torch.Generator().manual_seed(0)
    tokens, weight = torch.randn(2, 16, 8, generator=generator), torch.randn(8, 24, generator=generator) * 0.3

    def output_and_gradient(chosen):
        leaf = weight.clone().requires_grad_()
        with autocast(chosen, CPU):
            query, key, value = (tokens @ leaf).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            result = scaled_dot_product_attention(query, key, value)
        result.float().square().mean().backward()
        return result, leaf.grad

    (plain, plain_gradient), (half, half_gradient) = output_and_gradient("fp32"), output_and_gradient("bf16")
    assert plain.dtype == torch.float32 and half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, atol=0.05, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(half_gradient.flatten(), plain_gradient.flatten(), dim=0) > 0.999
