"""Quarto's other post-render step: under each chapter's title, links to Colab, to its source, and to its module in the reference.

They follow from the page's place and settings.ini, so that no notebook has to carry them. Run twice, it changes nothing more."""
import html, json, os, re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def project(root=ROOT):
    "The repository's address and branch, from settings.ini."
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']['git_url'], parser['DEFAULT']['branch']


def module(notebook):
    "The module that a notebook exports, None if it exports none."
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        found = re.match(r'#\|\s*default_exp\s+(\S+)', ''.join(cell['source']))
        if cell['cell_type'] == 'code' and found: return found[1].removesuffix('.__init__')


def links(notebook, root=ROOT):
    "The line of links for the page of `notebook` (a path below nbs/)."
    url, branch = project(root)
    place, name = f'nbs/{notebook.as_posix()}', module(root/'nbs'/notebook)
    made = [('Open in Colab', f"{url.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/{branch}/{place}"), ('View source', f'{url}/blob/{branch}/{place}')]
    if name and name != '__init__': made.append(('Module API', '../' * (len(notebook.parts) - 1) + f'reference.html#vitbook.{name}'))
    return '<p class="page-links">' + ' · '.join(f'<a href="{html.escape(href)}">{text}</a>' for text, href in made) + '</p>'


def add(page, line):
    "The page with the line under its title, unless it has one."
    if 'class="page-links"' in page: return page
    return re.sub(r'(<header id="title-block-header"[^>]*>.*?</header>)', lambda m: m[1] + '\n' + line, page, count=1, flags=re.S)


def main(folder, root=ROOT):
    changed = 0
    for path in sorted(Path(folder, 'nbs').rglob('*.html')):
        notebook = path.relative_to(Path(folder, 'nbs')).with_suffix('.ipynb')
        if not (root/'nbs'/notebook).exists(): continue
        text = path.read_text(encoding='utf-8')
        if (more := add(text, links(notebook, root))) != text:
            path.write_text(more, encoding='utf-8')
            changed += 1
    print(f'links.py: links added to {changed} pages')


if __name__ == '__main__':
    folder = sys.argv[1] if len(sys.argv) > 1 else os.environ.get('QUARTO_PROJECT_OUTPUT_DIR')
    if not folder: sys.exit('links.py: name the folder of the rendered site, or let Quarto set QUARTO_PROJECT_OUTPUT_DIR')
    main(folder)
