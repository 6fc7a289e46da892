"""Packaging: everything is read from settings.ini, so that names, versions and dependencies stand in one place."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def words(key):
    "The requirements listed under `key`, with every @NAME replaced by the extra NAME's own."
    for word in cfg.get(key, '').split():
        if word.startswith('@'): yield from words(f'{word[1:]}_requirements')
        else: yield word

extras = {key.removesuffix('_requirements'): list(dict.fromkeys(words(key))) for key in cfg if key.endswith('_requirements')}
minor = int(cfg['min_python'].split('.')[1])

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': cfg['git_url']},
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', python_requires=f">={cfg['min_python']}",
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education', 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 *(f'Programming Language :: Python :: 3.{v}' for v in range(minor, 14))],
    packages=[*find_packages(include=['vitbook', 'vitbook.*']), 'vitbook._data'],
    package_dir={'vitbook._data': 'data'}, package_data={'vitbook': ['py.typed'], 'vitbook._data': ['*.json', 'files/*', 'scoreboard/*.json', 'scoreboard/long/*.json']},
    install_requires=list(words('requirements')), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
