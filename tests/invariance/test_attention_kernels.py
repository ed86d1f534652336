"""Kernels of attention: each call gets the first that takes it, and it gives the naive path's numbers."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from families import EXAMPLES, FAMILIES, assert_agree, prepared
from infopo.data.packing import pack
from infopo.logps import attention, kernels
from infopo.logps.forward import response_logps
from infopo.models import disable_dropout
from infopo.records import PreferenceExample
from worlds import quick, random_examples, tiny_of


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What torch's kernel is documented to do, (tokens, heads, width): the last query of a sequence sees its last key,
    and each as many keys further back as the window says. There is no kernel for CPUs."""
    outputs = []
    ends = zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True)
    for (q0, q1), (k0, k1) in ends:
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        back, ahead = window_size
        seen = (distance >= -ahead) & ((distance <= back) if back >= 0 else True)
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)
        )
    return torch.cat(outputs)


def varlen_attn_of_torch_2_11(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """The signature of torch 2.11, which takes groups without being told."""
    return varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=window_size,
        enable_gqa=True,
    )


@pytest.fixture
def only_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the kernel of a name take every call on this CPU, without a trial."""

    def choose(name: str) -> None:
        (kernel,) = (k for k in kernels.KERNELS if k.name == name)
        table = (replace(kernel, obstacle=lambda call: None, is_tried=False),)
        monkeypatch.setattr(kernels, "KERNELS", table)
        monkeypatch.setattr(kernels, "_chosen", {})

    return choose


@pytest.mark.parametrize("kernel", [varlen_attn, varlen_attn_of_torch_2_11], ids=["2.12", "2.11"])
@pytest.mark.parametrize("family", ["llama", "mistral, sliding window", "qwen2, sliding window", "gpt2"])
def test_one_call_for_all_runs_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], None], family: str, kernel: Any
) -> None:
    """The call that a GPU gets, with a kernel's documentation in the kernel's place."""
    calls = []
    model = tiny_of(FAMILIES[family])
    disable_dropout(model)
    assert attention.enable(model) is None
    only_kernel("varlen")

    @functools.wraps(kernel)
    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(kernels, "varlen_attn", noted)
    assert_agree(model, pack(EXAMPLES))
    assert len(calls) == model.config.num_hidden_layers
    assert_agree(model, pack([PreferenceExample([5, 6, 7], [[3]], [[4, 5, 6]], "most keys, fewest queries")]))


def named(name: str) -> kernels.Kernel:
    (kernel,) = (k for k in kernels.KERNELS if k.name == name)
    return kernel


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> torch.Tensor:  # fmt: skip
    """The signature of FlashAttention 2, and what it is documented to do with the arguments that are used."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert softcap == 0.0
    return varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
        window_size=(window_size[0], 0), enable_gqa=True,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2, sliding window"])
def test_one_call_of_flash_attention_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], None], family: str
) -> None:
    monkeypatch.setattr(kernels, "flash_varlen", flash_attn_varlen_func)
    model = prepared(family)
    only_kernel("flash")
    assert_agree(model, pack(EXAMPLES))


ON_A_GPU = kernels.Call(torch.device("cuda", 0), (9, 0), torch.bfloat16, 4, 2, 64, 64)


@pytest.mark.parametrize(
    ("call", "refused", "taken"),
    [
        (ON_A_GPU, "", "varlen"),
        (replace(ON_A_GPU, has_window=True, dtype=torch.float16), "", "varlen"),
        (replace(ON_A_GPU, dtype=torch.float32), "half precision", "sdpa"),
        (replace(ON_A_GPU, capability=(7, 5)), "Ampere", "sdpa"),
        (replace(ON_A_GPU, width=512, value_width=512), "up to 256", "sdpa"),
        (replace(ON_A_GPU, width=100, value_width=100), "multiple of 8", "sdpa"),
        (replace(ON_A_GPU, value_width=128), "one width", "sdpa"),
        (replace(ON_A_GPU, device=torch.device("cpu"), capability=None), "GPU", "sdpa"),
        (replace(ON_A_GPU, has_softcap=True), "soft caps", "flex"),
        (replace(ON_A_GPU, has_sinks=True), "sinks", "flex"),
        (
            replace(ON_A_GPU, device=torch.device("cpu"), capability=None, has_sinks=True),
            "sinks",
            "written out",
        ),
    ],
)
def test_a_call_gets_the_first_kernel_that_takes_it(
    monkeypatch: pytest.MonkeyPatch, call: kernels.Call, refused: str, taken: str
) -> None:
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(kernels, "varlen_attn", varlen_attn)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "failure", lambda kernel, call: None)  # what a trial says needs the machine
    assert refused in (named("varlen").obstacle(call) or "")
    assert kernels.choose(call).name == taken
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(kernels, "flash_varlen", flash_attn_varlen_func)
    takes_caps = call == replace(ON_A_GPU, has_softcap=True)
    assert kernels.choose(call).name == ("flash" if taken == "varlen" or takes_caps else taken)
    without_caps = lambda q, k, v, softmax_scale, causal, window_size: q  # noqa: E731 - an old version
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(kernels, "flash_varlen", without_caps)
    assert kernels.choose(call).name == ("flash" if taken == "varlen" else taken)


def test_a_torch_without_the_kernels_windows_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (None, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query):
        monkeypatch.setattr(kernels, "varlen_attn", kernel)
        assert "this torch has none" in (named("varlen").obstacle(ON_A_GPU) or "")


@pytest.mark.parametrize("family", ["llama", "qwen2, sliding window", "olmo2"])
def test_under_autocast_a_kernel_gets_one_type(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Rotary embeddings leave queries and keys in float32 there, which would hide the half precision of the rest."""
    seen = set()

    def noted(query: Any, key: Any, value: Any, options: Any) -> kernels.Call:
        seen.add((query.dtype, key.dtype, value.dtype))
        return described(query, key, value, options)

    described = kernels.Call.of
    monkeypatch.setattr(kernels.Call, "of", noted)
    model = prepared(family)
    with torch.autocast("cpu", torch.bfloat16):
        response_logps(model, pack(EXAMPLES)).sum().backward()
    assert seen == {(torch.bfloat16,) * 3}


NON_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"
"""A compiler looks at it."""


def compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, ...]]:
    """The kernel for soft caps and sinks, compiled as far as a CPU can: products and a softmax, whose backward pass is
    right there, too, though torch refuses it. Each call adds the types of queries, keys and values to the list."""
    calls: list[tuple[torch.dtype, ...]] = []
    kernel = kernels._flex_kernel("aot_eager")

    def noted(*tensors: torch.Tensor, **options: Any) -> Any:
        calls.append(tuple(t.dtype for t in tensors))
        return kernel(*tensors, **options)

    monkeypatch.setattr(kernels, "_flex_kernel", lambda: noted)
    monkeypatch.setattr(kernels.flex, "_validate_device", lambda *tensors: None)
    return calls


@pytest.mark.filterwarnings(NON_LEAF)
@pytest.mark.parametrize("family", quick(["gemma2, soft cap", "gpt-oss, sinks"], "gpt-oss, sinks"))
def test_one_compiled_call_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], None], family: str
) -> None:
    """The call that a GPU gets, for more kinds of layers and passes than a compiler keeps graphs by default."""
    calls, model = compiled_on_a_cpu(monkeypatch), prepared(family)
    only_kernel("flex")
    assert_agree(model, pack(EXAMPLES))
    assert len(calls) == model.config.num_hidden_layers
    assert_agree(
        model, pack([PreferenceExample([5, 6, 7], [[3], [3, 4, 5], [3, 4, 6]], [[4, 5, 6]], "a tree")])
    )
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(prepared(family), lora)
    for number in (3, 5, 7):
        assert_agree(adapted, pack(random_examples(number)))
        with torch.no_grad():
            response_logps(adapted, pack(random_examples(number)))


@pytest.mark.filterwarnings(NON_LEAF)
def test_under_autocast_a_compiled_call_gets_halves(
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], None]
) -> None:
    """Rotary embeddings leave queries and keys in float32 there, and values are halves."""
    calls, model, batch = compiled_on_a_cpu(monkeypatch), prepared("gemma2, soft cap"), pack(EXAMPLES)
    only_kernel("flex")
    with torch.autocast("cpu", torch.bfloat16):
        values = response_logps(model, batch)
        expected = response_logps(model, batch, "naive")
    assert set(calls) == {(torch.bfloat16,) * 3}
    torch.testing.assert_close(values, expected, rtol=0, atol=0.5)


@pytest.mark.filterwarnings(NON_LEAF)
def test_a_kernel_that_cannot_be_made_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial has a forward and a backward pass of its own, also where it is asked for without gradients."""

    flex, sdpa = (k for k in kernels.KERNELS if k.name in ("flex", "sdpa"))
    call = kernels.Call(torch.device("cpu"), None, torch.float32, 4, 2, 8, 8, True, True, True)

    def chosen() -> str:
        with torch.no_grad():
            return kernels.choose(call).name

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of shared memory")

    table = (replace(flex, obstacle=lambda call: None), replace(sdpa, obstacle=lambda call: None))
    monkeypatch.setattr(kernels, "KERNELS", table)
    monkeypatch.setattr(kernels, "_chosen", {})
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_flex_kernel", lambda: broken)
        assert chosen() == chosen() == "sdpa"
    assert [record.getMessage() for record in caplog.records] == [
        "the attention kernel 'flex' does not work here, so a slower one runs: out of shared memory"
    ]
    monkeypatch.setattr(kernels, "_chosen", {})
    calls = compiled_on_a_cpu(monkeypatch)
    assert chosen() == "flex"
    assert len(calls) == 2  # a long row and a short one


def test_a_kernel_that_is_wrong_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    """A trial compares: a kernel that runs and forgets the window would train on wrong numbers."""
    sdpa = next(k for k in kernels.KERNELS if k.name == "sdpa")
    call = kernels.Call(torch.device("cpu"), None, torch.float32, 4, 2, 8, 8, has_window=True)
    assert kernels.failure(sdpa, call) is None
    forgetful = replace(sdpa, run=lambda *args: sdpa.run(*args[:-1], replace(args[-1], window=None)))
    assert "off by" in (kernels.failure(forgetful, call) or "")
    halves = replace(call, dtype=torch.bfloat16)
    assert kernels.failure(sdpa, halves) is None
    assert "off by" in (kernels.failure(forgetful, halves) or "")
