"""Storage formats of moments, by the names that users write.

To replace a default, change one line of `FORMATS`. A new format is one file with a
`Format`, and a line here.
"""

from collections.abc import Callable

from .base import Format as Format
from .base import widened as widened
from .dense import BFloat16 as BFloat16
from .dense import Float32 as Float32
from .dynamic8 import Dynamic8 as Dynamic8
from .log8 import Log8 as Log8
from .root8 import Root8 as Root8

# name -> (is the slot signed?) -> format
FORMATS: dict[str, Callable[[bool], Format]] = {
    "32bit": lambda signed: Float32(),
    "bf16": lambda signed: BFloat16(unbiased=not signed),
    "8bit": lambda signed: Log8() if signed else Root8(),
    "dynamic8": lambda signed: Dynamic8(signed),
}


def numbered(number: int) -> Format:
    """The format with a number.

    Raises:
      KeyError: if there is none.
    """
    made = (make(signed) for make in FORMATS.values() for signed in (True, False))
    return {form.number: form for form in made}[number]
