"""Makes a tokenizer and a small random Llama for real preference data, so that `infopo train` needs no download.

python scripts/hh_tokenizer.py ../shared/data/hh_harmless/harmless-base-test.jsonl.gz models/hh
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows

PAD, BOS, END_OF_TURN, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 2048


def message_texts(path: str) -> Iterator[str]:
    """Yields the text of every message in the prompts and responses of all usable rows."""
    for row in read_rows(path, DataCounts(on_bad_row="skip")):
        for turns in (row.prompt, *row.chosen, *row.rejected):
            yield from [turns] if isinstance(turns, str) else (turn["content"] for turn in turns)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with BOS, EOS (= end of turn), padding and a chat template."""
    special = [PAD, BOS, END_OF_TURN, USER, ASSISTANT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def random_llama(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Returns a Llama of two layers of width 64 with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Writes tokenizer and model into one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", help="preference data in any shape that infopo reads, e.g. hh-rlhf's .jsonl.gz"
    )
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's weights")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(message_texts(arguments.data), arguments.vocab_size)
    model = random_llama(tokenizer, arguments.seed)
    tokenizer.save_pretrained(arguments.out_dir)
    model.save_pretrained(arguments.out_dir)
    print(f"{arguments.out_dir}: {len(tokenizer)} tokens, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
