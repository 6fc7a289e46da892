"""judge: the Fréchet distance and the judge of digits, where the notebook does not show it."""
import math

import pytest
import torch
from torch.testing import assert_close

from vitbook import data, judge as J


def test_judge_is_the_same_every_time_and_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a = J.digit_judge(seed=3, steps=5)
    assert torch.equal(torch.rand(3), want)
    b = J.digit_judge.__wrapped__(seed=3, steps=5)
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)
    assert not any(p.requires_grad for p in a.parameters())


def test_sizes_before_the_judge():
    """It sees 8x8: larger pictures are smoothed down.

    Real digits are first made as large as the samples."""
    seen = []
    class Spy(J.DigitJudge):
        def features(self, images):
            seen.append(images)
            return super().features(images)
    judge, x = Spy().eval(), torch.rand(3, 1, 16, 16)
    half = torch.zeros(8, 16)
    for i in range(8):
        # a triangle four cells wide, cut at the edge
        weights = {j: w for j, w in zip(range(2 * i - 1, 2 * i + 3), (1., 3., 3., 1.))
                   if 0 <= j < 16}
        for j, w in weights.items(): half[i, j] = w / sum(weights.values())
    with torch.no_grad():
        assert_close(judge.features(x), judge.features(half @ x @ half.T), atol=1e-5, rtol=1e-4)
    seen.clear()
    J.judge_digits(x, torch.tensor([1, 1, 4]), judge)
    real = data.digits('test', size=16)
    assert_close(seen[0], torch.cat([real.images[real.labels == k] for k in (1, 4)]))
    assert seen[-1].shape == (3, 1, 16, 16)


def test_frechet_distance_of_gaussians():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20_000, 3, generator=g), torch.randn(20_000, 3, generator=g) * torch.tensor([1., 2., .5]) + torch.tensor([1., 0., 0.])
    assert abs(J.frechet_distance(a, b) - (1 + 1 + .25)) < .08
    assert_close(J.frechet_distance(a, b), J.frechet_distance(b, a), atol=1e-6, rtol=1e-6)
    # covariances without an inverse
    rank = torch.randn(50, 2, generator=g) @ torch.randn(2, 8, generator=g)
    assert J.frechet_distance(rank, rank) < 1e-6
    assert math.isfinite(J.frechet_distance(rank, rank + 1))


def test_verdicts():
    real = data.digits('test')
    judge = J.digit_judge(0, 60)
    v = J.judge_digits(real.images, real.labels, judge)
    assert v.frechet < 1e-6 < v.floor and v.n == len(real) and v.accuracy > .7
    wide = torch.nn.functional.interpolate(real.images, (8, 16), mode='bilinear')
    assert J.judge_digits(wide, real.labels, judge).frechet < .3 * J.judge_digits(
        wide.flip(-1), real.labels, judge).frechet
    fives = real[real.labels == 5]
    # compared with real fives only
    assert J.judge_digits(fives.images, fives.labels, judge).frechet < 1e-6


def test_nothing_is_kept_for_gradients():
    samples = torch.rand(4, 1, 8, 8, requires_grad=True)
    verdict = J.judge_digits(samples, torch.tensor([1, 2, 3, 4]), J.digit_judge(3, 5))
    assert all(isinstance(x, float) for x in verdict[:3]) and verdict.n == 4


@pytest.mark.parametrize('call, words', [
    (lambda: J.judge_digits(torch.ones(2, 1, 8, 8), torch.ones(3, dtype=torch.long)), 'labels'),
    (lambda: J.judge_digits(255 * torch.ones(2, 1, 8, 8), torch.ones(2, dtype=torch.long), J.DigitJudge()), 'images.*255'),
    (lambda: J.frechet_distance(torch.ones(1, 3), torch.ones(2, 3)), 'two samples.*1 and 2'),
])
def test_bad_input_is_named(call, words, unchecked):
    with pytest.raises(ValueError, match=words): call()
