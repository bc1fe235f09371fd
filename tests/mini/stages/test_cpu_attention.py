"""The precision of attention while training on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mini.stages.cpu_attention import fast_attention

CPU = torch.device("cpu")


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 8, generator=random, requires_grad=True) for _ in range(3)]


def attend(inputs: list[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask)


def test_attention_is_exact_and_the_rest_is_not(inputs):
    exact = F.scaled_dot_product_attention(*inputs)
    with fast_attention(CPU):
        assert torch.equal(attend(inputs), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert (inputs[0] @ inputs[1].mT).dtype == torch.bfloat16
    assert attend(inputs).dtype == torch.bfloat16


def test_gradients_and_masks_in_half_precision(inputs):
    """As inside a network, where autocast has made all of them bfloat16."""
    halves = [each.detach().bfloat16().requires_grad_() for each in inputs]
    mask = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    with fast_attention(CPU):
        attended = attend(halves, mask)
    attended.sum().backward()
    exact = F.scaled_dot_product_attention(*[each.float() for each in halves], is_causal=True)
    assert attended.dtype == torch.float32
    assert torch.allclose(attended, exact, atol=1e-6)
    assert all(each.grad.dtype == torch.bfloat16 and each.grad.abs().sum() > 0 for each in halves)


def test_where_nothing_is_cast_nothing_changes(inputs):
    doubles = [each.double() for each in inputs]
    with fast_attention(CPU):
        assert F.scaled_dot_product_attention(*doubles).dtype == torch.float64


def test_other_devices_attend_as_they_do(inputs):
    with fast_attention(torch.device("cuda")):
        assert attend(inputs).dtype == torch.bfloat16
