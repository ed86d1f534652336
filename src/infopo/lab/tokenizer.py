"""The lab's tokenizer, which has one token per UTF-8 byte and the chat's special tokens.

With bytes, every text round-trips and none is unknown. `Answer: ` is the only longer token. Every solution has it, and
generating it in one step instead of eight saves a fifth of a response.
"""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from infopo.lab.problems import ANSWER_PREFIX

PAD, BOS, END_OF_TURN, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END_OF_TURN, USER, ASSISTANT)
MODEL_MAX_LENGTH = 512

# The generation prompt ends with the assistant's header, with which an assistant turn starts too. A rendered
# conversation therefore starts with its rendered prompt, token for token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the lab chat has the roles user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the byte-level tokenizer with bos, eos (= end of turn), pad and a user/assistant chat template.

    Plain text is encoded as `<|bos|>` and its bytes. A chat is encoded as
    `<|bos|><|user|>question<|end|><|assistant|>response<|end|>`.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.tokenize("Answer: 28")
        ['Answer: ', '2', '8']
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(ANSWER_PREFIX, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
