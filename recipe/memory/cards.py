"""Cards by name: their memory as nvidia-smi shows it, and the makers' dense matrix rates."""

from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True)
class Card:
    """``memory`` in bytes; ``half`` and ``single`` are FLOP/s in 16 bit and float32. ``ampere`` or
    later has bfloat16 and the variable-length attention that a forecast follows.
    """

    name: str
    memory: int
    half: float
    single: float
    ampere: bool


def _card(name: str, mib: int, half: float, single: float) -> Card:
    older = name.startswith(("T4", "V100"))
    return Card(name, mib * _MIB, half * 1e12, single * 1e12, ampere=not older)


CARDS = (
    _card("RTX 3060 12GB", 12288, 51, 12.7),
    _card("T4 16GB", 15360, 65, 8.1),
    _card("V100 16GB", 16384, 125, 15.7),
    _card("L4 24GB", 23034, 121, 30.3),
    _card("A10G 24GB", 23028, 70, 31.2),
    _card("RTX 3090 24GB", 24576, 71, 35.6),
    _card("RTX 4090 24GB", 24564, 165, 82.6),
    _card("V100 32GB", 32768, 125, 15.7),
    _card("RTX 5090 32GB", 32607, 209, 104.8),
    _card("A100 40GB", 40960, 312, 19.5),
    _card("L40S 48GB", 46068, 362, 91.6),
    _card("A100 80GB", 81920, 312, 19.5),
    _card("H100 80GB", 81559, 989, 66.9),
    _card("H200 141GB", 143771, 989, 66.9),
    _card("B200 180GB", 183359, 2250, 75.0),
)


def card_named(name: str) -> Card | None:
    """By its name, however it is spaced and cased; None for others."""
    wanted = _plain(name)
    return next((card for card in CARDS if _plain(card.name) == wanted), None)


def _plain(name: str) -> str:
    return "".join(name.lower().replace("-", " ").split())
