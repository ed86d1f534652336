"""What transformers' Trainer does with logits or with several models, refused by name."""

from typing import Any

from transformers import Trainer

from infopo.errors import UnsupportedArgumentError


class RefusingTrainer(Trainer):
    """transformers' `Trainer` without the methods that cannot work here, each of which says what to do instead."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which returns logits and labels, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "predict: no logits are kept to return; evaluate(dataset, metric_key_prefix='test') gives the metrics"
        )

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which returns a batch's logits and labels, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "prediction_step: no logits are kept to return; infopo.logps.forward.response_logps(model, batch) gives "
            "the log-probs of a batch"
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which makes a new model for each trial, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "hyperparameter_search: the reference is computed from one model; make a trainer for each trial, which "
            "finds its reference log-probs in the store"
        )
