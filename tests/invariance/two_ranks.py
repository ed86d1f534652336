"""One rank of `test_two_ranks_are_one_rank_with_twice_the_batch`; started by torch.distributed.run."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

out, objective, more = sys.argv[1:]
torch.set_num_threads(1)
settings = {**PLAIN_SGD, "num_train_epochs": 2, "per_device_train_batch_size": 4, **json.loads(more)}
model = tiny_llama()
trainer = InfoPOTrainer(
    model=model,
    args=InfoPOConfig(output_dir=str(Path(out).parent), objective=objective, **settings),
    train_dataset=random_dataset(21, chosen=(1, 2), rejected=(1, 1, 3)),
    processing_class=build_tokenizer(),
)
trainer.train()
if trainer.is_world_process_zero():
    logs = [{k: v for k, v in r.items() if k != "step"} for r in trainer.state.log_history[:-1]]
    torch.save({"weights": [p.detach() for p in model.parameters()], "logs": logs}, out)
trainer.accelerator.end_training()
os._exit(0)  # threads of the process group were seen to abort a rank at its exit, after its work was done
