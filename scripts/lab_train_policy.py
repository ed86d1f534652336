"""Trains the lab's SFT policy from scratch and writes it to `src/infopo/lab/policy/`.

    python scripts/lab_train_policy.py [--out FOLDER] [--steps N]

It is trained on worked solutions, in one pass over fresh problems of the `sft` split. The learning rate decays linearly
over 1,400 steps, and the run stops after 850 of them, because an SFT run that is stopped early leaves preference
training something to do. A policy whose learning rate had decayed to zero erred only on what it did not know, and
gained nothing from any method.

The run is bit-for-bit reproducible on one machine with the thread count below. Another CPU or build of torch rounds
differently, so that its weights differ slightly and its accuracy by a few points.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infopo.lab import make_problems, policy_path
from infopo.lab.evaluation import accuracy
from infopo.lab.problems import Problem
from infopo.lab.tokenizer import MODEL_MAX_LENGTH, build_tokenizer

# The order of sums, and with it the weights, would change with the number of threads.
THREADS = 1
SEED = 0
STEPS = 850
SCHEDULE_STEPS = 1400
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
IGNORED = -100


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns a Llama of about 0.3 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MODEL_MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[tuple[list[int], int]]:
    """Returns for each problem the token ids of the conversation and the length of its prompt in tokens."""
    prompts = [[{"role": "user", "content": problem.question}] for problem in problems]
    conversations = [
        [*prompt, {"role": "assistant", "content": problem.solution}]
        for prompt, problem in zip(prompts, problems, strict=True)
    ]
    prompt_texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    prompt_ids = tokenizer(prompt_texts, add_special_tokens=False)["input_ids"]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [(row, len(prompt)) for row, prompt in zip(ids, prompt_ids, strict=True)]


def collate(rows: list[tuple[list[int], int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded input ids and next-token labels of the response tokens, both (rows, longest row - 1)."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (ids, prompt_length) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return input_ids[:, :-1], labels[:, 1:]


def learning_rate_factor(step: int) -> float:
    """Returns the factor of a linear warm-up and a linear decay to zero at the schedule's end."""
    return min((step + 1) / WARMUP_STEPS, (SCHEDULE_STEPS - step) / (SCHEDULE_STEPS - WARMUP_STEPS))


def train(model: LlamaForCausalLM, rows: list[tuple[list[int], int]], pad_token_id: int, steps: int) -> None:
    """Trains the model in place, with one pass over `rows` in `steps` batches."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    model.train()
    for step in range(steps):
        input_ids, labels = collate(rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE], pad_token_id)
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f} nats per token", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=policy_path())
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {arguments.steps} steps of {BATCH_SIZE} problems")

    started = time.perf_counter()
    rows = encode(tokenizer, make_problems(arguments.steps * BATCH_SIZE, SEED, "sft"))
    train(model, rows, tokenizer.pad_token_id, arguments.steps)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    tokenizer.save_pretrained(arguments.out)
    model.save_pretrained(arguments.out)
    print(accuracy(model, tokenizer, make_problems(1000, SEED, "evaluation")))


if __name__ == "__main__":
    main()
