"""Lines one can read: Ruff's usual rules on notebooks, tests and scripts. What was written before has an allowance, a number for each file and rule, that can only fall.

`python tests/test_style.py` lowers the numbers to what there is, and raises none."""
import json, subprocess, sys
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT/'tests'/'style.json'
RULES = 'E501,E702,E703,E711,E712,E722,E9,F401,F541,F632,F811,F841,B006,B023'     # 110 columns; one statement a line; names and defaults
PLACES = 'nbs', 'tests', 'setup.py'


@cache
def cells(file: str) -> list: return json.loads(Path(file).read_text(encoding='utf-8'))['cells']


def is_directive(line: dict) -> bool:
    "Is this a caption, an alternative text or the like (`#| key: value`)? They are prose, on one line."
    if line['cell'] is None: return False
    source = ''.join(cells(line['filename'])[line['cell'] - 1]['source'])
    return source.splitlines()[line['location']['row'] - 1].startswith('#|')


def found() -> dict[str, dict[str, int]]:
    "File -> rule -> how often, in notebooks (of which the modules are made), tests and scripts."
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--exit-zero', '--line-length', '110', '--select', RULES, '--output-format', 'json', '--exclude', 'nbs/_site/chapter', *PLACES],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in json.loads(done.stdout) if line['code'] != 'E501' or not is_directive(line)]
    names = [Path(line["filename"]).relative_to(ROOT).as_posix() for line in lines]
    counts = Counter((name, line["code"] or "syntax") for name, line in zip(names, lines))
    files = {}
    for (file, rule), n in sorted(counts.items()): files.setdefault(file, {})[rule] = n
    return files


def allowed() -> dict[str, dict[str, int]]: return json.loads(ALLOWED.read_text(encoding='utf-8'))


def test_no_file_is_above_its_allowance():
    told = allowed()
    worse = [f'{file}: {n} of {rule}, {told.get(file, {}).get(rule, 0)} allowed' for file, rules in found().items() for rule, n in rules.items() if n > told.get(file, {}).get(rule, 0)]
    assert not worse, 'ruff check --line-length 110 shows where:\n' + '\n'.join(worse)


def test_the_allowance_follows_what_was_mended():
    now = found()
    better = [f'{file}: {now.get(file, {}).get(rule, 0)} of {rule}, {n} allowed' for file, rules in allowed().items() for rule, n in rules.items() if n > now.get(file, {}).get(rule, 0)]
    assert not better, '`python tests/test_style.py` lowers it:\n' + '\n'.join(better)


if __name__ == '__main__':
    now, before = found(), allowed() if ALLOWED.is_file() else None
    lowered = {file: {rule: n if before is None else min(n, before.get(file, {}).get(rule, 0)) for rule, n in rules.items()} for file, rules in now.items()}
    lowered = {file: kept for file, rules in lowered.items() if (kept := {rule: n for rule, n in rules.items() if n})}
    ALLOWED.write_text(json.dumps(lowered, indent=1) + '\n', encoding='utf-8')
