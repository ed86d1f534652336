"""A judge as a verifier of `infopo pairs`: the score of a response is its share of wins against the prompt's others."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from infopo.errors import ConfigError
from infopo.evaluation.items import Answered, shown_text
from infopo.evaluation.judge import Judgements
from infopo.evaluation.verifiers import Score, Verifier, of_rows
from infopo.evaluation.winrate import Duel
from infopo.workflows.ask_judge import JudgeSettings, run_judge


def judge_verifier(settings: JudgeSettings, folder: Path, num_generations: int) -> Verifier:
    """Returns a verifier that asks a judge about every two different responses to a prompt, in both orders.

    The score is the mean over the other responses of 1 for a win, 1/2 for a tie or a flip, and 0 for a loss. Responses
    that were cut off are not asked about. Answers are kept in `judgements.jsonl`, so that nothing is asked twice.

    Args:
        settings: Who judges.
        folder: Folder of the answers.
        num_generations: Samples per prompt, for the estimate of the cost.

    Raises:
        ConfigError: The judge is behind a server, and nobody has agreed to the cost.
    """
    if settings.is_server and not settings.yes:
        most = num_generations * (num_generations - 1)
        raise ConfigError(
            f"--verifier judge: asks {settings.judge} about every two responses to a prompt in both orders, up to "
            f"{most} questions per prompt; add --yes if it may"
        )
    judge = settings.make()
    store = Judgements(folder)

    def score(answers: Sequence[Answered]) -> list[Score]:
        texts: dict[str, list[str]] = {}
        for each in answers:
            known = texts.setdefault(each.item.id, [])
            if each.finished and (text := each.response.strip()) and text not in known:
                known.append(text)
        prompts = {each.item.id: shown_text(each.item.prompt) for each in answers}
        duels = [
            Duel(item, prompts[item], a, b)
            for item, known in texts.items()
            for a, b in combinations(known, 2)
        ]
        wins: dict[tuple[str, str], list[float]] = {}
        for duel, outcome in zip(
            duels, run_judge(duels, store, judge, settings) if duels else [], strict=True
        ):
            if outcome.score is not None:
                wins.setdefault((duel.item, duel.a), []).append(outcome.score)
                wins.setdefault((duel.item, duel.b), []).append(1 - outcome.score)
        return [
            _mean(wins.get((each.item.id, each.response.strip()))) if each.finished else None
            for each in answers
        ]

    return of_rows(f"judge:{settings.judge}", score)


def _mean(scores: Sequence[float] | None) -> float | None:
    return sum(scores) / len(scores) if scores else None
