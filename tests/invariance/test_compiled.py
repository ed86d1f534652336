"""Compiled layers: numbers and gradients of layers that are not, and a model that is given back as it was."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from families import FAMILIES, assert_same_gradients
from infopo.data.packing import pack
from infopo.logps import attention, router
from infopo.logps.compiling import compile_layers
from infopo.logps.forward import prepare, response_logps
from infopo.models import disable_dropout
from infopo.records import PackedBatch
from tried import architectures
from tried.tiny import tiny_config, tiny_model
from worlds import quick, random_examples, tiny_of

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

MIXTURES = (
    "dbrx", "deepseek_v4", "doge", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "jamba", "jetmoe", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe",
    "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip
"""Architectures whose models give the load-balancing loss of their routers."""


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Graphs of one test are none of another's, which could hide that a model is compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch_of(count: int, seed: int = 0) -> PackedBatch:
    return pack(random_examples(count, seed, chosen=(1, 0, 2), rejected=(1, 2)))


def numbers(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-probs, load-balancing loss, and the gradients of both."""
    model.zero_grad()
    with router.aux_losses(True) as found:
        values = response_logps(model, batch)
    aux = router.mean(found)
    assert aux is not None
    ((values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum() + 3.0 * aux).backward()
    return values.detach(), aux.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model: Any, compiled: Any) -> None:
    batch = batch_of(5)
    values, aux, gradients = numbers(model, batch)
    # Graphs of passes without the loss, in both modes, are what a pass with it could run on.
    with torch.no_grad():
        response_logps(compiled, batch)
    response_logps(compiled, batch).sum().backward()
    for _ in range(2):
        again = numbers(compiled, batch)
        torch.testing.assert_close(again[0], values, rtol=0, atol=1e-4)
        torch.testing.assert_close(again[1], aux, rtol=0, atol=1e-5)
        assert_same_gradients(again[2], gradients)


@pytest.mark.parametrize("kind", quick(MIXTURES, "mixtral", "gpt_oss"))
def test_a_compiled_mixture_of_experts_is_balanced_as_one_that_is_not(kind: str) -> None:
    """In parts where it can share prompts, else as a whole, as the trainer compiles it."""
    model = tiny_model(tiny_config(architectures.KINDS[kind], architectures.OWN.get(kind, {})))
    disable_dropout(model)
    compiled: Any = copy.deepcopy(model)
    path, _ = prepare([compiled], "auto", is_compiled=True)
    if path == "forest":
        assert attention.enable(model) is None
        compile_layers(compiled, "eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    assert_same(model, compiled)


@pytest.mark.parametrize("kind", quick(MIXTURES, "mixtral"))
def test_so_is_one_that_is_compiled_as_a_whole(kind: str) -> None:
    model = tiny_model(tiny_config(architectures.KINDS[kind], architectures.OWN.get(kind, {})))
    disable_dropout(model)
    assert prepare([model], "naive", is_compiled=True)[0] == "naive"
    assert_same(model, torch.compile(copy.deepcopy(model), backend="eager"))


def test_every_part_but_the_routers_is_compiled() -> None:
    model = tiny_of(FAMILIES["mixtral"])
    compile_layers(model, "eager")
    layer = model.model.layers[0]
    compiled = {name for name, part in layer.named_modules() if part._compiled_call_impl is not None}
    assert compiled == {"self_attn", "input_layernorm", "post_attention_layernorm", "mlp.experts"}
