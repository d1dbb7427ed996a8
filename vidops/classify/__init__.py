"""``vidops classify VIDEO``: a video transformer with and without token pruning."""

from vidops.classify.command import main as main
from vidops.classify.command import run as run
