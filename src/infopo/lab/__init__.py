"""The lab: a task with a verifier, a small SFT policy, and preference data that are sampled from it.

It runs on two CPU cores and needs no network, so that objectives can be compared, and examples and tests can run, on a
real policy with real samples within minutes. Importing this package, or `infopo.lab.problems`, imports no torch.
"""

from pathlib import Path

from infopo.lab.problems import SPLITS, Problem, make_problems, share_of_right_steps, solve, verify

__all__ = ["SPLITS", "Problem", "make_problems", "policy_path", "share_of_right_steps", "solve", "verify"]


def policy_path() -> Path:
    """Returns the folder of the shipped SFT policy and its tokenizer, for `from_pretrained`.

    Example:
        >>> sorted(file.name for file in policy_path().glob("*.safetensors"))
        ['model.safetensors']
    """
    return Path(__file__).parent / "policy"
