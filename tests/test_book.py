"""The runner: what is skipped, what a failure, a kill or a full disk leaves behind, what a page holds and what it never loads."""
import base64, json, os, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tools import ROOT, run
from vitbook.book import BookError, canonical, choose, directives, find_chapters, loads_elsewhere, outputs_hash, source_hash, unvouched, run_book, to_mathml, write_whole
from vitbook.cli import main

VITBOOK = [sys.executable, '-c', 'import sys; from vitbook.cli import main; sys.exit(main())']
PNG = base64.b64encode(bytes.fromhex('89504e470d0a1a0a')).decode()
SHOW = f"from IPython.display import display\ndisplay({{'image/png': '{PNG}'}}, raw=True)"
TITLE = 'md:# {}\n\n> A blurb.\n\n| | |\n|---|---|\n| module | - |\n| run time | - |'


def cell(source): return v4.new_markdown_cell(source[3:]) if source.startswith('md:') else v4.new_code_cell(source)


def notebook(path, *sources):
    path.parent.mkdir(parents=True, exist_ok=True)
    nb = v4.new_notebook(cells=[cell(s) for s in (TITLE.format(path.stem), *sources)], metadata={'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}})
    for i, c in enumerate(nb.cells): c.id = f'c{i}'
    path.write_text(canonical(nb), encoding='utf-8')
    return path


@pytest.fixture
def root(tmp_path):
    "A checkout with a library, data, and no notebooks yet."
    root = tmp_path/'checkout'
    for folder in ('nbs', 'vitbook', 'data'): (root/folder).mkdir(parents=True)
    shutil.copy(ROOT/'settings.ini', root)
    (root/'vitbook'/'lib.py').write_text('x = 1\n')
    (root/'data'/'file.txt').write_text('1\n')
    return root


def go(root, *names, **kw): return {r.chapter.slug: r for r in run_book(names, root=root, show=False, **kw)}
def page(root, name): return (root/'_book'/name).read_text(encoding='utf-8')
def leftovers(root): return [p for p in root.rglob('*') if p.name.endswith('.tmp')]


# ---- names and order

def test_names(root):
    for path in ('index', 'scoreboard', '01_dynamics/01_urpe', '01_dynamics/02_scan_and_snap', '00_foundations/03_attention', '.hidden/x', '_site/y'): notebook(root/'nbs'/f'{path}.ipynb')
    chapters = find_chapters(root)
    def slugs(*names): return [c.slug for c in choose(chapters, names)]
    assert slugs() == slugs('all') == ['index', 'attention', 'urpe', 'scan_and_snap', 'scoreboard']
    assert slugs('dynamics') == slugs('01_dynamics') == slugs('01') == slugs('scan_and_snap', 'urpe') == ['urpe', 'scan_and_snap']
    assert slugs('03_attention') == slugs('nbs/00_foundations/03_attention.ipynb') == slugs('attention', 'attention') == ['attention']
    for wrong, say in dict(atention='did you mean attention', dynamic='did you mean dynamics', zzz='`vitbook chapters` lists them').items():
        with pytest.raises(BookError, match=say): choose(chapters, [wrong])


def test_mistakes_run_nothing(root, monkeypatch, capsys):
    notebook(root/'nbs'/'a.ipynb', 'open("ran", "w")')
    import torch
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for words, say in ((['b'], "no chapter or part named 'b'"), (['--device', 'cuda'], "'cuda' is not there"), (['--device', 'tpu'], 'not one of cpu, cuda, mps, auto'),
                       (['--jobs', '0'], 'jobs is 0'), (['--timeout', '0'], 'timeout is 0'), (['--out', str(root/'settings.ini')], 'cannot write')):
        assert main(['run', *words, '--root', str(root)]) == 2
        out, err = capsys.readouterr()
        assert say in err and len(err.splitlines()) == 1 and 'Traceback' not in err, err
    assert main(['run', '--root', str(root/'data'/'..'/'..')]) == 2 and 'not inside a checkout' in capsys.readouterr().err
    assert not (root/'ran').exists()


# ---- skipping

def test_inputs():
    def nb(*sources, outputs=()):
        nb = v4.new_notebook(cells=[cell(s) for s in sources])
        for c in nb.cells:
            if c.cell_type == 'code': c.outputs = [v4.new_output('stream', text=t) for t in outputs]
        return nb
    base = source_hash(nb('md:# a\n\n| run time | - |', 'x = 1'))
    assert base == source_hash(nb('md:# a\n\n| run time | 9 s on one CPU core |', 'x = 1', outputs=['old'])), 'what a run writes is not an input'
    for other in (source_hash(nb('md:# b\n\n| run time | - |', 'x = 1')), source_hash(nb('md:# a\n\n| run time | - |', 'x = 2')),
                  source_hash(nb('md:# a\n\n| run time | - |', 'x = 1'), 'cuda'), source_hash(nb('md:# a\n\n| run time | - |', 'md:x = 1'))): assert other != base
    assert source_hash(nb('#| slow\nx', outputs=['1'])) != source_hash(nb('#| slow\nx', outputs=['2'])), 'saved outputs of a skipped cell are on the page'
    assert outputs_hash(nb('x', outputs=['1'])) != outputs_hash(nb('x', outputs=['2'])) and outputs_hash(nb('x')) == outputs_hash(nb('y'))


def test_unchanged_is_skipped(root):
    notebook(root/'nbs'/'p'/'01_a.ipynb', 'open("count", "a").write("x")')
    def count(): return len((root/'count').read_text())
    r = go(root)['a']
    assert r.status == 'ran' and 0 < r.seconds < 60 and 10 < r.peak_mb < 1000
    made = (root/'_book'/'p'/'01_a.html').stat().st_mtime_ns
    state = (root/'_book'/'.state'/'p'/'a.json').read_text()
    again = go(root)['a']
    assert (again.status, again.seconds, count()) == ('unchanged', r.seconds, 1) and (root/'_book'/'p'/'01_a.html').stat().st_mtime_ns == made
    assert go(root, fresh=True)['a'].status == 'ran' and count() == 2
    (root/'vitbook'/'lib.py').write_text('x = 2\n')
    assert go(root)['a'].status == 'unchanged', 'it did not import the module'
    (root/'_book'/'.state'/'p'/'a.json').write_text(state.replace('"maker": "', '"maker": "0'))
    assert go(root)['a'].status == 'ran' and count() == 3, 'pages are made by another program'
    (root/'_book'/'p'/'01_a.html').unlink()
    assert go(root)['a'].status == 'ran' and count() == 4
    (root/'_book'/'.state'/'p'/'a.json').write_text('{"status": "ra')
    assert go(root)['a'].status == 'ran' and count() == 5
    assert not leftovers(root)


# ---- failures

def test_a_failing_chapter_stops_no_other(root, capsys):
    for i, (name, code) in enumerate(dict(a='print("fine")', b='def f():\n    raise ValueError("no <b>good</b>")\nf()', c='import os; os._exit(3)', e='print("fine")').items()):
        notebook(root/'nbs'/'p'/f'0{i}_{name}.ipynb', code)
    (root/'nbs'/'p'/'09_f.ipynb').write_text('{"cells": [')
    assert main(['run', '--root', str(root), '--jobs', '2']) == 1
    out = capsys.readouterr().out
    for line in (r'p/a +ran', r'p/b +failed', r'p/c +failed', r'p/e +ran', r'p/f +failed'): assert re.search(line, out), out
    for name, say in {'01_b': ['ValueError', 'no &lt;b&gt;good', 'def f():'], '02_c': ['the kernel died'], '09_f': ['is not a notebook']}.items():
        text = page(root, f'p/{name}.html')
        assert 'did not run to its end' in text and all(s in text for s in say) and text.endswith('</html>\n')
    index = page(root, 'index.html')
    assert index.count('>failed<') == 3 and index.count('>ran here<') == 2 and 'href="p/01_b.html"' in index
    notebook(root/'nbs'/'p'/'01_b.ipynb', 'print("mended")')
    assert main(['run', 'a', 'b', '--root', str(root)]) == 0
    assert 'mended' in page(root, 'p/01_b.html') and re.search(r'p/a +unchanged', capsys.readouterr().out)
    notebook(root/'nbs'/'p'/'01_b.ipynb', '1/0')
    assert go(root, 'b')['b'].error.startswith('ZeroDivisionError') and 'mended' not in page(root, 'p/01_b.html'), 'a page of an older state is not kept'


def test_over_time(root):
    notebook(root/'nbs'/'a.ipynb', 'import time; time.sleep(60)')
    began = time.time()
    r = go(root, timeout=3)['a']
    assert r.status == 'over time' and r.error == 'stopped after 3 s' and time.time() - began < 30 and 'over time' in page(root, 'a.html') and '>over time<' in page(root, 'index.html')


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError: return False


@pytest.mark.skipif(sys.platform != 'linux', reason='looks at processes through /proc')
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_killed_and_resumed(root, how):
    wait = 'import os, time\nopen("pid", "w").write(str(os.getpid()))\nos.rename("pid", "kernel")\nwhile not os.path.exists("go"): pass'      # busy: it cannot look after its parent
    for name, code in dict(a='print("fine")', b=wait, c='print("fine")').items(): notebook(root/'nbs'/'p'/f'{name}.ipynb', code)
    p = subprocess.Popen([*VITBOOK, 'run', '--jobs', '1', '--root', str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    deadline = time.time() + 120
    while not (root/'kernel').exists() and time.time() < deadline: time.sleep(.05)
    kernel = int((root/'kernel').read_text())
    assert alive(kernel)
    p.send_signal(how)
    out, err = p.communicate(timeout=20)
    if how == signal.SIGKILL: assert p.returncode == -how
    else: assert p.returncode == 130 and 'goes on from there' in err and 'Traceback' not in err, err
    deadline = time.time() + 10
    while alive(kernel) and time.time() < deadline: time.sleep(.05)
    assert not alive(kernel), 'the kernel outlived the run'
    assert page(root, 'p/a.html').rstrip().endswith('</html>') and not (root/'_book'/'p'/'b.html').exists() and not (root/'_book'/'p'/'c.html').exists()
    assert page(root, 'index.html').count('>ran here<') == 1
    (root/'go').touch()
    assert {k: r.status for k, r in go(root).items()} == dict(a='unchanged', b='ran', c='ran') and not leftovers(root)


def test_a_kill_while_a_page_is_written_leaves_the_old_one(tmp_path):
    page = tmp_path/'page.html'
    write_whole(page, 'old')
    for moment in ('os.replace', 'os.fsync'):
        code = f'import os, sys; from pathlib import Path; from vitbook.book import write_whole; {moment} = lambda *a: os.kill(os.getpid(), 9); write_whole(Path(sys.argv[1]), "new" * 10**5)'
        assert run(sys.executable, '-c', code, page, check=False).returncode == -9 and page.read_text() == 'old'
    assert leftovers(tmp_path), 'the kill came before the new page was in its place'
    write_whole(page, 'new')
    assert page.read_text() == 'new'


def test_leftovers_of_killed_runs_are_swept(root):
    notebook(root/'nbs'/'a.ipynb', '1')
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    (root/'_book').mkdir()
    for pid in (dead.pid, os.getpid()): (root/'_book'/f'.b.html.{pid}.tmp').write_text('half')
    go(root)
    assert [p.name for p in leftovers(root)] == [f'.b.html.{os.getpid()}.tmp'], 'of dead processes only'


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_progress_on_a_terminal(root):
    import pty
    notebook(root/'nbs'/'p'/'a.ipynb', 'print(1)', 'print(2)')
    notebook(root/'nbs'/'p'/'b.ipynb', '1/0')
    ours, theirs = pty.openpty()
    p = subprocess.Popen([*VITBOOK, 'run', '--root', str(root)], stdout=theirs, stderr=theirs, env={**os.environ, 'PYTHONPATH': str(ROOT), 'TERM': 'xterm', 'COLUMNS': '120'})
    os.close(theirs)
    said = b''
    try:
        while block := os.read(ours, 65536): said += block
    except OSError: pass                                     # Linux: the other end was closed
    said = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', said.decode())
    assert p.wait() == 1 and re.search(r'p/a +.*[012]/2', said) and re.search(r'the book .*2/2', said) and 'failed: p/b  ZeroDivisionError' in said and re.search(r'p/a +ran', said), said


# ---- folders that do not take a page

@pytest.mark.skipif(os.name != 'posix', reason='uses a limit on the size of files')
def test_a_full_output_folder_loses_nothing(root):
    notebook(root/'nbs'/'a.ipynb', 'print("first")')
    go(root)
    before = {p: p.read_bytes() for p in (root/'_book').rglob('*') if p.is_file()} | {(p := notebook(root/'nbs'/'a.ipynb', 'print("second")')): p.read_bytes()}
    done = subprocess.run([*VITBOOK, 'run', '--inplace', '--root', str(root)], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))        # a page has more
    assert done.returncode == 2 and re.search(r'^vitbook: cannot write \S+/a.html: .+ untouched$', done.stderr.strip()), done.stderr
    assert 'first' in page(root, 'a.html') and not leftovers(root)
    assert all(p.read_bytes() == b for p, b in before.items() if p.name != 'a.ipynb')
    assert go(root)['a'].status == 'ran' and 'second' in page(root, 'a.html')


def test_unwritable_output(root, capsys):
    notebook(root/'nbs'/'a.ipynb', 'open("ran", "w")')
    (root/'file').write_text('precious')
    for out in (root/'file', root/'file'/'below'):
        assert main(['run', '--root', str(root), '--out', str(out)]) == 2
        assert re.match(r'vitbook: cannot write .+\n$', capsys.readouterr().err) and (root/'file').read_text() == 'precious'
    if os.getuid():
        (root/'closed').mkdir(mode=0o500)
        assert main(['run', '--root', str(root), '--out', str(root/'closed')]) == 2
    assert not (root/'ran').exists(), 'found out before anything ran'


# ---- what runs where

def test_environment_of_a_chapter(root, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '7')
    (root/'vitbook'/'__init__.py').write_text('here = True\n')
    notebook(root/'nbs'/'p'/'a.ipynb', 'import json, os, vitbook', '#| slow\n1/0', '#| eval: false\n1/0', '#| cuda\n1/0',
             'json.dump({k: os.environ[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "VITBOOK_DEVICE", "VITBOOK_RECORDS")} | dict(cwd=os.getcwd(), here=vitbook.here), open("seen.json", "w"))')
    assert go(root)['a'].status == 'ran'
    seen = json.loads((root/'seen.json').read_text())
    assert (seen['OMP_NUM_THREADS'], seen['MKL_NUM_THREADS'], seen['VITBOOK_DEVICE'], seen['cwd'], seen['here']) == ('1', '1', 'cpu', str(root.resolve()), True)


def test_records_and_scoreboard(root):
    "A record counts only when its chapter ran well; the scoreboard runs last, sees all, and runs again when one changes."
    write = 'import json, os\njson.dump([{}], open(os.environ["VITBOOK_RECORDS"] + "/{}.json", "w"))'
    notebook(root/'nbs'/'p'/'a.ipynb', write.format(1, 'a'))
    notebook(root/'nbs'/'p'/'b.ipynb', write.format(1, 'b'), '1/0')
    notebook(root/'nbs'/'scoreboard.ipynb', 'import os\nfolder = os.environ["VITBOOK_RECORDS"]\nprint("seen", {name: open(f"{folder}/{name}").read() for name in os.listdir(folder)})')
    assert {k: r.status for k, r in go(root).items()} == dict(a='ran', b='failed', scoreboard='ran')
    assert "seen {'a.json': '[1]'}" in re.sub('&#39;', "'", page(root, 'scoreboard.html')) and [p.name for p in (root/'_book'/'records').iterdir()] == ['a.json']
    assert go(root, 'a', 'scoreboard')['scoreboard'].status == 'unchanged'
    notebook(root/'nbs'/'p'/'a.ipynb', write.format(2, 'a'))
    assert go(root, 'a', 'scoreboard')['scoreboard'].status == 'ran'
    notebook(root/'nbs'/'p'/'a.ipynb', 'print("nothing to record")')
    go(root, 'a')
    assert not list((root/'_book'/'records').iterdir())


# ---- in place

def test_inplace(root):
    path = notebook(root/'nbs'/'p'/'01_a.ipynb', 'object()', '#| slow\nprint("an hour")', 'import json, os, time\njson.dump([], open(os.environ["VITBOOK_RECORDS"] + "/a.json", "w"))\nprint("now")')
    nb = nbformat.read(path, 4)
    nb.cells[2].outputs = [v4.new_output('stream', text='kept\n')]
    path.write_text(canonical(nb))
    plain = path.read_bytes()
    assert go(root)['a'].status == 'ran' and path.read_bytes() == plain, 'without --inplace the notebook stays as it is'
    r = go(root, inplace=True)['a']
    assert r.status == 'ran' and (root/'data'/'scoreboard'/'a.json').is_file()
    text = path.read_text()
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    assert nb.cells[1].outputs[0].data['text/plain'] == '<object>' and nb.cells[2].outputs[0].text == 'kept\n' and nb.cells[3].outputs[0].text == 'now\n'
    assert re.search(r'^\| run time \| [\d.]+ s on one CPU core \|$', nb.cells[0].source, re.M)
    assert nb.metadata.vitbook == dict(seconds=round(r.cpu_seconds or r.seconds, 1), peak_mb=round(r.peak_mb)) and all(c.get('execution_count') is None for c in nb.cells)
    run(sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})', cwd=root)
    assert path.read_text() == text, 'nbdev_clean has nothing left to do'
    assert go(root, inplace=True)['a'].status == 'unchanged' and go(root)['a'].status == 'unchanged'
    path.write_bytes(plain)
    assert go(root, inplace=True)['a'].status == 'ran', 'the outputs were lost'
    def same(t): return re.sub(r'[\d.]+ s on|"(seconds|peak_mb)": [\d.]+', '', t)
    assert same(path.read_text()) == same(text)


def test_slow_cells_run_when_asked_for(root):
    "Their outputs and records are written, the header keeps the time of an ordinary run, and an ordinary run afterwards leaves both alone."
    code = 'import os\nfrom vitbook.measure import record\nrecord("a", "short", ours=1, holds=True, atol=0);'
    path = notebook(root/'nbs'/'p'/'01_a.ipynb', code, '#| slow\nprint("an hour")\nrecord("a", "long", ours=2, holds=False, atol=0, long=True);', '#| eval: false\n1/0')
    board = root/'data'/'scoreboard'
    assert go(root, inplace=True)['a'].status == 'ran' and (board/'a.json').is_file() and not (board/'long').exists()
    head = nbformat.read(path, 4).cells[0].source
    assert go(root, inplace=True)['a'].status == 'unchanged' and go(root, inplace=True, slow=True)['a'].status == 'ran'
    nb = nbformat.read(path, 4)
    assert nb.cells[2].outputs[0].text == 'an hour\n' and not nb.cells[3].outputs and nb.cells[0].source == head and 's on one CPU core' in head
    short, long = (board/'a.json').read_text(), (board/'long'/'a.json').read_text()
    assert [line['claim'] for line in json.loads(long)] == ['long'] and [line['claim'] for line in json.loads(short)] == ['short']
    assert go(root, inplace=True, fresh=True)['a'].status == 'ran'
    assert nbformat.read(path, 4).cells[2].outputs[0].text == 'an hour\n' and (board/'long'/'a.json').read_text() == long


def test_inplace_failures_write_nothing(root):
    bad = notebook(root/'nbs'/'bad.ipynb', 'print(1)', '1/0')
    edited = notebook(root/'nbs'/'edited.ipynb', 'p = "nbs/edited.ipynb"\ntext = open(p).read().replace("A blurb", "Better")\nopen(p, "w").write(text)')
    before = bad.read_bytes()
    r = go(root, inplace=True)
    assert r['bad'].status == 'failed' and bad.read_bytes() == before
    assert r['edited'].status == 'failed' and 'edited while it ran' in r['edited'].error and 'Better' in edited.read_text() and '"outputs": []' in edited.read_text()


# ---- pages

def test_directives():
    d, rest = directives('#| label: fig-a\n#| fig-cap: "A: b"\n#| fig-alt: a long\n#|   description\n#| hide\n#|slow\n\nx = 1  #| not one\n')
    assert d == {'label': 'fig-a', 'fig-cap': 'A: b', 'fig-alt': 'a long description', 'hide': '', 'slow': ''} and rest == 'x = 1  #| not one\n'
    assert directives('#| default_exp layers.embed\n')[0] == {'default_exp': 'layers.embed'} and directives('x = 1')[0] == {}


def test_page(root):
    notebook(root/'nbs'/'p'/'01_a.ipynb', f'#| label: fig-one\n#| fig-cap: Where $x^2$ is.\n#| fig-alt: A "small" <thing>\n{SHOW}', '#| hide\nprint("not shown")', '#| echo: false\nprint("only this")',
             'md:## It is a section\n\nInline $a_{ij}<b$, and\n\n$$ \\sum_j p_{ij} = 1 $$ {#eq-sum}\n\nSee @fig-one, @eq-sum, [next](../q/02_b.ipynb#it-is), [home](../index.ipynb), [out](https://example.org/x.ipynb).\n\n'
             '<details><summary>Solution</summary>\n\n```python\nfolded = 1\n```\n\n</details>',
             'import ipywidgets\n@ipywidgets.interact(a=(0, 3))\ndef f(a=2): print("control says", a)')
    notebook(root/'nbs'/'index.ipynb', 'print(1)')
    assert all(r.good for r in go(root).values())
    text = page(root, 'p/01_a.html')
    assert re.search(r'<img alt=(["\'])A ("|&quot;)small("|&quot;) &lt;thing&gt;\1', text) and re.search(r'<figure id="fig-one">.*?<figcaption>Figure 1: Where <math.*?</math> is\.</figcaption>', text, re.S)
    assert 'not shown' not in text and 'only this' in text and 'print("only' not in re.sub('&quot;', '"', re.sub('<[^>]+>', '', text)) and '#|' not in text.split('<main>')[1]
    assert text.count('<math') == 3 and '$' not in text.split('<main>')[1] and 'class="tex"' not in text and 'MathJax' not in text
    assert '<h2 id="it-is-a-section">' in text and '<a href="#fig-one">Figure 1</a>' in text and '<a href="#eq-sum">Equation 1</a>' in text and 'id="eq-sum"' in text
    assert 'href="../q/02_b.html#it-is"' in text and 'href="../home.html"' in text and 'href="https://example.org/x.ipynb"' in text
    assert re.search(r'<details><summary>Solution</summary>.*?folded.*?</details>', text, re.S)
    assert 'control says 2' in text and 'widget-view' not in text and 'run time</td>\n<td>-' not in text
    assert not loads_elsewhere(text) and not loads_elsewhere(page(root, 'index.html')) and 'href="home.html"' in page(root, 'index.html')
    assert (root/'_book'/'home.html').is_file() and 'href="../index.html"' in text
    def same(t): return re.sub(r'[\d.]+ s on', '', t)
    assert go(root, 'a', fresh=True)['a'].status == 'ran' and same(page(root, 'p/01_a.html')) == same(text), 'a second run gives the same page'


def test_pages_load_nothing():
    for bad in ('<script src="https://cdn.example/x.js"></script>', '<link rel=stylesheet href="//cdn.example/x.css">', '<img alt="" src="http://a.example/x.png">', '<img srcset="https://a.example/x.png 2x">',
                '<iframe srcdoc="&lt;script src=&quot;https://cdn.example/x.js&quot;&gt;&lt;/script&gt;"></iframe>', '<style>@font-face { src: url("https://a.example/f.woff") }</style>', '<style>@import "https://a.example/x.css";</style>',
                '<p style="background: url(https://a.example/x.png)">', '<script>const m = import("https://cdn.example/m.mjs")</script>', '<script type=module>import a from "https://cdn.example/m.mjs"</script>', '<svg><image href="https://a.example/x.png"/></svg>'):
        assert loads_elsewhere(bad), bad
    for good in ('<a href="https://example.org">x</a>', '<img src="data:image/png;base64,xx//yy">', '<script src="x.js"></script>', '<svg xmlns="http://www.w3.org/2000/svg"></svg>', '<script>// see https://example.org</script>', '<p>https://example.org</p>'):
        assert not loads_elsewhere(good), good


def test_an_output_that_loads_from_elsewhere_fails(root):
    notebook(root/'nbs'/'a.ipynb', 'from IPython.display import HTML\nHTML("<script src=\'https://cdn.example/x.js\'></script>")')
    r = go(root)['a']
    assert r.status == 'failed' and 'https://cdn.example/x.js' in r.error


def test_math():
    for tex in (r'\frac{1}{\sqrt{d}}', r'\mathrm{softmax}(QK^\top)', r'\begin{aligned} a &= b \\ c &= d \end{aligned}', r'\hat x \in \mathbb{R}^{n \times d}', r'\bigl\| x \bigr\|^2 + \bigcup_i A_i', 'a < b'):
        assert (m := to_mathml(tex, block=True)).startswith('<math') and '\\' not in m, m
    assert 'class="tex"' in to_mathml(r'\frac{1}{') and '<script' not in to_mathml('<script>')


def test_a_whole_notebook_of_the_book(tmp_path):
    "One real chapter, with figures, makes a page that is complete and loads nothing."
    r = run_book(['norms'], root=ROOT, out=tmp_path, show=False)[0]
    assert r.status == 'ran' and 'class="tex"' not in (text := (tmp_path/r.chapter.page).read_text()) and not loads_elsewhere(text) and 'alt=""' not in text
