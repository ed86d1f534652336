"""Kernels of attention: each call gets the first that takes it, and it gives the naive path's numbers."""

import functools
import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stand_ins
from families import EXAMPLES, assert_agree, prepared, results
from infopo.data.packing import pack
from infopo.logps import flash, kernels
from infopo.logps.calls import Call, Options
from infopo.logps.forward import response_logps
from infopo.logps.layout import ForestLayout
from infopo.records import PreferenceExample
from worlds import quick, random_examples

MODULES = {"flash 4": "flash_attn.cute", "flash 3": "flash_attn_interface", "flash 2": "flash_attn"}
FLASH: dict[str, Any] = {
    "flash 4": stand_ins.flash_4, "flash 3": stand_ins.flash_3, "flash 2": stand_ins.flash_2,
}  # fmt: skip
VARLEN = {"varlen of torch 2.13": stand_ins.varlen_2_13, "varlen of torch 2.11": stand_ins.varlen_2_11}
ONE_CALL = [*FLASH, *VARLEN]


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_chosen", {})
    flash._varlen_function_of.cache_clear()
    yield
    flash._varlen_function_of.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], None]:
    """Lets these packages of flash-attn be installed, with these functions, and no others."""

    def install(functions: Mapping[str, Any]) -> None:
        monkeypatch.setattr(kernels, "_chosen", {})
        flash._varlen_function_of.cache_clear()
        for name, module in MODULES.items():
            installed = types.ModuleType(module)
            if name in functions:
                installed.__file__ = f"{module}.py"
                installed.flash_attn_varlen_func = functions[name]  # type: ignore[attr-defined]
            # FlashAttention 4 lies in the folder of FlashAttention 2, which exists even if that is not installed.
            is_there = name in functions or (name == "flash 2" and "flash 4" in functions)
            monkeypatch.setitem(sys.modules, module, installed if is_there else None)

    return install


@pytest.fixture
def only_kernel(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[Mapping[str, Any]], None]
) -> Callable[[str], kernels.Kernel]:
    """Makes the kernel of a name take every call on this CPU, without a trial."""

    def choose(name: str) -> kernels.Kernel:
        install(FLASH)
        if name in VARLEN:
            monkeypatch.setattr(flash, "varlen_attn", VARLEN[name])
        kernel = replace(named(name.split(" of ")[0]), obstacle=lambda call: None, is_tried=False)
        monkeypatch.setattr(kernels, "KERNELS", (kernel,))
        return kernel

    return choose


def named(name: str) -> kernels.Kernel:
    (kernel,) = (k for k in kernels.KERNELS if k.name == name)
    return kernel


# ---- one call for all runs -------------------------------------------------------------------------------------

LAYOUTS = {
    "one response": ForestLayout([0, 5, 7], [-1, 0]),
    "most keys, fewest queries": ForestLayout([0, 9, 10, 14, 15], [-1, 0, 0, 0]),
    "a tree": ForestLayout([0, 5, 7, 8, 11, 14], [-1, 0, 0, 2, -1]),
}
OPTIONS = {
    "plain": Options(),
    "scaling": Options(scaling=0.7),
    "window": Options(window=4),
    "window of one": Options(scaling=0.3, window=1),
    "soft cap": Options(scaling=0.7, softcap=2.0),
    "sinks": Options(window=3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def errors(run: Any, layout: ForestLayout, options: Options, dtype: torch.dtype) -> list[float]:
    """How far output and gradients are from those that are written out in float32, relative to the largest value."""
    generator, size, found = torch.Generator().manual_seed(1), sum(layout.sizes), []
    rows = [torch.randn(1, heads, size, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]
    weights = torch.randn(1, size, 4, 16, generator=generator).to(dtype)
    for function, kind in ((run, dtype), (kernels._written_out, torch.float32)):
        varied = [t.to(kind, copy=True).requires_grad_() for t in rows]
        mine = options
        if options.sinks is not None:
            mine = replace(options, sinks=options.sinks.to(kind, copy=True).requires_grad_())
            varied.append(mine.sinks)  # type: ignore[arg-type]
        output = function(*varied[:3], layout, mine)
        assert output.dtype == kind
        found.append([output.detach(), *torch.autograd.grad(output, varied, weights.to(kind))])
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]


FEATURES = {"soft cap": list(FLASH), "sinks": ["flash 4"]}
"""Kernels that have a feature, where not all of those with one call have it."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for options in OPTIONS for name in FEATURES.get(options, [*FLASH, *VARLEN])],
)
def test_one_call_computes_what_is_written_out(
    only_kernel: Callable[[str], kernels.Kernel], name: str, options: str, layout: str
) -> None:
    """The call that a GPU gets, with a stand-in in the kernel's place. Halves are rounded by up to 5e-4."""
    run = only_kernel(name).run
    assert max(errors(run, LAYOUTS[layout], OPTIONS[options], torch.float16)) < 3e-3


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "qwen2, sliding window") for name in [*FLASH, *VARLEN]),
        *((name, "gemma2, soft cap") for name in FLASH),
        ("varlen of torch 2.11", "gpt2"),
        ("flash 3", "llama"),
        ("flash 4", "gpt-oss, sinks"),
    ],
)
def test_a_model_in_halves_takes_one_call_per_layer(
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], kernels.Kernel], name: str, family: str
) -> None:
    """Peer: the naive path, with the model's own attention in the same halves."""
    calls = []
    model = prepared(family).to(torch.float16)
    kernel = only_kernel(name)

    def noted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return kernel.run(*args)

    monkeypatch.setattr(kernels, "KERNELS", (replace(kernel, run=noted),))
    values, gradients = results(model, pack(EXAMPLES), "forest")
    assert len(calls) == model.config.num_hidden_layers
    expected, expected_gradients = results(model, pack(EXAMPLES), "naive")
    torch.testing.assert_close(values, expected, rtol=0, atol=0.05)
    ours, theirs = (
        torch.cat([g.float().flatten() for g in each]) for each in (gradients, expected_gradients)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9999


def test_the_stand_in_has_the_arguments_of_torch() -> None:
    ours, theirs = (inspect.signature(each).parameters for each in (stand_ins.varlen_2_13, flash.varlen_attn))
    assert list(ours) == list(theirs)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def asked(install: Callable[[Mapping[str, Any]], None], name: str, options: Options) -> dict[str, Any]:
    """What a package is called with, with types in place of tensors."""
    given = []

    @functools.wraps(FLASH[name])
    def noted(**arguments: Any) -> Any:
        types = {key: value.dtype for key, value in arguments.items() if torch.is_tensor(value)}
        given.append(arguments | types)
        return FLASH[name](**arguments)

    install({name: noted})
    rows = [torch.randn(1, heads, 14, 16).to(torch.bfloat16) for heads in (4, 2, 2)]
    named(name).run(*rows, LAYOUTS["a tree"], options)
    return given[0]


@pytest.mark.parametrize(("name", "unlimited"), [("flash 4", None), ("flash 3", -1), ("flash 2", -1)])
def test_a_package_is_asked_by_the_names_of_its_arguments(
    install: Callable[[Mapping[str, Any]], None], name: str, unlimited: int | None
) -> None:
    always = {"max_seqlen_q": 7, "max_seqlen_k": 9, "causal": True}
    always |= dict.fromkeys("qkv", torch.bfloat16) | dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k"), torch.int32
    )
    plain = {"softmax_scale": None, "window_size": (unlimited, 0)}
    assert asked(install, name, Options()) == always | plain
    everything = {"softmax_scale": 0.5, "window_size": (3, 0), "softcap": 2.0}
    assert asked(install, name, Options(0.5, 4, 2.0)) == always | everything


def test_sinks_have_the_type_that_the_trial_had(install: Callable[[Mapping[str, Any]], None]) -> None:
    sinks = torch.zeros(4, dtype=torch.bfloat16)
    assert asked(install, "flash 4", Options(sinks=sinks))["learnable_sink"] == torch.float32


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.usefixtures("deterministic")
def test_a_package_is_asked_to_repeat_bit_for_bit_where_torch_is(
    install: Callable[[Mapping[str, Any]], None], name: str
) -> None:
    assert asked(install, name, Options())["deterministic"] is True


# ---- the choice ------------------------------------------------------------------------------------------------

ON_A_GPU = Call(torch.device("cuda", 0), (9, 0), torch.bfloat16, 4, 2, 64, 64)
AS_ON_A_GPU = replace(ON_A_GPU, device=torch.device("cpu"))
"""A call that stand-ins can be tried for."""


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
    monkeypatch: pytest.MonkeyPatch,
    install: Callable[[Mapping[str, Any]], None],
    call: Call,
    refused: str,
    taken: str,
) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "failure", lambda kernel, call: None)  # what a trial says needs the machine
    install({})
    assert refused in (named("varlen").obstacle(call) or "")
    assert kernels.choose(call).name == taken
    for name in FLASH:
        install({name: FLASH[name]})
        fits = taken == "varlen" or (taken == "flex" and (name == "flash 4" or call.has_softcap))
        assert kernels.choose(call).name == (name if fits else taken)


@pytest.mark.parametrize(
    ("capability", "taken"),
    [
        ((8, 0), ["flash 2"]),
        ((9, 0), ["flash 4", "flash 3", "flash 2"]),
        ((10, 0), ["flash 4", "flash 2"]),
        ((12, 0), ["flash 4", "flash 2"]),
    ],
)
def test_packages_for_other_gpus_are_not_even_tried(
    install: Callable[[Mapping[str, Any]], None], capability: tuple[int, int], taken: list[str]
) -> None:
    """FlashAttention 3 would end the process, and FlashAttention 4 has no backward pass there."""
    install(FLASH)
    call = replace(ON_A_GPU, capability=capability)
    assert [name for name in FLASH if named(name).obstacle(call) is None] == taken


NO_IMAGE = (
    "CUDA error: no kernel image is available for execution on the device\nCompile with TORCH_USE_CUDA_DSA."
)


def no_image(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(NO_IMAGE)


def test_a_package_that_does_not_work_here_hides_no_other(
    install: Callable[[Mapping[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    useless = functools.wraps(stand_ins.flash_3)(no_image)
    install({"flash 3": useless, "flash 2": stand_ins.flash_2})
    caplog.set_level("INFO", "infopo")
    assert kernels.choose(AS_ON_A_GPU).name == "flash 2"
    assert [record.getMessage() for record in caplog.records] == [
        f"the attention kernel 'flash 3' does not work here, so a slower one runs: {NO_IMAGE}",
        "attention on cpu by flash 2 (not flash 4: flash_attn.cute is not installed; not flash 3: "
        "CUDA error: no kernel image is available for execution on the device)",
    ]


def test_the_choice_is_made_anew_where_bits_have_to_repeat(
    install: Callable[[Mapping[str, Any]], None], request: pytest.FixtureRequest
) -> None:
    """FlashAttention 3 has no such backward pass for the widest heads."""
    install({"flash 3": stand_ins.flash_3, "flash 2": stand_ins.flash_2})
    wide = replace(AS_ON_A_GPU, width=256, value_width=256)
    assert kernels.choose(wide).name == "flash 3"
    request.getfixturevalue("deterministic")
    rows = [torch.zeros(1, heads, 3, 256) for heads in (4, 2, 2)]
    assert Call.of(*rows, Options()).is_deterministic
    assert kernels.choose(replace(wide, is_deterministic=True)).name == "flash 2"


def old(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1)) -> Any:  # fmt: skip
    """An old version, which would leave out what it has no name for."""


@pytest.mark.parametrize("feature", ["softcap", "learnable_sink", "deterministic"])
def test_a_version_without_what_a_call_needs_is_done_without(
    install: Callable[[Mapping[str, Any]], None], feature: str
) -> None:
    install({"flash 2": old})
    assert named("flash 2").obstacle(ON_A_GPU) is None
    fields = {"softcap": "has_softcap", "learnable_sink": "has_sinks", "deterministic": "is_deterministic"}
    obstacle = named("flash 2").obstacle(replace(ON_A_GPU, **{fields[feature]: True}))
    assert obstacle == f"this version has no {feature}"


def test_a_package_says_why_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[Mapping[str, Any]], None], tmp_path: Path
) -> None:
    def reasons() -> list[str | None]:
        flash._varlen_function_of.cache_clear()
        return [named(name).obstacle(ON_A_GPU) for name in FLASH]

    absent = [f"{module} is not installed" for module in MODULES.values()]
    install({})
    assert reasons() == absent
    install({"flash 4": stand_ins.flash_4})
    assert reasons() == [None, *absent[1:]]
    for name in MODULES.values():
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("import flash_attn_2_cuda")
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.syspath_prepend(tmp_path)
    missing = "does not load: ModuleNotFoundError: No module named 'flash_attn_2_cuda'"
    assert reasons() == [
        f"flash_attn.cute {missing}",
        "flash_attn_interface does not load: OSError: undefined symbol: _ZN3c104cuda",
        f"flash_attn {missing}",
    ]
    (tmp_path / "flash_attn_interface.py").write_text("raise SystemExit('not for this GPU')")
    importlib.invalidate_caches()
    assert reasons()[1] == "flash_attn_interface does not load: SystemExit: not for this GPU"
    (tmp_path / "flash_attn/__init__.py").write_text("")
    importlib.invalidate_caches()
    assert reasons()[::2] == [absent[0], "flash_attn has no flash_attn_varlen_func"]


def test_other_packages_do_not_break_the_import() -> None:
    """Some libraries put a module without a specification where flash-attn would be."""
    script = (
        "import sys, types\n"
        "for name in ('flash_attn', 'flash_attn_interface'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "import torch\n"
        "from infopo.logps.calls import Call\nfrom infopo.logps.kernels import choose\n"
        "call = Call(torch.device('cpu'), (9, 0), torch.bfloat16, 2, 2, 8, 8, has_sinks=True)\n"
        "print(choose(call).name)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "written out\n"


def test_something_in_the_place_of_triton_is_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert named("flex").obstacle(replace(ON_A_GPU, has_sinks=True)) == "it needs a GPU and triton"


@pytest.mark.parametrize("family", ["llama", "qwen2, sliding window", "olmo2"])
def test_under_autocast_a_kernel_gets_one_type(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Rotary embeddings leave queries and keys in float32 there, which would hide the half precision of the rest."""
    seen = set()

    def noted(query: Any, key: Any, value: Any, options: Any) -> Call:
        seen.add((query.dtype, key.dtype, value.dtype))
        return described(query, key, value, options)

    described = Call.of
    monkeypatch.setattr(Call, "of", noted)
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
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], kernels.Kernel], family: str
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
    monkeypatch: pytest.MonkeyPatch, only_kernel: Callable[[str], kernels.Kernel]
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
    call = Call(torch.device("cpu"), None, torch.float32, 4, 2, 8, 8, True, True, True)

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
    assert kernels.failure(flex, replace(call, dtype=torch.bfloat16)) is None


# ---- the trial -------------------------------------------------------------------------------------------------

EVERYTHING = replace(AS_ON_A_GPU, capability=None, has_window=True, has_softcap=True, has_sinks=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FLASH)
def test_a_package_that_is_right_passes_the_trial(
    install: Callable[[Mapping[str, Any]], None], name: str, dtype: torch.dtype
) -> None:
    install(FLASH)
    call = replace(AS_ON_A_GPU, dtype=dtype, has_window=True, has_softcap=True, has_sinks=name == "flash 4")
    assert kernels.failure(named(name), call) is None


def half_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, half of whose gradient is lost."""
    return tensor / 2 + tensor.detach() / 2


def with_other(**changed: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(query: Any, key: Any, value: Any, layout: ForestLayout, options: Options) -> Any:
        other = {name: change(getattr(options, name)) for name, change in changed.items()}
        return kernels._written_out(query, key, value, layout, replace(options, **other))

    return run


WRONG: dict[str, Callable[..., Any]] = {
    "no window": with_other(window=lambda window: None),
    "a window that is one longer": with_other(window=lambda window: window + 1),
    "its own scaling": with_other(scaling=lambda scaling: None),
    "no scaling": with_other(scaling=lambda scaling: 1.0),
    "no soft cap": with_other(softcap=lambda softcap: None),
    "a soft cap that is inverted": with_other(softcap=lambda softcap: 1 / softcap),
    "a soft cap before scaling": with_other(softcap=lambda softcap: softcap / 8),
    "no sinks": with_other(sinks=lambda sinks: None),
    "sinks of 0": with_other(sinks=lambda sinks: sinks * 0),
    "sinks whose value is lost": with_other(sinks=lambda sinks: sinks - sinks.detach()),
    "sinks that are scaled": with_other(sinks=lambda sinks: sinks / 4),
    "sinks without a gradient": with_other(sinks=lambda sinks: sinks.detach()),
    "half of the gradient of sinks": with_other(sinks=half_of),
    "half of the gradient of queries": lambda q, *rest: kernels._written_out(half_of(q), *rest),
    "half of the gradient of keys": lambda q, k, *rest: kernels._written_out(q, half_of(k), *rest),
    "half of the gradient of values": lambda q, k, v, *rest: kernels._written_out(q, k, half_of(v), *rest),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_is_wrong_is_done_without(
    caplog: pytest.LogCaptureFixture, wrong: str, dtype: torch.dtype
) -> None:
    """A trial compares: a kernel that runs and forgets the window would train on wrong numbers."""
    call = replace(EVERYTHING, dtype=dtype)
    right = named("written out")
    assert kernels.failure(right, call) is None
    reason = kernels.failure(replace(right, run=WRONG[wrong]), call)
    assert reason is not None
    assert "off by" in reason or "no gradient" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 256])
def test_a_right_kernel_passes_the_trial(dtype: torch.dtype, width: int) -> None:
    call = replace(EVERYTHING, dtype=dtype, width=width, value_width=width)
    assert kernels.failure(named("written out"), call) is None
    assert kernels.failure(named("sdpa"), replace(call, has_softcap=False, has_sinks=False)) is None
