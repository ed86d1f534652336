"""One process of `test_reference_processes.py`: computes a reference through a store; started alone or by torchrun.

Prints a line a forward pass, so that its parent can kill it between two.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from infopo import reference_pass
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_examples, tiny_llama

folder, first, end, seconds = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
torch.set_num_threads(1)
reference_pass.SECONDS_PER_SHARD = 4 * seconds
rank = int(os.environ.get("RANK", "0"))
model = tiny_llama()


def slowly(model: torch.nn.Module, args: object, inputs: dict[str, torch.Tensor]) -> None:
    # What the trainer tries beforehand: whether the model can learn, and, on one token, what it does to its logits.
    if model.training or inputs["input_ids"].numel() == 1:
        return
    print("pass", flush=True)
    time.sleep(seconds)


model.register_forward_pre_hook(slowly, with_kwargs=True)
dataset = ExampleDataset.from_examples(random_examples(60)[first:end])
trainer = InfoPOTrainer(
    model,
    args=InfoPOConfig(
        output_dir=f"{folder}/run",
        reference_store=f"{folder}/store",
        per_device_train_batch_size=2,
        report_to="none",
        **PLAIN_SGD,
    ),
    train_dataset=dataset,
    processing_class=build_tokenizer(),
)
assert trainer.reference_store is not None
assert trainer.train_dataset.reference is not None
result = {
    "values": trainer.train_dataset.reference.tolist(),
    "computed": sorted(key.hex() for key in trainer.reference_store.computed),
    "found": trainer.reference_store.reused,
}
(Path(folder) / f"result-{first}-{end}-{rank}-{os.getpid()}.json").write_text(json.dumps(result))
trainer.accelerator.end_training()
