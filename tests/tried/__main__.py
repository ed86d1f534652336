"""Makes rows anew and writes the page: `python -m tried [Data | "Adapters: LoRA" ...]`; without names, all of them."""

import logging
import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

from tried import page

logging.disable(logging.WARNING)
torch.set_num_threads(1)
lines = page.written()
for title, name in page.all_names():
    key = page.key(title, name)
    if key not in lines or {title, key} & set(sys.argv[1:] or page.SECTIONS):
        row = page.make(title, name)
        lines[key] = page.line(row)
        print(f"{row.result:10} {key}", file=sys.stderr)
page.PAGE.write_text(page.text(lines), encoding="utf-8")
