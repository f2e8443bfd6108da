"""The command line.  Nothing heavy is imported before a command runs, so that ``--help`` answers at once."""

from tersely.cli import look, make, prove, ship
from tersely.cli.application import main, spread

__all__ = ["look", "main", "make", "prove", "ship", "spread"]
