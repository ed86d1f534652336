"""One rank of `test_two_ranks_resume_in_the_order_of_rows_that_they_left`; started by torch.distributed.run."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import TrainerCallback

from infopo import run_state
from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from worlds import random_dataset, tiny_llama

folder, strategy, stop = sys.argv[1:]
torch.set_num_threads(1)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == int(stop):
            control.should_training_stop = True


trainer = InfoPOTrainer(
    tiny_llama(),
    args=InfoPOConfig(
        output_dir=folder,
        max_steps=9,
        learning_rate=3e-2,
        logging_steps=1,
        activation_checkpointing=False,
        use_cpu=True,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        disable_tqdm=True,
        report_to="none",
        per_device_train_batch_size=2,
        train_sampling_strategy=strategy,
    ),
    train_dataset=random_dataset(14),
    eval_dataset=random_dataset(5, seed=9),
    processing_class=build_tokenizer(),
    callbacks=[Stop()],
)
trainer.train(resume_from_checkpoint=True if run_state.last(folder) else None)
weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).numpy().tobytes()
result = {
    "weights": hashlib.sha256(weights).hexdigest(),
    "best": trainer.state.best_model_checkpoint,
    "logs": [
        [r["step"], r.get("loss", r.get("eval_loss"))] for r in trainer.state.log_history if "epoch" in r
    ],
}
result["logs"] = [pair for pair in result["logs"] if pair[1] is not None]
(Path(folder) / f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
trainer.accelerator.end_training()
os._exit(0)  # threads of the process group were seen to abort a rank at its exit, after its work was done
