"""The lists that are made, never edited: README's table and pictures, sidebar, index, reference, scoreboard.

`data/parts.json` names the parts and, in order, the chapters that are written or planned; all else comes from
the notebooks' heads, their first figures, the exported modules and `data/scoreboard`. `make export` writes the
lists between their two marker lines, whatever stands there: a list that git could not merge is settled by it.
`make chapter SLUG=…` lays out the files of a planned chapter."""
import ast, base64, hashlib, io, json, re, sys, uuid
from pathlib import Path

from vitbook.book import Chapter, directives, find_chapters, write_whole
from vitbook.lab import with_setup

ROOT = Path(__file__).resolve().parents[2]
PICTURE = 216, 140                                # of the gallery: three in a row on the site
COMMENT = {'.md': '<!-- {} -->', '.ipynb': '<!-- {} -->', '.yml': '# {}'}


def parts(root: Path = ROOT) -> list[dict]:
    "The parts in order: number, folder, slug, title, sentence, and their chapters (slug, title, arxiv)."
    return json.loads((root/'data'/'parts.json').read_text(encoding='utf-8'))


def by_part(root: Path) -> list[tuple[dict, list[Chapter]]]:
    "Each part that has notebooks, with them."
    found = find_chapters(root)
    return [(part, own) for part in parts(root) if (own := [c for c in found if c.part == part['folder']])]


def link(chapter: Chapter, below: Path) -> str:
    "The notebook's address, seen from the folder `below`."
    return chapter.path.relative_to(below).as_posix()


def one_line(text: str) -> str: return re.sub(r'\s+', ' ', text).replace('|', r'\|').strip()


# ---- the gallery: the first figure of each chapter, small, a file of its own

def first_figure(path: Path) -> tuple[bytes, str] | None:
    "The first picture among a notebook's saved outputs and its caption."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        for output in cell.get('outputs', []):
            if 'image/png' in output.get('data', {}):
                picture = base64.b64decode(''.join(output['data']['image/png']))
                return picture, directives(''.join(cell['source']))[0].get('fig-cap', '')


def small(picture: bytes, mark: str) -> bytes:
    "The picture made small on a white card, as PNG with the text `mark` inside."
    from PIL import Image, ImageOps, PngImagePlugin
    whole = Image.open(io.BytesIO(picture)).convert('RGB')
    card = ImageOps.pad(whole, PICTURE, Image.Resampling.LANCZOS, color='white')
    note, out = PngImagePlugin.PngInfo(), io.BytesIO()
    note.add_text('source', mark)
    card.quantize(128, kmeans=1, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True, pnginfo=note)
    return out.getvalue()


def gallery(root: Path) -> None:
    """Write `nbs/_site/gallery/SLUG.png` where a chapter's first figure is not the one it was made from.

    Pictures without a chapter are removed."""
    from PIL import Image
    folder, wanted = root/'nbs'/'_site'/'gallery', set()
    folder.mkdir(exist_ok=True)
    for part, own in by_part(root):
        for chapter in own if part['chapters'] else ():
            found, path = first_figure(chapter.path), folder/f'{chapter.slug}.png'
            if found is None: continue
            wanted.add(path)
            mark = hashlib.sha256(found[0]).hexdigest()
            if not path.exists() or Image.open(path).info.get('source') != mark:
                path.write_bytes(small(found[0], mark))
    for path in set(folder.glob('*.png')) - wanted: path.unlink()


def shown(chapter: Chapter, root: Path, below: Path) -> str:
    "The chapter's small figure, linked to it; nothing before it has one."
    picture, found = root/'nbs'/'_site'/'gallery'/f'{chapter.slug}.png', first_figure(chapter.path)
    if found is None: return ''
    words = re.sub(r'[][]', '', one_line(f"{chapter.facts()['title']}: {found[1]}"))
    return f'[![{words}]({picture.relative_to(below).as_posix()})]({link(chapter, below)})'


# ---- the lists

def readme_chapters(root: Path) -> list[str]:
    def row(part, own):
        links = ', '.join(f"[{c.facts()['title']}]({link(c, root)})" for c in own)
        return f"| {part['number']} · {part['title']} | {links} |"
    rows = [row(part, own) for part, own in by_part(root)]
    return ['', '| part | chapters |', '|---|---|', *rows, '']


def readme_gallery(root: Path) -> list[str]:
    "One picture a part: of its first chapter that has any."
    pictures = [[shown(c, root, root) for c in own] for part, own in by_part(root) if part['chapters']]
    return ['', *(next(filter(None, own)) for own in pictures if any(own)), '']


def sidebar(root: Path) -> list[str]:
    lines = []
    for part, own in by_part(root):
        lines += [f"      - section: \"{part['number']} · {part['title']}\"", '        contents:']
        lines += [f'          - {link(c, root)}' for c in own]
    return lines


def index_chapters(root: Path) -> list[str]:
    lines = []
    for part, own in by_part(root):
        lines += ['', f"### {part['title']}", '', part['sentence'], '']
        lines += [f"- [{c.facts()['title']}]({link(c, root/'nbs')}): {c.facts()['blurb']}" for c in own]
    return [*lines, '']


def index_gallery(root: Path) -> list[str]:
    "The first figure of every chapter."
    pictures = (shown(c, root, root/'nbs') for part, own in by_part(root) if part['chapters'] for c in own)
    return ['', *filter(None, pictures), '']


def public_names(path: Path) -> list[tuple[str, bool, str]]:
    "(name, is it a class, first line of its docstring) of functions and classes in a module's `__all__`."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    assigned = [n for n in tree.body
                if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__']
    public = ast.literal_eval(assigned[0].value) if assigned else []
    found = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public]
    summary = lambda node: (ast.get_docstring(node) or '').split('\n')[0].split(' Source: ')[0]
    return [(n.name, isinstance(n, ast.ClassDef), summary(n)) for n in found]


def reference(root: Path) -> list[str]:
    lines = []
    for chapter in find_chapters(root):
        facts = chapter.facts()
        path = (root/'vitbook'/facts['module'].replace('.', '/')).with_suffix('.py')
        if facts['module'] in ('', '__init__') or not path.exists(): continue
        lines += ['', f"## vitbook.{facts['module'].removesuffix('.__init__')}", '',
                  f"[{facts['title']}]({link(chapter, root/'nbs')}): {facts['blurb']}", '',
                  '| name | what |', '|---|---|']
        for name, is_class, words in public_names(path):
            lines.append(f"| `{name}`{' (class)' if is_class else ''} | {one_line(words)} |")
    return [*lines, '']


def tolerance(record: dict) -> str:
    "Within what a record must come out again."
    if record['timed']: return 'clock'
    relative, absolute = record['rtol'], record['atol']
    words = [f'{100 * relative:g}%'] if relative else []
    if absolute: words.append(f'{absolute:g}'.replace('e-0', 'e-'))
    return ' or '.join(words) or 'exact'


def board(root: Path, folder: Path) -> list[str]:
    "The table of the records in a folder, in the book's order, and their sum."
    order = {c.slug: (i, link(c, root/'nbs')) for i, c in enumerate(find_chapters(root))}
    files = sorted((p for p in folder.glob('*.json') if p.stem in order), key=lambda p: order[p.stem][0])
    records = [record for path in files for record in json.loads(path.read_text(encoding='utf-8'))]
    lines = ['', '| chapter | claim | paper | ours | ± | holds | note |', '|---|---|---|---|---|---|---|']
    for r in records:
        ours = f"{r['ours']:{',' if isinstance(r['ours'], int) else '.4g'}} {r['unit']}".strip()
        cells = [f"[{r['chapter']}]({order[r['chapter']][1]})", r['claim'], r['paper'], ours, tolerance(r),
                 'yes' if r['holds'] else '**no**', r['note']]
        lines.append('| ' + ' | '.join(one_line(str(cell)) for cell in cells) + ' |')
    held = sum(r['holds'] for r in records)
    total = f'Claims: {len(records)}, of chapters: {len(files)}. Hold here: {held}, do not: '
    return [*lines, '', f'{total}{len(records) - held}.', '']


def claims(root: Path) -> list[str]: return board(root, root/'data'/'scoreboard')
def longer_claims(root: Path) -> list[str]: return board(root, root/'data'/'scoreboard'/'long')


LISTS = {'README.md': {'gallery': readme_gallery, 'chapters': readme_chapters},
         '_quarto.yml': {'chapters': sidebar},
         'nbs/index.ipynb': {'chapters': index_chapters, 'gallery': index_gallery},
         'nbs/reference.ipynb': {'names': reference},
         'nbs/scoreboard.ipynb': {'claims': claims, 'longer runs': longer_claims}}


def between(text: str, name: str, lines: list[str], suffix: str = '.md') -> str:
    "`text` with `lines` between the marker lines of the list `name`; ValueError unless they are there once."
    start, end = (re.escape(COMMENT[suffix].format(f'{name}: {words}'))
                  for words in ('made by make export', 'end'))
    if suffix == '.ipynb':
        lines = [f"    {json.dumps(line + chr(10), ensure_ascii=False)}," for line in lines]
    new = ''.join(f'{line}\n' for line in lines)
    pattern = re.compile(rf'^([^\n]*{start}[^\n]*\n)(.*?)(^[^\n]*{end}[^\n]*)$', re.M | re.S)
    if (times := len(pattern.findall(text))) != 1:
        raise ValueError(f'the list {name!r} must have its two marker lines once, got {times}')
    return pattern.sub(lambda m: m[1] + new + m[3], text)


def first_cells(root: Path) -> list[str]:
    "Every notebook has the cell under its title that makes it run by itself; the files that changed."
    changed = []
    for chapter in find_chapters(root):
        nb = json.loads(chapter.path.read_text(encoding='utf-8'))
        if (new := with_setup(nb)) == nb: continue
        write_whole(chapter.path, json.dumps(new, indent=1, sort_keys=True, ensure_ascii=False) + '\n')
        changed.append(chapter.path.relative_to(root).as_posix())
    return changed


def write_lists(root: Path = ROOT) -> list[str]:
    "Bring every list and every first cell up to date, lists first: what git could not merge is no notebook before."
    changed = []
    gallery(root)
    for name, lists in LISTS.items():
        path = root/name
        old = new = path.read_text(encoding='utf-8')
        for key, make in lists.items(): new = between(new, key, make(root), path.suffix)
        if new == old: continue
        write_whole(path, new)
        changed.append(name)
    return changed + first_cells(root)


# ---- a new chapter

def lay_out(slug: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a planned chapter, from the templates in `nbs/_site/chapter`.

    ValueError if it is not planned, or stands already."""
    planned = {chapter['slug']: (part, number, chapter) for part in parts(root)
               for number, chapter in enumerate(part['chapters'], 1)}
    if slug not in planned:
        raise ValueError(f'SLUG must be a chapter that data/parts.json lists, got {slug!r}')
    part, number, chapter = planned[slug]
    def own_id(m): return uuid.uuid5(uuid.NAMESPACE_URL, f'{slug} {m[0]}').hex[:8]
    words = dict(SLUG=slug, PART=part['slug'], TITLE=chapter['title'], ARXIV=chapter['arxiv'])
    tests = root/'tests'/'chapters'/slug
    files = {'chapter.ipynb': root/'nbs'/part['folder']/f'{number:02}_{slug}.ipynb',
             'test.py': tests/f'test_{slug}.py', 'parity.py': tests/'parity.py'}
    if there := [path for path in files.values() if path.exists()]:
        raise ValueError(f'{slug} stands already: {there[0]}')
    for template, path in files.items():
        text = (root/'nbs'/'_site'/'chapter'/template).read_text(encoding='utf-8')
        text = re.sub(r'\{\{(\w+)\}\}', lambda m: words[m[1]], text)
        if path.suffix == '.ipynb': text = re.sub(r'(?<="id": ")[0-9a-f]{8}(?=")', own_id, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return list(files.values())


if __name__ == '__main__':
    try:
        if sys.argv[1:2] == ['chapter']:
            for path in lay_out(*(sys.argv[2:3] or [''])): print(f'laid out {path.relative_to(ROOT)}')
        else: print('lists:', ', '.join(write_lists()) or 'nothing changed')
    except ValueError as error: sys.exit(f'contents.py: {error}')
