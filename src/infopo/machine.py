"""The accelerators of this machine, and what a model takes of their memory. Functions that import torch say so."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

BYTES_PER_PARAMETER = {"full": 16.0, "lora": 2.0, "qlora": 0.6}
"""Memory that training takes per parameter of the model, without activations: float32 weights, gradients and Adam's two
moments, or frozen weights of 16 bits, or of 4 bits with their scales. What an adapter itself takes is not counted."""


@dataclass(frozen=True)
class Accelerators:
    """The accelerators that torch sees.

    Attributes:
        kind: `cuda`, `mps`, `xpu`, ..., or `cpu` if there is none.
        names: A name per device.
        memory: Bytes per device, or None if it is not known.
        bf16: Whether they compute in bfloat16.
    """

    kind: str
    names: tuple[str, ...] = ()
    memory: tuple[int | None, ...] = ()
    bf16: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)


def accelerators() -> Accelerators:
    """Returns the accelerators of this machine. It imports torch."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return Accelerators("cpu")
    devices = range(torch.accelerator.device_count())
    if found.type != "cuda":
        return Accelerators(found.type, tuple(f"{found.type}:{i}" for i in devices), (None,) * len(devices))
    properties = [torch.cuda.get_device_properties(index) for index in devices]
    return Accelerators(
        "cuda",
        tuple(each.name for each in properties),
        tuple(each.total_memory for each in properties),
        torch.cuda.is_bf16_supported(including_emulation=False),
    )


def number_of_parameters(folder: Path) -> int | None:
    """Returns the number of parameters of a saved model, read from the headers of its safetensors files.

    Args:
        folder: The folder. None is returned if it holds no such files, or if they cannot be read.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100_000_000)))
        except (OSError, ValueError, struct.error):
            return None
        for name, tensor in header.items():
            size = 1
            for side in tensor.get("shape", []) if name != "__metadata__" else [0]:
                size *= side
            total += size
    return total or None
