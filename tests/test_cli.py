"""The command line: what each command answers, that a mistake is one sentence and status 2, and that it works without any extra."""
import json, os, subprocess, sys

import pytest

from tools import ROOT, run
from vitbook import cli
from vitbook.cli import main, shipped_chapters

CODE = 'import sys; from vitbook.cli import main; sys.exit(main())'


@pytest.fixture
def call(capsys):
    "Status, stdout and stderr of a command in this process."
    def call(*words):
        capsys.readouterr()
        status = main(list(words))
        return status, *capsys.readouterr()
    return call


@pytest.mark.parametrize('words, say', {
    'frob': "invalid choice: 'frob'", 'run --jobs two': 'invalid int value', 'run --colour': 'unrecognized arguments', 'run atention': 'did you mean attention', 'run --device tpu': 'not one of cpu, cuda, mps, auto',
    'models vit_tiny': 'did you mean vit_tiny_patch16_224', 'models vti_*': 'did you mean vit_*?', 'models --part mixer': "part named 'mixer'", 'bench attentoin': 'there are attention', 'bench attention --sizes 0': 'at least 1',
    'bench attention --device tpu': 'not one of', 'data': 'list, fetch or verify', 'data fetch cifar': "'cifar'", 'data verify cifar': "'cifar'", 'data fetch': 'NAME', 'chapters --root /': 'not inside a checkout'}.items())
def test_a_mistake_is_one_sentence(call, words, say, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, out, err = call(*words.split())
    assert status == 2 and not out and err.startswith('vitbook: ') and len(err.splitlines()) == 1 and say in err, err


def test_help(call):
    assert call()[0] == 0
    for words in ([], ['run'], ['data', 'fetch']):
        with pytest.raises(SystemExit) as e: main([*words, '--help'])
        assert e.value.code == 0


def test_chapters(call, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT/'tests')
    rows = json.loads(call('chapters', '--json')[1])
    assert {(r['slug'], r['module']) for r in rows} >= {('attention', 'vitbook.layers.attention'), ('data', 'vitbook.data')}
    assert next(r for r in rows if r['slug'] == 'attention')['title'] == 'Attention' and 'attention' in call('chapters')[1]
    monkeypatch.chdir(tmp_path)
    status, out, err = call('chapters')
    assert status == 0 and 'vitbook.layers.attention' in out and 'in the repository' in out
    shipped = shipped_chapters(ROOT/'vitbook')
    assert {r['slug'] for r in shipped} == {r['slug'] for r in rows if r['module']} and all(r['about'] for r in shipped if r['part'])
    assert [r['part'] for r in shipped] == sorted(r['part'] for r in shipped)


def test_models(call):
    rows = json.loads(call('models', '--json')[1])
    tiny = next(r for r in rows if r['name'] == 'vit_tiny_patch16_224')
    assert tiny['parameters'] == 5_717_416 and tiny['paper'] == 'arXiv:2010.11929'
    assert {r['name'] for r in json.loads(call('models', 'vit_*', '--json')[1])} == {r['name'] for r in rows if r['name'].startswith('vit_')} < {r['name'] for r in rows}
    assert json.loads(call('models', '--part', tiny['part'], '--json')[1]) == [r for r in rows if r['part'] == tiny['part']]
    out = call('models', 'vit_tiny_*')[1].splitlines()
    assert out[0].split() == ['model', 'parameters', 'part', 'chapter', 'paper'] and out[1].split()[:3] == ['vit_tiny_patch16_224', '5.7', 'M']


def test_data(call, tmp_path, monkeypatch):
    monkeypatch.setenv('VITBOOK_DATA', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    assert {'digits', 'cifar10'} <= {r['name'] for r in json.loads(call('data', 'list', '--json')[1])} and 'digits' in call('data', 'list')[1]
    status, out, err = call('data', 'fetch', 'shakespeare')
    assert status == 2 and len(err.splitlines()) == 1 and 'VITBOOK_DATA' in err, 'offline: one sentence with the ways out'
    (tmp_path/'tinyshakespeare.txt').write_text('To be')
    status, out, err = call('data', 'verify', 'shakespeare')
    assert status == 1 and 'altered' in out and 'tinyshakespeare.txt of shakespeare is altered' in err
    assert call('data', 'verify')[0] == 1


def test_doctor(call, monkeypatch):
    import torch
    report = json.loads(call('doctor', '--json')[1])
    assert report['facts']['torch'] == torch.__version__ and report['facts']['threads of torch'] == torch.get_num_threads()
    assert [r['backend'] for r in report['backends']] == ['naive', 'sdpa', 'flex', 'blockwise', 'twice', 'triton'] and report['device'] in ('cpu', 'cuda', 'mps')
    taken = {r['asked for']: r['takes'] for r in report['taken']}
    assert taken['the output'] == 'sdpa' and taken['weights'] == 'naive' and (taken['entropy'], taken['entropy alone, for a probe']) in (('blockwise', 'twice'), ('triton', 'triton'), ('blockwise', 'blockwise')) and 'loop' in {r['backend'] for r in report['packed']}
    monkeypatch.setattr(cli.metadata, 'requires', lambda name: ['torch>=2', 'nosuchthing>=1; extra == "book"', 'numpy; extra == "book"', 'nosuchthing; sys_platform == "plan9" and extra == "gpu"'])
    monkeypatch.setattr(cli.metadata, 'metadata', lambda name: type('', (), {'get_all': lambda self, key: ['book', 'gpu']})())
    assert cli.extras() == dict(book=['nosuchthing'], gpu=[])
    out = call('doctor')[1]
    assert 'missing: nosuchthing' in out and 'blockwise' in out and 'why not' in out


def test_bench(call, monkeypatch, tmp_path):
    from vitbook import bench
    assert {'attention', 'entropy_attention'} <= {r['name'] for r in json.loads(call('bench', '--list', '--json')[1])} and 'packed_attention' in call('bench', '--list')[1]
    report = json.loads(call('bench', 'entropy_attention', '--sizes', '8', '16', '--json')[1])
    assert report['bench'] == 'entropy_attention' and {r['n'] for r in report['forward']['rows']} == {8, 16} and all(r['median'] > 0 for r in report['train']['rows'])
    shown = call('bench', 'attention', '--sizes', '8')[1]
    assert 'blockwise' in shown and 'of sdpa' in shown and 'train, cpu' in shown
    status, out, err = call('bench', 'atention')
    assert status == 2 and len(err.splitlines()) == 1 and 'no bench named' in err
    assert call('bench', 'attention', '--sizes', '0')[0] == 2
    monkeypatch.setattr(cli, 'find_root', lambda start=None: tmp_path)
    err = call('bench', 'set_attention', '--sizes', '40', '--save')[2]
    assert 'saved: benchmarks/cpu/set_attention.json' in err and json.loads((tmp_path/'benchmarks'/'cpu'/'set_attention.json').read_text())['sizes'] == [40]
    monkeypatch.setattr(bench, '_entries', {k: v for k, v in bench._entries.items() if k in ('attention', 'set_attention')})
    assert [r['bench'] for r in json.loads(call('bench', '--sizes', '40', '--json')[1])] == ['attention', 'set_attention'], 'without a name, all'


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, 'find_root', lambda start=None: 1 / 0)
    with pytest.raises(ZeroDivisionError): main(['chapters'])


def test_closed_pipe():
    done = subprocess.run(f'"{sys.executable}" -c "{CODE}" data list | head -c 1', shell=True, capture_output=True, text=True, cwd=ROOT)
    assert len(done.stdout) == 1 and not done.stderr


def test_without_extras(bare, tmp_path):
    "Where no extra is installed all commands but `run` work, and `run` says in one sentence what to install."
    here = dict(PYTHONPATH=os.pathsep.join([str(ROOT/'tests'/'offline'), str(ROOT)]))
    assert 'vit_tiny_patch16_224' in run(bare, '-c', CODE, 'models', cwd=tmp_path, **here).stdout
    assert 'vitbook.layers.attention' in run(bare, '-c', CODE, 'chapters', cwd=tmp_path, **here).stdout
    done = run(bare, '-c', CODE, 'run', 'norms', cwd=ROOT, check=False, **here)
    assert done.returncode == 2 and "pip install 'vitbook[book]'" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    code = "import sys, vitbook.cli; assert not {'rich', 'typer', 'nbclient', 'nbformat', 'nbconvert', 'matplotlib', 'torch'} & set(sys.modules)"
    run(sys.executable, '-c', code, cwd=ROOT)
