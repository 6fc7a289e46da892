"""`vitbook.diagram`: shapes held against tensors, places, what is refused, and that drawings can be read."""
import re

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from vitbook.diagram import Diagram


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def chain(*shapes):
    "Boxes 0, 1, 2 … below each other, joined by arrows with these shapes."
    d = Diagram(2, len(shapes) + 1)
    for i in range(len(shapes) + 1): d.box(str(i), str(i), at=(0, i))
    for i, shape in enumerate(shapes): d.arrow(str(i), str(i + 1), shape)
    return d


def seen(*sizes): return {(str(i), str(i + 1)): size for i, size in enumerate(sizes)}


SIZED = [('b n c', (2, 5, 12)), ('b n+1 c', (2, 6, 12)), ('b n-1 3c', (2, 4, 36)), ('b (n c)', (2, 60)),
         ('b (n c/4) 7', (2, 15, 7)), ('2 2b', (2, 4))]


@pytest.mark.parametrize('shape, size', SIZED)
def test_shapes_are_held_against_tensors(shape, size):
    assert chain('b n c', shape).sizes(seen((2, 5, 12), size)) == dict(b=2, n=5, c=12)
    for i in range(len(size)):
        wrong = (*size[:i], size[i] + 1, *size[i + 1:])
        with pytest.raises(ValueError, match=re.escape(f'says {shape!r}')):
            chain('b n c', shape).sizes(seen((2, 5, 12), wrong))


def test_letters_may_be_met_first_in_a_compound():
    assert chain('b (h d)', 'h d').sizes(seen((2, 24), (3, 8))) == dict(b=2, h=3, d=8)
    with pytest.raises(ValueError, match="'h'.*stands alone"):
        chain('b (h d)', 'b d').sizes(seen((2, 24), (2, 8)))


def test_a_part_that_does_not_come_out_even_is_no_match():
    with pytest.raises(ValueError, match='9/4'): chain('n', 'n/4').sizes(seen((9,), (2,)))


def test_wrong_uses_name_what_came():
    d = chain('b n')
    with pytest.raises(ValueError, match='2 axes|3 axes'): d.sizes(seen((1, 2, 3)))
    with pytest.raises(ValueError, match='no arrow'): d.sizes({('1', '0'): (1, 2)})
    for shape in ('b n c!', '()', '(', 'b*n', '-1'):
        with pytest.raises(ValueError, match='shape must be words'): d.arrow('1', '0', shape)
    with pytest.raises(ValueError, match='already'): d.arrow('0', '1')
    with pytest.raises(ValueError, match="'9'"): d.arrow('0', '9')
    with pytest.raises(ValueError, match='sides'): d.arrow('1', '0', sides=('left', 'up'))
    with pytest.raises(ValueError, match='kind'): d.box('k', '', (0, 0), kind='circle')
    with pytest.raises(ValueError, match='taken'): d.cells('0', (0, 0), [[1]])
    with pytest.raises(ValueError, match='positive'): d.box('w', '', (0, 0), wide=0)
    with pytest.raises(ValueError, match='positive'): Diagram(0, 1)
    with pytest.raises(ValueError, match='one length'): d.cells('c', (0, 0), [[1], [1, 2]])
    with pytest.raises(ValueError, match='marked'): d.cells('c', (0, 0), [[1, 2]], marked=[(1, 0)])
    with pytest.raises(ValueError, match='names'): d.group(['0', 'z'], 'x')
    assert d.shapes == {('0', '1'): 'b n'} and set(d.things) == {'0', '1'}, 'nothing half-added'


def test_places():
    "Column to the right, row downwards, an arrow between facing sides."
    d = Diagram(3, 3)
    for name, at in (('a', (0, 0)), ('right', (2, 0)), ('below', (0, 2)), ('corner', (2, 2))):
        d.box(name, name, at=at)
    for end in ('right', 'below', 'corner'):
        d.arrow('a', end)
        d.arrow(end, 'a')
    found = {ends: (arrow.start, arrow.end) for ends, arrow in d.arrows.items()}
    assert found['a', 'right'] == ('right', 'left') and found['right', 'a'] == ('left', 'right')
    assert found['a', 'below'] == found['a', 'corner'] == ('bottom', 'top')
    assert found['below', 'a'] == ('top', 'bottom')
    fig = d.draw()
    where = {text.get_text(): text.get_position() for text in fig.axes[0].texts}
    up = fig.axes[0].transData.transform
    assert up(where['right'])[0] > up(where['a'])[0] and up(where['below'])[1] < up(where['a'])[1]


def test_what_is_highlighted_and_marked_is_drawn_so():
    d = Diagram(3, 2)
    d.cells('t', (0, .5), [[0, 1, None], [2, 'w', 3]], marked=[(1, 2)])
    d.box('o', 'o', at=(2, .5))
    d.arrow('t', 'o', 'n', path=True)
    ax = d.draw().axes[0]
    frames = [patch for patch in ax.patches if patch.get_linewidth() == 2]
    assert len(frames) == 1, 'one marked cell'
    arrow = next(patch for patch in ax.patches if type(patch).__name__ == 'FancyArrowPatch')
    assert arrow.get_linewidth() > 2
    assert to_rgb(arrow.get_edgecolor()[:3]) == to_rgb(frames[0].get_edgecolor()[:3])
    written = {text.get_text() for text in ax.texts}
    assert written == {'0', '1', '2', 'w', '3', 'n', 'o'}, 'an empty cell has no text'


@pytest.mark.parametrize('fault', ['too long for its box', 'outside', 'on a box', 'on each other'])
def test_what_cannot_be_read_is_refused(fault):
    d = Diagram(3, 3)
    d.box('a', 'a', at=(1, 1))
    if fault == 'too long for its box': d.box('b', 'a text that is far too long', at=(0, 0))
    if fault == 'outside': d.box('b', 'b', at=(3, 0))
    if fault == 'on a box': d.note('words', at=(1, 1))
    if fault == 'on each other':
        d.note('words', at=(1, 2))
        d.note('more', at=(1.1, 2))
    with pytest.raises(ValueError, match='could not be read'): d.draw()
    assert not plt.get_fignums(), 'no half-drawn figure is left for the page'


def test_a_legend_only_where_forms_differ():
    d = Diagram(3, 2)
    d.box('a', 'a', at=(0, 0), kind='layer')
    assert not [text for text in d.draw().axes[0].texts if text.get_text() == 'has weights']
    d.box('b', 'b', at=(1, 0), kind='choice')
    assert {'has weights', 'decides'} <= {text.get_text() for text in d.draw().axes[0].texts}
    assert 'decides' not in {text.get_text() for text in d.draw(legend=False).axes[0].texts}
