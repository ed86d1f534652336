"""Tells whether the numbers of a step are finite, while the device still computes what comes after them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class FiniteWatch:
    """Notes values as they are computed, and answers once per step.

    On a GPU the answer is copied to the host behind the values, so that the host waits for these, i.e. for a forward
    pass, but not for the backward pass that follows.

    Example:
        >>> watch = FiniteWatch()
        >>> watch.note([torch.tensor(1.0), torch.tensor(float("nan"))])
        >>> watch.answer(), watch.answer()  # a second step has noted nothing
        (False, True)
    """

    def __init__(self) -> None:
        self._notes: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def note(self, values: Sequence[Tensor]) -> None:
        """Notes scalars that the next answer is about."""
        is_finite = torch.stack([v.detach().isfinite() for v in values]).all()
        if not is_finite.is_cuda:
            self._notes.append((is_finite, None))
            return
        on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
        on_host.copy_(is_finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._notes.append((on_host, event))

    def answer(self) -> bool:
        """Returns whether all that was noted since the last answer is finite."""
        notes, self._notes = self._notes, []
        for _, event in notes:
            if event is not None:
                event.synchronize()
        return all(bool(is_finite) for is_finite, _ in notes)
