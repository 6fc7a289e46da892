"""{{PART}}.{{SLUG}}: what the paper says must hold, options, and what it answers to bad input."""
import pytest
import torch
from torch.testing import assert_close

from vitbook.{{PART}}.{{SLUG}} import mechanism


@pytest.mark.parametrize('n', [1, 2, 7])
def test_every_token_gets_the_mean(n):
    x = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(n))
    y = mechanism(x)
    for i in range(n): assert_close(y[:, i], x.mean(1))
