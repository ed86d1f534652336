"""The distribution that responses are drawn from. Imports no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from infopo.errors import ConfigError


@dataclass(frozen=True)
class Law:
    """Distribution that responses are drawn from.

    Attributes:
        max_new_tokens: Largest number of tokens of a response, the end-of-sequence token included.
        temperature: Divisor of the logits. 0 is greedy decoding.
        top_p: Mass of the nucleus that tokens are drawn from, in (0, 1]. 1 is the whole distribution.
        stop: Texts at which a response ends. They are not part of it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        # The comparisons are written so that NaN fails, too.
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: expected a finite number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.temperature == 0 and 0 < self.top_p < 1:
            problems.append(
                "top_p: does not apply to greedy decoding (temperature 0), which takes the likeliest token; expected 1 "
                f"or a temperature above 0, got {self.top_p}"
            )
        if not all(self.stop):
            problems.append("stop: expected texts, got an empty one")
        if problems:
            raise ConfigError(problems)

    @property
    def record(self) -> dict[str, Any]:
        """The settings, as the sample store keeps them."""
        return {**asdict(self), "stop": list(self.stop)}
