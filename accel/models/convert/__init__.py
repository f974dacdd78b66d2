"""State-dict names of published networks and ours; one file per system."""

from accel.models.convert import amsnet, amtnet, masnet, msn, tanet, tdn, tsm
from accel.models.convert.names import NameTable

# By the `system` of a network.
TABLES: dict[str, NameTable] = {
    "amsnet": amsnet.TABLE,
    "amsnet_slowonly": amsnet.SLOWONLY_TABLE,
    "amtnet": amtnet.TABLE,
    "masnet": masnet.TABLE,
    "msn": msn.TABLE,
    "ssd300": amtnet.SSD300_TABLE,
    "tanet": tanet.TABLE,
    "tdn": tdn.TABLE,
    "tsm": tsm.TABLE,
    "tsn": tsm.TABLE,
}

__all__ = ["TABLES", "NameTable"]
