"""Quarto's post-render step: takes out of every page what Quarto adds for `text/html` outputs, two scripts from another host.

RequireJS and jQuery serve widgets of the classic notebook; nothing of ours needs them. Run twice, it changes nothing more.
Quarto sets QUARTO_PROJECT_OUTPUT_DIR; by hand: `python nbs/_site/offline.py FOLDER`."""
import os, re, sys
from pathlib import Path

SCRIPT = re.compile(r'[ \t]*<script\b[^>]*\bsrc="(?:https?:)?//[^"]*\b(?:require|jquery)[\w.-]*\.js"[^>]*>\s*</script>[ \t]*\n?', re.I)
DEFINE = re.compile(r'[ \t]*<script\b[^>]*>\s*define\(\s*[\'"]jquery[\'"].*?</script>[ \t]*\n?', re.I | re.S)   # tells RequireJS that jQuery is there


def clean(html):
    "The page without the two scripts and the line that joins them; all else untouched."
    return DEFINE.sub('', SCRIPT.sub('', html))


def main(folder):
    changed = 0
    for path in sorted(Path(folder).rglob('*.html')):
        text = path.read_bytes().decode('utf-8')
        if (short := clean(text)) != text:
            path.write_bytes(short.encode('utf-8'))
            changed += 1
    print(f'offline.py: scripts of other hosts removed from {changed} pages')


if __name__ == '__main__':
    folder = sys.argv[1] if len(sys.argv) > 1 else os.environ.get('QUARTO_PROJECT_OUTPUT_DIR')
    if not folder: sys.exit('offline.py: name the folder of the rendered site, or let Quarto set QUARTO_PROJECT_OUTPUT_DIR')
    main(folder)
