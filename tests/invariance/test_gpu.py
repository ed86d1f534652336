"""What runs on a GPU only: its kernels against the naive path, in the precision that models are trained in."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
)

from infopo.arguments import InfoPOConfig
from infopo.data.packing import PreferenceCollator, pack, select
from infopo.lab.tokenizer import build_tokenizer
from infopo.logps import attention, calls, forest, kernels, lm_head, router
from infopo.logps.compiling import compile_layers
from infopo.logps.forward import PLANS, response_logps, self_test
from infopo.models import disable_dropout
from infopo.records import PackedBatch, PreferenceExample
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
LONG = [
    PreferenceExample(
        [5 + i % 50 for i in range(300)],
        [[7 + i % 40 for i in range(n)]],
        [[9 + i % 40 for i in range(200)]],
        "long",
    )
    for n in (1, 150, 400)
]
"""Rows of several blocks of 128 keys."""


@pytest.fixture(autouse=True)
def chosen() -> dict[calls.Call, kernels.Kernel]:
    """The kernels that a test has chosen."""
    kernels._chosen.clear()
    return kernels._chosen


ONE_CALL = {"flash 4", "flash 3", "flash 2", "varlen"}
"""Kernels for halves. Which one runs depends on what is installed."""


def names(chosen: dict[calls.Call, kernels.Kernel]) -> set[str]:
    return {kernel.name for kernel in chosen.values()}


def gradients(model: torch.nn.Module, batch: PackedBatch, path: str | None = None) -> list[torch.Tensor]:
    model.zero_grad()
    response_logps(model, batch, path).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_direction(ours: list[torch.Tensor], expected: list[torch.Tensor], *, exact: bool) -> None:
    """bfloat16 rounds each entry by up to 1 %, and float32 on a GPU sums in another order."""
    flat = [torch.cat([g.flatten().float() for g in each]) for each in (ours, expected)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > (1 - 1e-6 if exact else 0.99)


def assert_agree(model: torch.nn.Module, examples: list[PreferenceExample], *, exact: bool) -> None:
    disable_dropout(model)
    assert attention.enable(model) is None
    batch = pack(examples).to("cuda")
    alone = [select(batch, [r]) for r in range(batch.num_responses)]
    self_test(model, batch, alone, exact=exact, path="forest")
    assert_same_direction(gradients(model, batch, "forest"), gradients(model, batch, "naive"), exact=exact)


@pytest.mark.parametrize("examples", [EXAMPLES, LONG], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_both_paths_agree_as_far_as_the_precision_goes(
    chosen: dict[calls.Call, kernels.Kernel],
    name: str,
    dtype: torch.dtype,
    examples: list[PreferenceExample],
) -> None:
    exact = dtype == torch.float32
    assert_agree(MODELS[name]().to("cuda", dtype), examples, exact=exact)
    for_halves = ONE_CALL | {"flex"} if "compiled" in name else ONE_CALL
    assert names(chosen) <= ({"flex" if "compiled" in name else "sdpa"} if exact else for_halves)


@pytest.mark.parametrize("features", [{}, {"has_window": True}, {"has_softcap": True}, {"has_sinks": True}])
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ONE_CALL))
def test_a_kernel_that_is_there_and_takes_a_call_passes_its_trial(
    name: str, dtype: torch.dtype, width: int, features: dict[str, bool]
) -> None:
    [kernel] = [k for k in kernels.KERNELS if k.name == name]
    capability = torch.cuda.get_device_capability()
    call = calls.Call(torch.device("cuda", 0), capability, dtype, 4, 2, width, width, **features)
    if reason := kernel.obstacle(call):
        pytest.skip(reason)
    assert kernels.failure(kernel, call) is None


@pytest.mark.parametrize(("width", "kernel"), [(256, ONE_CALL), (100, {"sdpa"}), (512, {"sdpa"})])
def test_heads_that_a_kernel_does_not_take_go_to_the_next(
    chosen: dict[calls.Call, kernels.Kernel], width: int, kernel: set[str]
) -> None:
    assert_agree(
        tiny_of(LlamaConfig(**SHAPE | {"head_dim": width})).to("cuda", torch.bfloat16), LONG, exact=False
    )
    assert names(chosen) <= kernel


def test_float32_weights_under_autocast_take_the_kernel_for_halves(
    chosen: dict[calls.Call, kernels.Kernel],
) -> None:
    model = MODELS["one call"]().cuda()
    assert attention.enable(model) is None
    with torch.autocast("cuda", torch.bfloat16):
        gradients(model, pack(LONG).to("cuda"))
    assert names(chosen) <= ONE_CALL


def test_an_adapter_gets_the_gradients_of_the_naive_path() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(MODELS["one call"]().to("cuda", torch.bfloat16), lora)
    assert_agree(model, EXAMPLES, exact=False)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", [n for n in MODELS if "sinks" not in n])  # its experts wait, in transformers
def test_the_host_never_waits_within_a_micro_batch(name: str, autocast: bool) -> None:
    model = MODELS[name]().to("cuda", torch.float32 if autocast else torch.bfloat16)
    assert attention.enable(model) is None
    collate = PreferenceCollator(shared=True, plan=forest.Plan.of)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
            [batch] = collate(EXAMPLES)
            batch = batch.to("cuda")
            values = response_logps(model, batch)
            with torch.no_grad():
                response_logps(model, select(batch, [0, 2]))
        values.sum().backward()

    run()  # the kernel is tried, and compiled, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}


@pytest.mark.parametrize("name", ["padded", "experts"])
def test_nor_does_it_for_padded_rows_and_for_experts_in_balance(name: str) -> None:
    """For padded rows with `eager`, because transformers looks at the mask for `sdpa`."""
    config = MixtralConfig(**SHAPE, **EXPERTS) if name == "experts" else LlamaConfig(**SHAPE)
    model = tiny_of(config).to("cuda", torch.bfloat16)
    path = "forest" if name == "experts" else "padded"
    if path == "forest":
        assert attention.enable(model) is None
    else:
        model.set_attn_implementation("eager")
    collate = PreferenceCollator(shared=path == "forest", plan=PLANS[path])

    def run() -> None:
        [batch] = collate(EXAMPLES)
        batch = batch.to("cuda")
        with router.aux_losses(name == "experts") as found:
            values = response_logps(model, batch, path)
            with torch.no_grad():
                response_logps(model, select(batch, [0, 2]), path)
        (values.sum() + sum(aux for aux, _ in found)).backward()

    run()  # the kernel is tried once
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_of_16k_tokens_fits_a_compiled_kernel() -> None:
    """A mask of each pair of tokens would take 256 MiB, and to make it ten times as much."""
    model = MODELS["compiled, soft caps"]().to("cuda", torch.bfloat16)
    assert attention.enable(model) is None
    ids = [5 + i % 50 for i in range(16_000)]
    batch = pack([PreferenceExample(ids, [[7, 8]], [[9]], "long")]).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    gradients(model, batch)
    assert torch.cuda.max_memory_allocated() < 2**30


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_compiled_layers_give_the_same(checkpointing: bool) -> None:
    model = MODELS["one call"]().to("cuda", torch.bfloat16)
    assert attention.enable(model) is None
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    expected = gradients(model, pack(EXAMPLES).to("cuda"))
    compile_layers(model, "inductor")
    assert_same_direction(gradients(model, pack(EXAMPLES).to("cuda")), expected, exact=False)
    gradients(model, pack(LONG).to("cuda"))


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


@pytest.mark.parametrize("rows", [1, 7])
def test_the_gradient_of_the_heads_weight_does_not_depend_on_tiles(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda").bfloat16().requires_grad_() for n in (500, 970))
    targets = torch.randint(970, (500,), device="cuda")
    monkeypatch.setattr(lm_head, "LEAST_COLUMNS", 128)
    monkeypatch.setattr(lm_head, "DEFAULT_TILE_LOGITS", 128 * 500 // rows)
    got = torch.autograd.grad(lm_head.token_logps(hidden, weight, None, targets).sum(), (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logps = (exact[0] @ exact[1].T).log_softmax(1).gather(1, targets[:, None])
    for ours, expected in zip(got, torch.autograd.grad(logps.sum(), exact), strict=True):
        assert (ours.double() - expected).norm() / expected.norm() < 4e-3


def test_a_step_repeats_bit_for_bit_where_torch_is_asked_to() -> None:
    """The kernels add up over blocks of keys in any order unless torch is asked for one."""
    model, batch = tiny_llama(dtype=torch.bfloat16).cuda(), pack(LONG).to("cuda")
    assert attention.enable(model) is None
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [gradients(model, batch) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_the_trainer_runs_in_bfloat16(tmp_path: object) -> None:
    settings = {**PLAIN_SGD, "use_cpu": False, "bf16": True, "max_steps": 3}
    args = InfoPOConfig(output_dir=str(tmp_path), **settings)
    trainer = InfoPOTrainer(
        model=tiny_llama(), args=args, train_dataset=random_dataset(12), processing_class=build_tokenizer()
    )
    assert trainer.train().training_loss > 0


def test_one_rank_of_several_trains_as_one_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from infopo.arguments import InfoPOConfig\n"
        "from infopo.lab.tokenizer import build_tokenizer\n"
        "from infopo.trainer import InfoPOTrainer\n"
        "from worlds import PLAIN_SGD, random_dataset, tiny_llama\n"
        "settings = PLAIN_SGD | {'use_cpu': False, 'bf16': True, 'max_steps': 2}\n"
        "trainer = InfoPOTrainer(model=tiny_llama(), args=InfoPOConfig(output_dir=sys.argv[1], **settings),\n"
        "    train_dataset=random_dataset(8), processing_class=build_tokenizer())\n"
        "assert trainer.train().training_loss > 0\n"
        "assert trainer.accelerator.distributed_type.value == 'MULTI_GPU', trainer.accelerator.distributed_type\n",
        encoding="utf-8",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    subprocess.run([*launcher, str(script), str(tmp_path)], check=True, timeout=180, env=environment)
