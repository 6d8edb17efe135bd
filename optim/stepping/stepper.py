"""What `update` and `step` of every optimizer have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

from octavo.pallas_kernels import Storage

from ..options import Settings
from ..sharding.finer import Places
from ..storage.tree import Leaves
from .tasks import Work


class Stepper(ABC):
    """What a `Transformation` runs.

    Attributes:
      settings: the options.
    """

    settings: Settings

    @property
    @abstractmethod
    def rate(self) -> Any:
        """The learning rate: a number or a schedule."""

    @abstractmethod
    def with_rate(self, rate: Any) -> "Stepper":
        """The same with another learning rate."""

    @abstractmethod
    def each(self, change: Callable[[Any], Any]) -> "Stepper":
        """The same with another `Optimizer` in the place of each."""

    def with_sharding(self, sharding: Any) -> Self:
        """The same, for parameters that are sharded so."""
        settings = replace(self.settings, sharding=sharding)
        return replace(self, settings=settings)  # type: ignore[type-var]

    @property
    @abstractmethod
    def needs_params(self) -> bool:
        """Whether updates depend on the parameters."""

    @abstractmethod
    def init(self, params: Any) -> Any:
        """A fresh state, sharded like the parameters."""

    @abstractmethod
    def run(self, grads: Any, state: Any, params: Any, in_place: bool) -> Any:
        """New parameters, or updates where it is not in place; and the new state."""

    @abstractmethod
    def places(self, tree: Leaves) -> Places:
        """Where each leaf is, and its state."""

    @abstractmethod
    def records(self, tree: Leaves) -> list[Storage]:
        """How each leaf is stored."""

    @abstractmethod
    def work(
        self,
        tree: Leaves,
        params: Any,
        records: Sequence[Storage],
        where: Places,
        dtypes: Sequence[tuple[Any, ...]],
        in_place: bool,
        platform: str | None = None,
    ) -> list[Work]:
        """What a step has to do for each leaf: static, without its arrays."""

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        """As in optax."""
        del extra_args
        if params is None and self.needs_params:
            raise ValueError(_NO_PARAMS)
        return self.run(updates, state, params, in_place=False)

    def step(
        self, grads: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        """See `Transformation.step`."""
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        return self.run(grads, state, params, in_place=True)


_NO_PARAMS = (
    "this optimizer needs the current parameters: call "
    "tx.update(grads, state, params) or tx.step(grads, state, params)"
)
