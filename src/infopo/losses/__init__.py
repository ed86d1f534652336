"""Losses: pure functions of `ResponseLogps`. A function knows no model, device, rank or setting.

| file | contents |
|---|---|
| `family.py` | InfoPO and its family, one bound each: every equation of the paper that trains a model |
| `pairwise.py` | losses that compare a chosen with a rejected response of one prompt: DPO, IPO, f-DPO, ... |
| `reference_free.py` | those without a reference: SimPO, CPO, SLiC-HF, ORPO |
| `margins.py` | later losses of a pair's margin: BPO, RePO, DiscoPOP, WPO |
| `transport.py` | AOT: scores of one rank in the step are matched |
| `moving.py` | β-DPO, α-DPO, BCO: strength or threshold follow moving statistics of the steps so far |
| `unpaired.py` | other losses of single responses: SFT, KTO, APO-zero |
| `common.py` | what several of them share: the critic, the capped exponential, the likelihood term |
| `coupling.py` | numbers of a whole optimizer step that couple its examples: DV's mean, KTO's KL |
| `declaration.py` | `@objective(...)`, which says what the function below it needs |
| `catalog.py` | the declarations as a table, read without importing torch |
| `foreign.py`, `fingerprint.py` | losses from outside the package, and a hash of what they compute |
| `judgement.py` | whether a loss is what it declares, on small random batches |
| `registry.py` | name and parameters -> function |

Notation in all of them: π = policy, r = π/π_ref, w = chosen, l = rejected, |y| = number of tokens,
Δ = log r(w) - log r(l), σ the logistic function. Log-probs and log-ratios are in nats. A function returns terms, and
the trainer divides each by its count in the whole optimizer step (see `LossTerm`).
"""
