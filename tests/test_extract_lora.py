"""A change of weights as a LoRA of low rank."""

import pytest
import torch
from torch.nn import functional as F

from diffalign.emoji_world.workshop.extract_lora import low_rank


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 3, 3)])
def test_a_change_of_low_rank_comes_back(shape):
    torch.manual_seed(0)
    out, *rest = shape
    change = (torch.randn(out, 2) @ torch.randn(2, torch.Size(rest).numel())).view(shape)
    a, b = low_rank(change, 2)
    assert a.shape == (2, *rest)
    torch.testing.assert_close((b.flatten(1) @ a.flatten(1)).view(shape), change)
    if len(shape) == 4:  # as layers compute it: A, then B
        x = torch.randn(1, 4, 7, 7)
        torch.testing.assert_close(F.conv2d(F.conv2d(x, a), b), F.conv2d(x, change))


def test_no_other_of_its_rank_is_nearer():
    torch.manual_seed(0)
    change = torch.randn(8, 8)
    a, b = low_rank(change, 3)
    left = torch.linalg.svdvals(change)[3:].square().sum()
    torch.testing.assert_close((change - b @ a).square().sum(), left)
    assert low_rank(change, 99)[0].shape == (8, 8)
