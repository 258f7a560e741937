"""What the folder of a run must not hold already, if fine-tuning is to write into it."""

from gpt1_jax.config import Config, FinetuneConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.run import CONFIG


def check_folder(config: FinetuneConfig) -> None:
    """Checks that a name stands for one run, or for the runs of several seeds, and not for both.

    Raises:
        UserError: if it would.
    """
    folder, several = config.run_dir, len(config.seeds) > 1
    if several and (folder / CONFIG).exists():
        held = "a single run"
    elif not several and any(folder.glob(f"seed-*/{CONFIG}")):
        held = "the runs of several seeds"
    else:
        return
    raise UserError(f"seeds={list(config.seeds)}: {folder} holds {held}; start others with name=NEW")


def check_epochs(config: Config) -> None:
    """Checks that a run goes on in the epochs that it began with, whatever else was allowed to change.

    Its position in the data, and which of its checkpoints end an epoch, mean nothing in others.

    Raises:
        UserError: if its epochs were others, or it had none.
    """
    with Checkpoints(config.run_dir) as checkpoints:
        newest = checkpoints.newest_files()
        if newest is None:
            return
        step, files = newest
        made_by = parse_config(files.config, str(checkpoints.path(step)))
    if made_by.finetune is None:
        raise UserError(f"{config.run_dir}: holds a run that was not fine-tuned; start another with name=NEW")
    there, now = ((c.checkpoint.every, c.train.batch_size) for c in (made_by, config))
    if there != now:
        raise UserError(
            f"{config.run_dir}: began with epochs of {there[0]:,} updates of {there[1]} examples, and cannot go on "
            f"with {now[0]:,} of {now[1]}; start another run with name=NEW"
        )
