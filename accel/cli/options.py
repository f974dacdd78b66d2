"""Options of the small commands."""

import argparse
from typing import NoReturn

from accel.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help.")
