"""The end of a run in words, logged when training ends. A command line shows it in place of that."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infopo.output import get_logger
from infopo.report.closing import ending

logger = get_logger(__name__)


class ClosingSummary(TrainerCallback):
    """Logs what changed, the verdicts, where things are and what to run next, when training ends.

    It reads the files of the run, as `infopo report` does, so that both say the same.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero or not state.global_step:
            return
        for line in ending(str(args.output_dir)):
            logger.info(line)
