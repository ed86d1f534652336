"""Scores of a sequence-classification model with one output, as reward models are published."""

from collections.abc import Sequence

import torch

from infopo.errors import ConfigError
from infopo.evaluation.items import Answered
from infopo.models import load_reward, load_tokenizer


class RewardModel:
    """A reward model, loaded.

    Args:
        name: Local folder or hub name.

    Raises:
        ConfigError: Its tokenizer can neither render conversations nor pad.
        ModelError: It cannot be loaded, or has more outputs than one.
    """

    BATCH = 16

    def __init__(self, name: str) -> None:
        self._model = load_reward(name)
        self._tokenizer = load_tokenizer(name)
        if self._tokenizer.pad_token_id is None:
            if self._tokenizer.eos_token_id is None:
                raise ConfigError(
                    f"--verifier reward:{name}: its tokenizer has neither a pad nor an end token"
                )
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._model.config.pad_token_id is None:
            # It reads the reward at the last token that is no padding.
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._name = name

    @torch.no_grad()
    def scores(self, answers: Sequence[Answered]) -> list[float]:
        """Returns the reward of each response behind its prompt, in the model's own scale.

        Raises:
            ConfigError: A prompt and its response are longer than the model's context.
        """
        ids = [self._ids(each) for each in answers]
        # Rows of like length are computed together, so that little is padded.
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        found = [0.0] * len(ids)
        for begin in range(0, len(order), self.BATCH):
            places = order[begin : begin + self.BATCH]
            batch = self._tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt")
            logits = self._model(**batch.to(self._model.device)).logits[:, 0].float()
            for place, score in zip(places, logits.tolist(), strict=True):
                found[place] = score
        return found

    def _ids(self, answered: Answered) -> list[int]:
        prompt = answered.item.prompt
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            conversation = [*turns, {"role": "assistant", "content": answered.response}]
            ids = list(self._tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False))
        else:
            texts = (
                prompt if isinstance(prompt, str) else "\n".join(str(turn.get("content")) for turn in prompt)
            )
            ids = list(self._tokenizer(f"{texts}\n{answered.response}")["input_ids"])
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest and len(ids) > longest:
            raise ConfigError(
                f"--verifier reward:{self._name}: {answered.item.id} has {len(ids)} tokens with its response, and the "
                f"model's context {longest}; lower --max-new-tokens"
            )
        return ids
