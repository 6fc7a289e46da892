"""A small training run for the tests of `vitbook.train`, run as a program: `worker.py OUT [--steps N] [--kill-at N] [--batch N] [--dropout P]`.

It leaves the weights in OUT/weights.safetensors and the losses in OUT/losses.json; with --kill-at it ends itself by SIGKILL after that step."""
import argparse, json, os, signal
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from vitbook.registry import create_model
from vitbook.train import batches, fit, seed_everything

p = argparse.ArgumentParser()
p.add_argument('out', type=Path)
for name, default in dict(steps=12, kill_at=0, batch=8).items(): p.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
p.add_argument('--dropout', type=float, default=0.)
a = p.parse_args()

torch.use_deterministic_algorithms(True)
seed_everything(3)
x, y = torch.rand(48, 3, 32, 32), torch.arange(48) % 10
model = create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, num_classes=10, embed_dim=24, depth=2, num_heads=3, drop_rate=a.dropout, drop_path_rate=a.dropout)


def perhaps_die(moment):
    if moment.step == a.kill_at: os.kill(os.getpid(), signal.SIGKILL)


accelerator = Accelerator(cpu=True)
history = fit(model, batches(x, y, batch_size=a.batch, seed=1), steps=a.steps, lr=3e-3, warmup=2, callbacks=[perhaps_die], checkpoint=a.out/'run.safetensors', checkpoint_every=2,
              accelerator=accelerator, progress=False)
if accelerator.is_main_process:
    save_file(model.state_dict(), a.out/'weights.safetensors')
    (a.out/'losses.json').write_text(json.dumps(history['loss']))
