"""Prepare the data of a configuration file: a process for tests to start, kill and start again."""

import sys

from data_pipeline.prepare import prepare
from data_pipeline.progress import console_progress
from loglinear.config import load_config
from loglinear.errors import UserError

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    try:
        with console_progress() as progress:
            prepare(config.data, config.model.vocab_size, progress)
    except UserError as error:
        print(error)
        sys.exit(2)
