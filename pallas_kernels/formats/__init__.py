"""Storage formats of moments, by the names that users write.

To replace a default, change one line of `FORMATS`. A new format is one file with a
`Format`, and a line here.
"""

from collections.abc import Callable

from .base import Format as Format
from .base import widened as widened
from .bits8 import Bits8 as Bits8
from .dense import BFloat16 as BFloat16
from .dense import Float32 as Float32
from .dynamic8 import Dynamic8 as Dynamic8
from .linear8 import Linear8 as Linear8
from .mixed8 import Mixed8 as Mixed8
from .mulaw import MuLaw as MuLaw

# name -> (is the slot signed? may it be relative to another?) -> format
FORMATS: dict[str, Callable[..., Format]] = {
    "32bit": lambda signed, relative=False: Float32(),
    "bf16": lambda signed, relative=False: BFloat16(),
    "8bit": lambda signed, relative=False: (
        Bits8() if not signed else Linear8(relative) if relative else MuLaw()
    ),
    "16bit": lambda signed, relative=False: MuLaw(16) if signed else BFloat16(),
    "dynamic8": lambda signed, relative=False: Dynamic8(signed),
}
# The name that is asked for -> that of the format in which a slot is stored whose decay
# is .999 or more: it adds up 1 / (1 - decay) roundings, and 8 bits are lost in them.
SLOW: dict[str, str] = {"8bit": "16bit"}
# Likewise, of slots whose steps are singular vectors: errors count in all directions.
ORTHOGONAL: dict[str, Format] = {"8bit": Mixed8()}
# The numbers of formats that are written no more -> what reads them.
_BEFORE: dict[int, Format] = {
    2: BFloat16(),  # rounded to the nearest
    10: Linear8(),
}


def numbered(number: int) -> Format:
    """The format with a number.

    Raises:
      KeyError: if there is none.
    """
    kinds = ((True, False), (True, True), (False, False))
    made = (make(*kind) for make in FORMATS.values() for kind in kinds)
    return (_BEFORE | {form.number: form for form in made})[number]
