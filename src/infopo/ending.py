"""The end of a run in words, logged when training ends. A command line shows it in place of that."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infopo.errors import InfoPOError
from infopo.output import get_logger
from infopo.report.closing import closing_lines

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
        try:
            lines = closing_lines(str(args.output_dir))
        except (InfoPOError, OSError) as error:  # files could not be written, which was said then
            logger.info("no summary of the run: %s", error)
            return
        for line in lines:
            logger.info(line)
