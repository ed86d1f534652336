"""Adapters of PEFT on a tiny Llama: the same trial as for architectures."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from tried import trial
from tried.tiny import tiny_config, tiny_model
from tried.trial import Row

INTRODUCTION = """Adapters of PEFT on a tiny Llama (on experts: Mixtral; with biases: Qwen2), asked the same as
architectures. Log-probs are compared once more after noise was added to the adapter, since most are 0 at first, and
would hide what is wrong with them. Each is tried again with the policy without its adapter as the reference.
"""

PROJECTIONS = ["q_proj", "v_proj"]
ALL = "all-linear"


def config(kind: str, **settings: Any) -> PeftConfig:
    return getattr(peft, kind)(task_type="CAUSAL_LM", **settings)


def lora(**settings: Any) -> PeftConfig:
    return config("LoraConfig", **{"r": 4, "target_modules": ALL, **settings})


def on(kind: str, **settings: Any) -> PeftConfig:
    return config(kind, target_modules=PROJECTIONS, **settings)


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: lora(target_modules=None),
    "LoRA, all linear layers": lora,
    "LoRA, all linear layers and the embeddings": lambda: lora(target_modules=[*PROJECTIONS, "embed_tokens"]),
    "LoRA on the head": lambda: lora(target_modules=[*PROJECTIONS, "lm_head"]),
    "LoRA, rank-stabilised": lambda: lora(use_rslora=True),
    "LoRA, DoRA": lambda: lora(use_dora=True),
    "LoRA, PiSSA": lambda: lora(init_lora_weights="pissa"),
    "LoRA, OLoRA": lambda: lora(init_lora_weights="olora"),
    "LoRA, orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "LoRA, Gaussian": lambda: lora(init_lora_weights="gaussian"),
    "LoRA, B random at first": lambda: lora(init_lora_weights=False),
    "LoRA, LoftQ": lambda: lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
    "LoRA, EVA": lambda: lora(init_lora_weights="eva"),
    "LoRA, CorDA": lambda: lora(init_lora_weights="corda"),
    "LoRA, trainable tokens": lambda: lora(trainable_token_indices=trial.ids("?e")),
    "LoRA, `modules_to_save` of the head": lambda: lora(target_modules=PROJECTIONS, modules_to_save=["lm_head"]),
    "LoRA, `modules_to_save` of the embeddings": lambda: lora(
        target_modules=PROJECTIONS, modules_to_save=["embed_tokens"]
    ),
    "LoRA on experts (`target_parameters`)": lambda: lora(
        target_modules=PROJECTIONS, target_parameters=["mlp.experts.gate_up_proj"]
    ),
    "LoRA, `rank_pattern` and `alpha_pattern`": lambda: lora(
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}
    ),
    "LoRA, biases": lambda: lora(bias="all"),
    "LoRA, `layers_to_transform`": lambda: lora(target_modules=PROJECTIONS, layers_to_transform=[1]),
    "LoRA with dropout": lambda: lora(lora_dropout=0.1),
    "aLoRA": lambda: lora(alora_invocation_tokens=trial.ids("?")),
    "LoRA, KaSA": lambda: lora(kasa_config=peft.KasaConfig()),
    "LoRA, MonteCLoRA": lambda: lora(monteclora_config=peft.MontecloraConfig()),
    "LoRA, VeLoRA": lambda: lora(velora_config=peft.VeloraConfig(num_groups=4)),
    "LoRA, BD-LoRA": lambda: lora(
        use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False),
        target_modules=PROJECTIONS,
    ),
    "LoRA-GA": lambda: lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
    "AdaLoRA": lambda: on("AdaLoraConfig", total_step=10, init_r=4, target_r=2, tinit=1, tfinal=1),
    "IA³": lambda: config(
        "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LoHa": lambda: on("LoHaConfig", r=4),
    "LoKr": lambda: on("LoKrConfig", r=4),
    "OFT": lambda: on("OFTConfig", oft_block_size=4, r=0),
    "BOFT": lambda: on("BOFTConfig", boft_block_size=4),
    "VeRA": lambda: config("VeraConfig", target_modules=["q_proj", "o_proj"], r=4),
    "PVeRA": lambda: config("PveraConfig", target_modules=["q_proj", "o_proj"], r=4),
    "HRA": lambda: on("HRAConfig", r=4),
    "FourierFT": lambda: on("FourierFTConfig", n_frequency=16),
    "VB-LoRA": lambda: on("VBLoRAConfig", r=2, vector_length=8, num_vectors=4, topk=2),
    "MiSS": lambda: on("MissConfig", r=4),
    "RandLoRA": lambda: config("RandLoraConfig", target_modules=["q_proj", "o_proj"], r=4),
    "RoAd": lambda: on("RoadConfig", group_size=4),
    "SHiRA": lambda: on("ShiraConfig", r=2),
    "C³A": lambda: on("C3AConfig", block_size=4),
    "WaveFT": lambda: on("WaveFTConfig", n_frequency=16),
    "DeLoRA": lambda: on("DeloraConfig", r=4),
    "GraLoRA": lambda: on("GraloraConfig", r=4, gralora_k=2),
    "OSF": lambda: on("OSFConfig"),
    "Poly": lambda: on("PolyConfig", r=4, n_tasks=1),
    "Trainable tokens": lambda: config("TrainableTokensConfig", token_indices=trial.ids("?e")),
    "LayerNorm tuning": lambda: config("LNTuningConfig", target_modules=["input_layernorm"]),
    "AdaMSS": lambda: on("AdamssConfig", r=4, num_subspaces=2),
    "BEFT": lambda: on("BeftConfig"),
    "DEFT": lambda: on("DeftConfig", r=4),
    "FRoD": lambda: on("FrodConfig", progressbar=False),
    "GLoRA": lambda: on("GloraConfig", r=4),
    "HiRA": lambda: on("HiraConfig", r=4),
    "LILY": lambda: on("LilyConfig", r=4),
    "PEANuT": lambda: on("PeanutConfig", r=4),
    "PSOFT": lambda: on("PsoftConfig", r=4),
    "Shadow": lambda: config("ShadowConfig", r=4, shadow_num_hidden_layers=1),
    "Supertuning": lambda: on("SupertuningConfig", sparsity=0.9),
    "TinyLoRA": lambda: on("TinyLoraConfig", u=8),
    "Uni-LoRA": lambda: on("UniLoraConfig"),
    "Cartridge": lambda: config("CartridgeConfig", num_virtual_tokens=4),
    "Prompt tuning": lambda: config("PromptTuningConfig", num_virtual_tokens=4),
    "Multitask prompt tuning": lambda: config("MultitaskPromptTuningConfig", num_virtual_tokens=4),
    "P-tuning": lambda: config("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
    "Prefix tuning": lambda: config("PrefixTuningConfig", num_virtual_tokens=4),
    "Context-aware prompt tuning (CPT)": lambda: config("CPTConfig", cpt_token_ids=[5, 6], cpt_mask=[1, 1],
                                                          cpt_tokens_type_mask=[1, 2]),
    "Adaption prompt (LLaMA-Adapter)": lambda: config("AdaptionPromptConfig", adapter_len=4, adapter_layers=1,
                                                       target_modules="self_attn"),
}  # fmt: skip

NOT_TRIED = {
    "X-LoRA": "it mixes adapters that were trained before",
    "LoRA, Arrow": "it mixes adapters that were trained before",
}


def names() -> list[str]:
    return sorted([*ADAPTERS, *NOT_TRIED], key=str.lower)


def row(name: str) -> Row:
    """The trial with the default reference, and again with the policy without its adapter as the reference."""
    if name in NOT_TRIED:
        return Row(name, "not tried", NOT_TRIED[name])
    try:
        ADAPTERS[name]()
    except ImportError as error:
        return Row(name, "not tried", trial.first_sentence(error))
    # The tiny Llama has no biases.
    kind = MixtralConfig if "experts" in name else Qwen2Config if "biases" in name else LlamaConfig

    def once(**settings: Any) -> Row:
        model = tiny_model(tiny_config(kind, {}))
        original = copy.deepcopy(model)
        return trial.train(
            name,
            model,
            lambda folder: PeftModel.from_pretrained(original, folder),
            peft_config=ADAPTERS[name](),
            settings=settings,
        )

    result = once()
    if result.result != "trained":
        return result
    off = once(reference="adapter-off")
    if off.result == "fault":
        return replace(result, note=f"{result.note}; not with `reference: adapter-off` ({off.note})")
    changes = "the new adapter changes the policy" if "at once" in off.note else "the reference would change"
    same = "the same" if off.result == "trained" else f"refused, since {changes}"
    return replace(result, note=f"{result.note}; with `reference: adapter-off` {same}")
