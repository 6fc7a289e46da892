"""Parity sheets: what an official implementation computes at tiny size, and a reader that says how far a model is from it.

A sheet (`tests/chapters/<slug>/parity/<slug>__<case>.json`) names an official module and its configuration, lists
its state dict (name -> shape) and holds samples of its outputs. Weights and inputs are not stored: they follow from
their names by a hash in integer arithmetic, the same on every machine."""
import functools, importlib.util, inspect, json, os, re, zlib
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
TOLERANCE = 1e-4                                 # of the output's rms, float32 on the CPU


def noise(name, count):
    "`count` numbers in [-1, 1), float64: the low-bias 32-bit hash of (index + crc32(name) * golden ratio)."
    start = zlib.crc32(name.encode()) * 0x9E3779B9 % 2**32
    h = np.arange(count, dtype=np.uint32) + np.uint32(start)          # 32-bit arithmetic wraps around, as the rule wants
    h ^= h >> np.uint32(16); h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15); h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h.astype(np.float64) / 2**31 - 1


def tensor(values, shape): return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def weight(name, shape):
    "The state-dict entry `name`: variances around 1, means and vectors called bias around 0, other vectors around 1, matrices scaled by their fan-in."
    u, last = noise(name, prod(shape)), name.split('.')[-1]
    if name.endswith('running_var'): return tensor(1 + u / 2, shape)
    if name.endswith('running_mean'): return tensor(u / 10, shape)
    if len(shape) < 2: return tensor(u / 10 if 'bias' in last else 1 + u / 10, shape)
    return tensor(u * sqrt(3 / (prod(shape) / shape[0])), shape)


def given(name, spec):
    "The input `name`: written out, or integers in [low, high), or noise * scale + shift."
    if 'value' in spec: return torch.tensor(spec['value'], dtype=getattr(torch, spec.get('dtype', 'float32')))
    u = noise(f'input:{name}', prod(spec['shape']))
    if 'integers' not in spec: return tensor(u * spec.get('scale', 1.) + spec.get('shift', 0.), spec['shape'])
    low, high = spec['integers']
    return torch.from_numpy(np.floor((u + 1) / 2 * (high - low) + low).astype(np.int64)).reshape(spec['shape'])


def alike(ours, theirs):
    "What two names of an output have in common: whether all numbers, and how many words."
    words, numbers = ([re.findall(kind, name) for name in (ours, theirs)] for kind in ('[a-z]+', r'\d+'))
    return numbers[0] == numbers[1], len(set(words[0]) & set(words[1]))


class Sheet:
    "One sheet: `config`, `weights()`, `inputs()`, the official class if it says one, and `check(outputs)`."

    def __init__(self, path):
        self.name, self.data = Path(path).stem, json.loads(Path(path).read_text(encoding='utf-8'))
        self.config, self.constructed = self.data['config'], set(self.data.get('constructed', ()))
        if self.data['fill'] != 'hash32': raise ValueError(f"{self.name}: unknown rule {self.data['fill']!r}, this reader knows hash32")

    @property
    def module(self):
        "The official class or function: what the sheet calls so, or the last word of its source; else ''."
        told = self.data.get('module', self.data.get('source', '').split(', ')[-1])
        return told if re.fullmatch(r'[\w.]+', told) else ''

    def weights(self): return {name: weight(name, shape) for name, shape in self.data['state'].items() if name not in self.constructed}
    def inputs(self): return {name: given(name, spec) for name, spec in self.data['inputs'].items()}

    def named(self, outputs):
        """What a builder gives, under the sheet's names: its own, or of those of the same shape the most alike.

        A tensor by itself, or the first of a dict, is the module's own result: it is taken where no name is like the
        sheet's. A wrong choice cannot pass, since values are compared."""
        if isinstance(outputs, torch.Tensor): outputs = dict(y=outputs)
        want = self.data['outputs']
        pairs = [(theirs, ours) for theirs, spec in want.items()
                 for ours, value in outputs.items() if list(value.shape) == spec['shape']]
        found = {theirs: outputs[theirs] for theirs, ours in pairs if theirs == ours}
        for theirs, ours in sorted(pairs, key=lambda pair: alike(*pair), reverse=True):
            free = not any(outputs[ours] is taken for taken in found.values())
            if theirs not in found and free: found[theirs] = outputs[ours]
        unfit = {name: outputs[name] for name in want if name in outputs} or dict(zip(want, outputs.values()))
        return unfit | found                                            # with a wrong shape, which the report tells

    def errors(self, outputs):
        "Output name -> worst error over the samples, relative to the official rms; inf for a missing output or a wrong shape."
        outputs, found = self.named(outputs), {}
        for name, want in self.data['outputs'].items():
            if name not in outputs or list(outputs[name].shape) != want['shape']: found[name] = float('inf'); continue
            got = outputs[name].detach().double().flatten()
            samples = got[want['index']] - torch.tensor(want['value'], dtype=torch.float64)
            rms = got.square().mean().sqrt() - want['rms']              # these two see every entry, the samples only some
            mean = got.mean() - want['mean']
            found[name] = torch.stack([samples.abs().max(), rms.abs(), mean.abs()]).nan_to_num(nan=float('inf')).max().item() / want['rms']
        return found

    def check(self, outputs, tolerance=TOLERANCE):
        "The worst error; an AssertionError that lists every output when it is above the tolerance."
        outputs = self.named(outputs)
        found = self.errors(outputs)
        worst = max(found.values())
        if not worst <= tolerance:
            lines = (f"  {name}: {error:.1e} of the rms, shape {list(outputs[name].shape) if name in outputs else 'missing'}, "
                     f"official {self.data['outputs'][name]['shape']}" for name, error in found.items())
            raise AssertionError(f'{self.name} is off by {worst:.1e} of the rms (allowed {tolerance:.0e}):\n' + '\n'.join(lines))
        return worst


def sheets(slug=None):
    """The sheets of a chapter; without a slug, of all.

    And of two folders where somebody may put others: tests/parity, and the one that VITBOOK_SHEETS names."""
    folders = [HERE/'chapters'/slug/'parity'] if slug else [*sorted(HERE.glob('chapters/*/parity')), HERE/'parity']
    if not slug and 'VITBOOK_SHEETS' in os.environ: folders.append(Path(os.environ['VITBOOK_SHEETS']))
    found = {path.stem: path for folder in folders for path in sorted(folder.glob('*.json'))}
    return [Sheet(path) for path in found.values()]


@functools.cache
def answers(slug):
    "The module `tests/chapters/<slug>/parity.py`, None if there is none."
    path = HERE/'chapters'/slug/'parity.py'
    if not path.is_file(): return None
    spec = importlib.util.spec_from_file_location(f'parity_of_{slug}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def builders(slug):
    "Its functions that answer sheets: `<slug>` all of the chapter's, `<slug>__<case>` one."
    there = vars(answers(slug)) if answers(slug) else {}
    return {name: f for name, f in there.items() if name.split('__')[0] == slug and callable(f)}


def builder_of(name):
    "`build(config, weights, inputs[, module])` for a sheet, which maps the official names to ours, or None."
    known = builders(name.split('__')[0])
    return known.get(name) or known.get(name.split('__')[0])


def built(sheet, **changes):
    "What our model gives for a sheet; `changes` are other `weights` or `inputs`."
    build = builder_of(sheet.name)
    if 'module' in inspect.signature(build).parameters: changes = dict(module=sheet.module) | changes
    return build(**dict(config=sheet.config, weights=sheet.weights(), inputs=sheet.inputs()) | changes)
