"""The stages of an experiment under their former name; to be removed with the last call site."""

from robusthash.apps.experiment.block_store import read_block as read_block
from robusthash.apps.experiment.evaluation_stages import *  # noqa: F403
from robusthash.apps.experiment.model_stages import *  # noqa: F403
from robusthash.apps.experiment.training_stages import *  # noqa: F403
