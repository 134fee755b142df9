"""The clouds that hold the key of an encrypted sum, all in one process: ceremony, rotation, use.

For simulation and tests, and for the server's part of the exchanges: what passes between the
parties is the bytes that would cross the network. Every encrypted sum uses this class alike.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from fedjax_llm.errors import UserError
from fedjax_llm.secure import decryption
from fedjax_llm.secure.cloud_party import CloudParty, file_of
from fedjax_llm.secure.cloud_state import Member
from fedjax_llm.secure.decryption import Total
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.joint_key import Group, JointKey
from fedjax_llm.secure.residues import Residues, unpack
from fedjax_llm.secure.scheme import Scheme
from fedjax_llm.secure.sums import BelowThreshold, Costs

_KEY_FILES = "*.key"


@contextmanager
def _closed_on_failure(parties: Mapping[Any, CloudParty]) -> Iterator[None]:
    """Lets go of the key files' locks if the body raises."""
    try:
        yield
    except BaseException:
        for party in parties.values():
            party.close()
        raise


def _described(group: Group, minimum_clients: int) -> str:
    return (
        f"any {group.threshold} of the clouds {', '.join(group.clouds)} for sums of "
        f"{minimum_clients} or more clients"
    )


def run_ceremony(parties: Mapping[str, CloudParty]) -> tuple[dict[str, int], dict[str, int]]:
    """Relays the steps of ``key_ceremony`` between the clouds, as the server does.

    Returns:
        Per cloud the bytes it sent and received.
    """
    up, down = dict.fromkeys(parties, 0), dict.fromkeys(parties, 0)

    def exchange(step: Callable[[CloudParty], bytes]) -> dict[str, bytes]:
        sent = {name: step(party) for name, party in parties.items()}
        for name, data in sent.items():
            up[name] += len(data)
            down[name] += sum(len(other) for sender, other in sent.items() if sender != name)
        return sent

    hellos = exchange(lambda party: party.ceremony.hello())
    seeds = exchange(lambda party: party.ceremony.seed(hellos))
    commitments = exchange(lambda party: party.ceremony.commit(seeds))
    shares = exchange(lambda party: party.ceremony.share(commitments))
    dealt = {name: party.ceremony.deal(shares) for name, party in parties.items()}
    for sender, deals in dealt.items():
        for recipient, data in deals.items():
            up[sender] += len(data)
            down[recipient] += len(data)

    def for_cloud(name: str) -> dict[str, bytes]:
        return {sender: deals[name] for sender, deals in dealt.items() if sender != name}

    confirmations = exchange(lambda party: party.ceremony.confirm(for_cloud(party.cloud)))
    for party in parties.values():
        party.finish(confirmations)
    return up, down


class KeyHolders:
    """n clouds of which any t decrypt sums together. Set it up on the main thread."""

    def __init__(
        self,
        scheme: Scheme,
        clouds: Sequence[str],
        threshold: int,
        minimum_clients: int = 2,
        folder: Path | None = None,
    ) -> None:
        """Gives every cloud an identity and runs the key ceremony between them.

        Args:
            scheme: of the ciphertexts.
            clouds: names, at least 2.
            threshold: how many decrypt together, at least 2.
            minimum_clients: fewest clients whose sum is decrypted. A sum of one is that client's
                message, so less than 2 makes sense only where that is acceptable.
            folder: where each cloud keeps its key file; made, owner-only, if it is not there. None
                keeps keys in memory.

        Raises:
            Refused: a threshold with which one cloud could decrypt.
            UserError: the folder holds keys already (``at`` opens them) or cannot be written.
        """
        group = Group(tuple(clouds), threshold)
        identities = [Identity.generate(name) for name in group.clouds]
        roster = Roster(identity.public for identity in identities)
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as err:
                raise UserError(f"cannot make the key folder {folder} ({err.strerror})") from err
        parties: dict[str, CloudParty] = {}
        with _closed_on_failure(parties):
            for identity in identities:
                member = Member(identity, roster, group, minimum_clients)
                parties[identity.name] = CloudParty(scheme, member, folder)
            ceremony_bytes = run_ceremony(parties)
            self._set_up(scheme, parties, *ceremony_bytes)

    @classmethod
    def open(cls, scheme: Scheme, folder: Path) -> Self:
        """The clouds from their key files, bound to what they had signed and answered.

        Raises:
            UserError: naming the file that is missing, damaged, readable by others, or of another
                group, ceremony or parameters; and the cure.
        """
        found = sorted(folder.glob(_KEY_FILES))
        if not found:
            raise UserError(f"{folder} holds no key files; make keys there first")
        loaded: dict[Path, CloudParty] = {}
        with _closed_on_failure(loaded):
            for path in found:
                loaded[path] = CloudParty.load(path, scheme)
            return cls._of_files(scheme, folder, loaded)

    @classmethod
    def at(
        cls,
        scheme: Scheme,
        clouds: Sequence[str],
        threshold: int,
        minimum_clients: int = 2,
        folder: Path | None = None,
    ) -> Self:
        """The clouds whose keys are in the folder, or, where there are none, with new keys.

        | the folder | result |
        |---|---|
        | None, absent, or without a key file | as the constructor |
        | keys of exactly these arguments, the clouds in this order | as ``open`` |
        | keys of other clouds, another threshold, minimum or scheme | ``UserError`` |
        | keys of some of the clouds only, damaged, or in use | ``UserError`` |

        Raises:
            Refused: a threshold with which one cloud could decrypt.
            UserError: as in the table, or the folder cannot be written.
        """
        if folder is None or not any(folder.glob(_KEY_FILES)):
            return cls(scheme, clouds, threshold, minimum_clients, folder)
        asked = Group(tuple(clouds), threshold)
        found = cls.open(scheme, folder)
        if (found.group, found.minimum_clients) != (asked, minimum_clients):
            found.close()
            raise UserError(
                f"{folder} holds keys of {_described(found.group, found.minimum_clients)}, this "
                f"run is of {_described(asked, minimum_clients)}; use the run file that they were "
                "made with, or make new keys in an empty folder"
            )
        return found

    @classmethod
    def _of_files(cls, scheme: Scheme, folder: Path, loaded: dict[Path, CloudParty]) -> Self:
        first_path, first = next(iter(loaded.items()))
        for path, party in loaded.items():
            same = (
                party.key.epoch == first.key.epoch
                and party.member.roster == first.member.roster
                and party.member.minimum_clients == first.member.minimum_clients
                and path == file_of(folder, party.cloud)
            )
            if not same:
                raise UserError(
                    f"{path} is of another group or ceremony than {first_path}, or renamed; "
                    "restore the files of one ceremony, or make new keys in an empty folder"
                )
        by_name = {party.cloud: party for party in loaded.values()}
        clouds = first.member.group.clouds
        missing = [name for name in clouds if name not in by_name]
        if missing:
            raise UserError(
                f"{folder} has no key file of {', '.join(missing)}; restore it, or make new keys "
                "in an empty folder"
            )
        made = cls.__new__(cls)
        made._set_up(scheme, {name: by_name[name] for name in clouds})
        return made

    def _set_up(
        self,
        scheme: Scheme,
        parties: dict[str, CloudParty],
        up: dict[str, int] | None = None,
        down: dict[str, int] | None = None,
    ) -> None:
        self._scheme, self.parties = scheme, parties
        first = next(iter(parties.values()))
        self.group, self.roster = first.member.group, first.member.roster
        self.clouds, self.threshold = self.group.clouds, self.group.threshold
        self.minimum_clients = first.member.minimum_clients
        # Clients check the key against the confirmations: ``joint_key.check_confirmations``.
        self.key: JointKey = first.key
        self.confirmations = first.confirmations
        self.ceremony_bytes_up = up or dict.fromkeys(self.clouds, 0)
        self.ceremony_bytes_down = down or dict.fromkeys(self.clouds, 0)

    def rotate(self) -> None:
        """A new ceremony among the same clouds: a new key, seed and epoch; old shares are gone.

        What was encrypted under the key of before can no longer be decrypted. Round numbers go on.
        If it fails half-way, clouds may be of two epochs and refuse to decrypt: call it again.
        """
        for party in self.parties.values():
            party.rotate()
        self._set_up(self._scheme, self.parties, *run_ceremony(self.parties))

    def close(self) -> None:
        """Forgets all keys and lets go of the key files."""
        for party in self.parties.values():
            party.close()

    def statement(self) -> str:
        """Who can decrypt what; the tests hold the code to every clause."""
        return (
            f"any {self.threshold} of the {len(self.clouds)} clouds ({', '.join(self.clouds)}) can "
            "together decrypt, fewer cannot; they answer only for sums that the server declares "
            f"to have {self.minimum_clients} or more clients, one sum per round; the server holds "
            "no key share; simulated: one process plays all parties"
        )

    def check_alive(self, alive: Sequence[str]) -> None:
        """Refuses, before anybody has worked for it, a sum that could not be decrypted."""
        missing = [name for name in self.clouds if name not in alive]
        living = len(self.clouds) - len(missing)
        if living < self.threshold:
            raise BelowThreshold(
                f"decryption needs {self.threshold} of {len(self.clouds)} clouds, {living} alive, "
                f"missing {', '.join(missing)}; start one of them again"
            )

    def decrypt(
        self,
        round_number: int,
        participants: Sequence[str],
        c0_packed: bytes,
        c1_packed: bytes,
        ciphertexts: int,
        alive: Sequence[str],
        costs: Costs,
    ) -> dict[str, Residues]:
        """Partial decryptions by the first t clouds that are alive and answer.

        Their sum with c_0 is the encoded total plus noise. Time goes to ``costs.seconds
        ["decrypt"]``, bytes to the clouds' entries; clouds that were not asked have zeros.

        Args:
            round_number: above that of every total decrypted before.
            participants: whose ciphertexts are in the sum.
            c0_packed: packed c_0 of all ciphertexts of the sum; only its digest is used.
            c1_packed: packed c_1 of all ciphertexts.
            ciphertexts: how many.
            alive: the clouds that can be asked.
            costs: of the round.

        Returns:
            cloud -> [ciphertexts, L, N].

        Raises:
            BelowThreshold: too few clouds are alive or answer.
            BadMessage: naming the cloud whose answer is damaged or forged.
            Refused: a cloud will not decrypt this.
        """
        self.check_alive(alive)
        for name in self.clouds:
            costs.bytes_up.setdefault(name, 0)
            costs.bytes_down.setdefault(name, 0)
        with costs.timed("decrypt"):
            total = Total.of(self.key.epoch, round_number, participants, c0_packed, c1_packed)
            living = [name for name in self.clouds if name in alive]
            with ThreadPoolExecutor(min(self.threshold, os.cpu_count() or 1)) as pool:
                bodies = decryption.decrypt(
                    total,
                    c1_packed,
                    self.parties,
                    self.roster,
                    self.threshold,
                    living,
                    costs,
                    pool.map,
                )
            moduli, size = self._scheme.moduli, self._scheme.ring_dimension
            return {
                cloud: unpack(body, ciphertexts, moduli, size, cloud)
                for cloud, body in bodies.items()
            }
