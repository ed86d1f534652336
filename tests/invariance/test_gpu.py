"""What runs on a GPU only: its kernels against the naive path, in the precision that models are trained in."""

from collections.abc import Callable

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, PreTrainedModel

from infopo.arguments import InfoPOConfig
from infopo.data.packing import pack, select
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps import attention, lm_head
from infopo.logps.forward import response_logps, self_test
from infopo.models import disable_dropout
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, random_examples, tiny_llama, tiny_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # the compiler looks at it
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPE = {
    "vocab_size": 61, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "one call": lambda: tiny_of(LlamaConfig(**SHAPE)),
    "one call, sliding window": lambda: tiny_of(MistralConfig(**SHAPE, sliding_window=4)),
    "compiled, soft caps": lambda: tiny_of(Gemma2Config(**SHAPE, sliding_window=4, attn_logit_softcapping=2.0)),
    "compiled, sinks": lambda: tiny_of(GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)),
}  # fmt: skip
EXAMPLES = random_examples(6, chosen=(1, 0, 2), rejected=(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_both_paths_agree_as_far_as_the_precision_goes(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to("cuda", dtype)
    disable_dropout(model)
    assert attention.enable(model) is None
    batch = pack(EXAMPLES).to("cuda")
    alone = [select(batch, [r]) for r in range(batch.num_responses)]
    self_test(model, batch, alone, exact=dtype == torch.float32, path="forest")
    gradients = []
    for path in ("forest", "naive"):
        model.zero_grad()
        response_logps(model, batch, path).sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        )
    # A direction, since bfloat16 rounds each entry by up to 1 %; float32 on a GPU sums in another order.
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > (1 - 1e-6 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_has_float32_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(50, 64, device="cuda", dtype=dtype),
        torch.randn(97, 64, device="cuda", dtype=dtype),
    )
    targets = torch.randint(97, (50,), device="cuda")
    hidden.requires_grad_()
    got = lm_head.token_logps(hidden, weight, None, targets)
    expected = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
    got.sum().backward()
    assert hidden.grad is not None


def test_a_step_repeats_bit_for_bit() -> None:
    model, batch = tiny_llama(dtype=torch.bfloat16).cuda(), pack(EXAMPLES).to("cuda")
    assert attention.enable(model) is None
    runs = []
    for _ in range(2):
        model.zero_grad()
        response_logps(model, batch).sum().backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_trainer_runs_in_bfloat16(tmp_path: object) -> None:
    settings = {**PLAIN_SGD, "use_cpu": False, "bf16": True, "max_steps": 3}
    args = InfoPOConfig(output_dir=str(tmp_path), **settings)
    trainer = InfoPOTrainer(
        model=tiny_llama(), args=args, train_dataset=random_dataset(12), processing_class=build_tokenizer()
    )
    assert trainer.train().training_loss > 0
