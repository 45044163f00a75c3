"""train.py in which each process takes the mean over its own tokens, and not over those of all."""

import sys

from recipe import train
from recipe.exit_codes import run_command
from recipe.training import arguments

arguments._OURS["average_tokens_across_devices"] = False

if __name__ == "__main__":
    sys.exit(run_command(train.main))
