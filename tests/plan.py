"""What a check runs of the book: everything that the lock does not vouch for, and a sample of the rest."""
import functools, subprocess, zlib

from tools import ROOT, notebooks
from vitbook import lock
from vitbook.book import unvouched

BUDGET = 14 * 60    # seconds of a core that the notebooks of one check may take together
SAMPLE = 4 * 60     # of these, for notebooks that are not stale


def commit():
    "The commit's hash; in an exported tree, without git, what the lock says."
    done = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or lock.digest(lock.lock_text(lock.read_lock(ROOT)))


class Plan:
    "`stale`: label -> why; `drawn`: the sample; `todo`: what is run. With `everything` all is drawn."

    def __init__(self, everything=False, seed=None, shard=''):
        self.everything, self.stale = everything, unvouched(ROOT)
        seconds = {self.label(n): n.meta.get('vitbook', {}).get('seconds') or 60. for n in notebooks()}
        self.stale_seconds = sum(seconds[label] for label in self.stale)
        rest = {label: s for label, s in seconds.items() if label not in self.stale}
        left = max(0, min(SAMPLE, BUDGET - self.stale_seconds))
        self.drawn = sorted(rest) if everything else lock.draw(rest, seed or commit(), left)
        fits = everything or self.stale_seconds <= BUDGET
        self.todo = [*(self.stale if fits else ()), *self.drawn]
        if shard:
            k, n = map(int, shard.split('/'))
            self.todo = [label for label in self.todo if zlib.crc32(label.encode()) % n == k - 1]
            self.drawn = [label for label in self.drawn if label in self.todo]
        self.slugs = {label.rpartition('/')[2] for label in self.todo}

    @staticmethod
    def label(notebook): return f'{notebook.part}/{notebook.slug}' if notebook.part else notebook.slug


@functools.lru_cache(1)
def stale_tests():
    "Slug -> why, for the chapters whose own tests have to run."
    known = lock.read_lock(ROOT)
    why = {n.slug: lock.why_stale_tests(ROOT, known.get(Plan.label(n))) for n in notebooks() if (ROOT/'tests'/'chapters'/n.slug).is_dir()}
    return {slug: reason for slug, reason in why.items() if reason}
