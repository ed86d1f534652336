"""BibTeX entries of the papers that losses are from. Imports nothing of the package.

Titles and authors are those of arXiv. A paper that is not listed here is cited by its number.
"""

import re

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")

INFOPO = "2505.08507"

_INFOPO_ENTRY = """@inproceedings{xiao2025infopo,
  title = {InfoPO: On Mutual Information Maximization for Large Language Model Alignment},
  author = {Xiao, Teng and Ge, Zhen and Sanghavi, Sujay and Wang, Tian and Katz-Samuels, Julian and Versage, Marc and
            Cui, Qingjun and Chilimbi, Trishul},
  booktitle = {Proceedings of NAACL 2025 (Long Papers)},
  pages = {11699--11711},
  year = {2025},
  doi = {10.18653/v1/2025.naacl-long.585},
  url = {https://aclanthology.org/2025.naacl-long.585},
  eprint = {2505.08507},
  archivePrefix = {arXiv}
}"""

PAPERS = {
    "1606.00709": (
        "Nowozin",
        "f-GAN: Training Generative Neural Samplers using Variational Divergence Minimization",
    ),
    "1801.04062": ("Belghazi", "MINE: Mutual Information Neural Estimation"),
    "1807.03748": ("van den Oord", "Representation Learning with Contrastive Predictive Coding"),
    "1905.06922": ("Poole", "On Variational Bounds of Mutual Information"),
    "1910.06222": ("Song", "Understanding the Limitations of Variational Mutual Information Estimators"),
    "2305.10425": ("Zhao", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"),
    "2305.18290": (
        "Rafailov",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    ),
    "2309.06657": ("Liu", "Statistical Rejection Sampling Improves Preference Optimization"),
    "2309.16240": (
        "Wang",
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
    ),
    "2310.12036": ("Azar", "A General Theoretical Paradigm to Understand Learning from Human Preferences"),
    "2401.08417": (
        "Xu",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    ),
    "2402.00856": ("Ji", "Towards Efficient Exact Optimization of Language Model Alignment"),
    "2402.01306": ("Ethayarajh", "KTO: Model Alignment as Prospect Theoretic Optimization"),
    "2402.05369": ("Chen", "Noise Contrastive Alignment of Language Models with Explicit Rewards"),
    "2402.13228": ("Pal", "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive"),
    "2403.00409": ("Chowdhury", "Provably Robust DPO: Aligning Language Models with Noisy Feedback"),
    "2403.07691": ("Hong", "ORPO: Monolithic Preference Optimization without Reference Model"),
    "2403.19159": ("Park", "Disentangling Length from Quality in Direct Preference Optimization"),
    "2404.04656": ("Jung", "Binary Classifier Optimization for Large Language Model Alignment"),
    "2405.00675": ("Wu", "Self-Play Preference Optimization for Language Model Alignment"),
    "2405.14734": ("Meng", "SimPO: Simple Preference Optimization with a Reference-Free Reward"),
    "2406.05882": ("Melnyk", "Distributional Preference Alignment of LLMs via Optimal Transport"),
    "2406.08414": ("Lu", "Discovering Preference Optimization Algorithms with and for Large Language Models"),
    "2406.11827": ("Zhou", "WPO: Enhancing RLHF with Weighted Preference Optimization"),
    "2407.08639": ("Wu", "β-DPO: Direct Preference Optimization with Dynamic β"),
    "2408.06266": (
        "D'Oosterlinck",
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    ),
    "2410.10148": ("Wu", "α-DPO: Adaptive Reward Margin is What Direct Preference Optimization Needs"),
    "2412.14516": ("Xiao", "Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment"),
    "2502.00883": ("Xiao", "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters"),
    "2503.05079": ("Xiao", "On a Connection Between Imitation Learning and RLHF"),
    "2505.07558": (
        "Higuchi",
        "Direct Density Ratio Optimization: A Statistically Consistent Approach to Aligning Large Language Models",
    ),
    "2505.19601": ("Kim", "Preference Optimization by Estimating the Ratio of the Data Distribution"),
}
"""First author and title by arXiv number."""


def paper_of(source: str | None) -> str | None:
    """Returns the arXiv number of a loss's own paper, the first in the source that it declares, or None.

    Example:
        >>> paper_of("Meng et al. 2024, arXiv 2405.14734, eq. 6; α: Gupta et al. 2025 (AlphaPO), arXiv 2501.03884")
        '2405.14734'
    """
    match = _ARXIV.search(source or "")
    return match[1] if match else None


def entry(number: str) -> str:
    """Returns the BibTeX entry of a paper.

    Example:
        >>> print(entry("2305.18290").splitlines()[0])
        @misc{rafailov2023_2305_18290,
    """
    if number == INFOPO:
        return _INFOPO_ENTRY
    author, title = PAPERS.get(number, ("", ""))
    year = f"20{number[:2]}"
    key = "".join(letter for letter in author.lower() if letter.isalpha()) or "arxiv"
    lines = [f"@misc{{{key}{year}_{number.replace('.', '_')},"]
    if title:
        lines += [f"  title = {{{title}}},", f"  author = {{{author} and others}},"]
    lines += [
        f"  year = {{{year}}},", f"  eprint = {{{number}}},", "  archivePrefix = {arXiv},",
        f"  url = {{https://arxiv.org/abs/{number}}}", "}",
    ]  # fmt: skip
    return "\n".join(lines)
