"""names: what is near, what is said about it, and errors of one line."""
import pytest
from hypothesis import given, strategies as st

from vitbook.names import did_you_mean, installed, nearest, one_of

KNOWN = ['vit_tiny', 'vit_small', 'tnt_small', 'CvT_13']
word = st.text('abcdefg_', min_size=1, max_size=9)


@given(st.lists(word, min_size=1, unique=True), st.integers(1, 3))
def test_a_known_name_is_nearest_to_itself(known, n):
    for name in known:
        assert nearest(name, known, n)[0] == name and nearest(name.upper(), known, n)[0] == name
        assert len(nearest(name, known, n)) <= n and set(nearest(name, known, n, 0)) <= set(known)


def test_the_most_alike_come_first():
    assert nearest('vit_smal', KNOWN)[0] == 'vit_small' and nearest('CVT13', KNOWN)[0] == 'CvT_13'
    assert nearest('resnet', KNOWN) == [] and nearest('vit', [], 3) == []
    assert len(nearest('vit_t', KNOWN, cutoff=.1)) == 3 and nearest('vit_t', KNOWN, cutoff=.99) == []
    assert nearest('vit_tin', dict.fromkeys(KNOWN)) == nearest('vit_tin', KNOWN)


def test_what_is_said():
    assert did_you_mean(['a']) == 'did you mean a?'
    assert did_you_mean(['a', 'b'], 'x') == 'did you mean a or b?'
    assert did_you_mean([]) == '' and did_you_mean([], 'ask') == 'ask'


def test_one_of_a_few_words():
    for value in ('train', 'test'): assert one_of('split', value, ('train', 'test')) == value
    with pytest.raises(ValueError) as e: one_of('split', 'tests', ('train', 'test'))
    assert str(e.value) == "split: got 'tests', wanted one of 'train', 'test' (did you mean 'test'?)"
    with pytest.raises(ValueError) as e: one_of('split', 'zzz', ('train', 'test'))
    assert str(e.value) == "split: got 'zzz', wanted one of 'train', 'test'"


def test_versions():
    assert installed('pytest') == pytest.__version__ and installed('no-such-package') is None
