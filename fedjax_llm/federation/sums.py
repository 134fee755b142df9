"""Which sum a federation uses. Training never knows; only the road between the clouds differs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedjax_llm.errors import UserError
from fedjax_llm.secure.selection import Selection
from fedjax_llm.secure.selective import SelectiveSum
from fedjax_llm.secure.sums import SecureSum


@dataclass(frozen=True)
class Plain:
    """The messages are added on the devices, inside the program of the round; nothing is hidden."""

    def statement(self) -> str:
        """Who sees what."""
        return "no encryption: the server sees every cloud's update"


@dataclass(frozen=True)
class _Hidden(ABC):
    """What all sums share that hide the single message.

    Attributes:
        threshold: parties that have to take part in opening a sum, at least two; more than half of
            them if None.
        minimum_clients: fewest clouds whose sum is opened, at least two.
    """

    threshold: int | None = None
    minimum_clients: int = 2

    def open(self, clouds: Sequence[str], size: int, max_abs: int) -> SecureSum:
        """Sets keys up among `clouds` for messages of `size` integers up to `max_abs`.

        Raises:
            UserError, Refused: a threshold or minimum that does not fit the number of clouds.
        """
        return self._kind()(
            tuple(clouds),
            threshold=majority(len(clouds)) if self.threshold is None else self.threshold,
            count=size,
            max_abs=max_abs,
            summands=len(clouds),
            minimum_clients=self.minimum_clients,
        )

    @abstractmethod
    def _kind(self) -> Callable[..., SecureSum]:
        """The sum's class; imported here, so that a run loads the libraries of its own sum only."""


@dataclass(frozen=True)
class Masked(_Hidden):
    """Every two clouds share a mask that cancels in the sum; `threshold` of them mend a dropout.

    The masks need no decryption, so that this suits many small clients. The threshold counts
    clients, and more than half of them have to be asked for.
    """

    def _kind(self) -> Callable[..., SecureSum]:
        from fedjax_llm.secure.masked import MaskedSum

        return MaskedSum


@dataclass(frozen=True)
class Threshold(_Hidden):
    """The messages leave the clouds encrypted; `threshold` of them together decrypt the sum only.

    The fast one: bulk encryption on the device, OpenFHE for its keys.
    """

    def _kind(self) -> Callable[..., SecureSum]:
        from fedjax_llm.secure.threshold import ThresholdSum

        return ThresholdSum


@dataclass(frozen=True)
class Bfv(_Hidden):
    """As `Threshold`, with OpenFHE's exact scheme for all of the message."""

    def _kind(self) -> Callable[..., SecureSum]:
        from fedjax_llm.secure.library_sum import BfvSum

        return BfvSum


@dataclass(frozen=True)
class Ckks(_Hidden):
    """As `Bfv`, with OpenFHE's approximate scheme; its statement gives error and caveat."""

    def _kind(self) -> Callable[..., SecureSum]:
        from fedjax_llm.secure.library_sum import CkksSum

        return CkksSum


@dataclass(frozen=True, eq=False)
class Selective:
    """A part of each message is summed by `hidden`, the rest travels in the clear.

    A federation takes it only together with example-level noise, see `promises.check_selective`.

    Attributes:
        hidden: the sum of the selected part.
        selection: which coordinates of a message are the selected part.
    """

    hidden: Masked | Threshold | Bfv | Ckks
    selection: Selection

    def open(self, clouds: Sequence[str], size: int, max_abs: int) -> SecureSum:
        """As `hidden.open`, for the selected part of `size` integers."""
        if self.selection.mask_P.size != size:
            raise UserError(
                f"the selection is for {self.selection.mask_P.size} parameters, a message has "
                f"{size}; select among the blocks of this model, adapter and rule"
            )
        hidden = self.hidden.open(clouds, self.selection.encrypted, max_abs)
        return SelectiveSum(hidden, self.selection)


HiddenMode = Masked | Threshold | Bfv | Ckks | Selective
SumMode = Plain | HiddenMode


def opens(mode: SumMode) -> int:
    """The fewest messages whose sum is opened between the clouds; 0 on the devices."""
    if isinstance(mode, Plain):
        return 0
    return (mode.hidden if isinstance(mode, Selective) else mode).minimum_clients


def encrypted_fraction(mode: SumMode) -> float:
    """Parameters that leave a cloud encrypted or masked, over all that it sends."""
    if isinstance(mode, Selective):
        return mode.selection.fraction
    return 0.0 if isinstance(mode, Plain) else 1.0


def majority(parties: int) -> int:
    """More than half: two groups of so many share a party, which answers for one sum only.

    >>> majority(2), majority(3), majority(8)
    (2, 2, 5)
    """
    return parties // 2 + 1
