"""Compiled layers: numbers and gradients of layers that are not, and a model that is given back as it was."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from families import FAMILIES, assert_same_gradients
from infopo.data.packing import pack
from infopo.logps import attention, router
from infopo.logps.compiling import compile_layers, compiled
from infopo.logps.forward import prepare, response_logps
from infopo.models import disable_dropout
from infopo.records import PackedBatch
from trainers import trainer_of
from tried import architectures
from tried.tiny import tiny_config, tiny_model
from worlds import quick, random_examples, tiny_llama, tiny_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]

MIXTURES = (
    "dbrx", "deepseek_v4", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa",
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


@pytest.mark.parametrize("kind", quick(MIXTURES))
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


class Samples(TrainerCallback):
    """Samples after each step, as a user's own callback may, and notes how many graphs that took."""

    def __init__(self, fails: bool) -> None:
        self.graphs: list[int] = []
        self.trained = 0
        self.fails = fails

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trained = made()
        sample(model)
        self.graphs.append(made() - self.trained)
        if self.fails:
            raise KeyboardInterrupt


def made() -> int:
    return counters["stats"]["unique_graphs"]


def sample(model: Any) -> torch.Tensor:
    rows = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return tokens


@pytest.mark.parametrize("fails", [False, True], ids=["to the end", "stopped"])
def test_a_compiled_policy_is_given_back_as_it_came(tmp_path: Path, fails: bool) -> None:
    """And samples that are drawn while it trains take no compiler: each form of their caches would be compiled."""
    counters.clear()
    model, samples = tiny_llama(), Samples(fails)
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    trainer = trainer_of(tmp_path, model=model, callbacks=[samples], reference_store="off", **settings)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    assert samples.trained > 0
    assert set(samples.graphs) == {0}
    assert [name for name, part in model.named_modules() if part._compiled_call_impl is not None] == []
    before = made()
    sample(model)
    assert made() == before


def test_layers_that_are_compiled_again_keep_their_graphs() -> None:
    model, batch = tiny_llama(), batch_of(5)
    assert attention.enable(model) is None
    counters.clear()
    found = []
    for _ in range(3):
        with compiled(model, "eager"):
            response_logps(model, batch).sum().backward()
        found.append(made())
    assert found[0] == found[1] == found[2] > 0


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", quick(("forest", "naive"), "forest"))
def test_recomputed_activations_are_those_of_the_forward_pass(path: str, reentrant: bool) -> None:
    """The naive path is that of a rank without rows, whatever the model is prepared for."""
    model, batch = tiny_llama(), batch_of(5)
    assert attention.enable(model) is None
    gradients = []
    for is_compiled in (False, True):
        if is_compiled:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            compile_layers(model, "aot_eager")
        model.zero_grad()
        response_logps(model, batch, path).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_same_gradients(gradients[1], gradients[0])


def test_a_policy_that_was_compiled_as_a_whole_can_be_pickled() -> None:
    model = tiny_llama()
    prepare([model], "naive", is_compiled=True)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)
