"""State-dict names of published networks and ours; one file per system."""

from accel.models.convert import masnet, tanet, tsm
from accel.models.convert.names import NameTable

# By `ClipNetwork.system`.
TABLES: dict[str, NameTable] = {
    "masnet": masnet.TABLE,
    "tanet": tanet.TABLE,
    "tsm": tsm.TABLE,
    "tsn": tsm.TABLE,
}

__all__ = ["TABLES", "NameTable"]
