"""Key files: owner-only, whole or refused, and a cloud that restarts is bound as before."""

import io
import os
import stat
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import byte_lists, cloud_party, cloud_state, key_file
from fedjax_llm.secure.bfv import open_bfv
from fedjax_llm.secure.cloud_party import CloudParty, file_of
from fedjax_llm.secure.cloud_state import Journal
from fedjax_llm.secure.decryption import (
    Statement,
    Total,
    open_agreement,
    open_answers,
    request_bytes,
)
from fedjax_llm.secure.frames import frame
from fedjax_llm.secure.identity import Identity
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import pack
from fedjax_llm.secure.sums import Costs

CLOUDS = ("east", "west", "a/b ..")


@pytest.fixture(scope="session")
def scheme():
    return open_bfv(choose(100, 4, 3, count=100))


@pytest.fixture(scope="session")
def c1(scheme):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, q, scheme.ring_dimension, np.uint64) for q in scheme.moduli]
    return pack(np.stack(rows)[None], scheme.moduli)


@pytest.fixture
def holders(scheme, tmp_path):
    made = KeyHolders(scheme, CLOUDS, 2, folder=tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def cloud_file(scheme, tmp_path_factory):
    """The bytes of one cloud's key file."""
    folder = tmp_path_factory.mktemp("keys")
    KeyHolders(scheme, CLOUDS, 2, folder=folder).close()
    return file_of(folder, "east").read_bytes()


def statement_of(holders, round_number, c1, clouds=("east", "west"), clients=("x", "y")):
    return Statement(Total.of(holders.key.epoch, round_number, clients, b"c_0", c1), clouds)


def request_of(holders, statement, c1):
    signatures = {}
    for name in statement.clouds:
        agreed = holders.parties[name].agree(statement.to_bytes())
        signatures[name] = open_agreement(statement, name, agreed, holders.roster)
    return request_bytes(statement, signatures, c1)


class TestFile:
    def test_comes_back_and_is_owner_only_whatever_the_umask(self, tmp_path):
        path = tmp_path / "k"
        before = os.umask(0)
        try:
            key_file.write(path, "kind", [b"one", b""])
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert key_file.read(path, "kind", 2) == [b"one", b""]
        assert os.listdir(tmp_path) == ["k"]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
    def test_others_may_not_use_it(self, tmp_path, mode):
        path = tmp_path / "k"
        key_file.write(path, "kind", [b"one"])
        path.chmod(mode)
        with pytest.raises(UserError, match=rf"mode {mode:04o}.*chmod 600 {path}"):
            key_file.read(path, "kind", 1)
        key_file.write(path, "kind", [b"two"])  # a new file takes its place, not its mode
        assert key_file.read(path, "kind", 1) == [b"two"]

    def test_of_another_user_or_no_file_is_refused(self, tmp_path, monkeypatch):
        path = tmp_path / "k"
        key_file.write(path, "kind", [b"one"])
        (tmp_path / "link").symlink_to(path)
        os.mkfifo(tmp_path / "pipe", 0o600)
        (tmp_path / "folder").mkdir()
        for name in ("link", "pipe", "folder", "absent"):
            with pytest.raises(UserError, match=name):
                key_file.read(tmp_path / name, "kind", 1)
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        with pytest.raises(UserError, match=f"belongs to user {owner}"):
            key_file.read(path, "kind", 1)

    @settings(max_examples=80, deadline=None)
    @given(st.data())
    def test_any_change_is_found(self, tmp_path_factory, data):
        path = tmp_path_factory.getbasetemp() / "changed"
        fields = data.draw(st.lists(st.binary(max_size=40), max_size=4))
        key_file.write(path, "kind", fields)
        whole = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            bit = data.draw(st.integers(0, 8 * len(whole) - 1))
            whole[bit // 8] ^= 1 << bit % 8
        else:
            cut = data.draw(st.integers(-len(whole), 9).filter(bool))
            whole = whole[:cut] if cut < 0 else whole + bytes(cut)
        path.write_bytes(whole)
        with pytest.raises(UserError, match=r"changed is damaged or foreign.*; restore it"):
            key_file.read(path, "kind", len(fields))

    def test_of_another_kind_or_version_is_refused(self, tmp_path):
        path = tmp_path / "k"
        key_file.write(path, "kind", [b"one"])
        with pytest.raises(UserError, match="foreign"):
            key_file.read(path, "other", 1)
        with pytest.raises(UserError, match="foreign"):
            key_file.read(path, "kind", 2)
        path.write_bytes(frame("kind", b"\x09\0", b"one"))
        with pytest.raises(UserError, match="version 9, this program reads 1"):
            key_file.read(path, "kind", 1)

    @pytest.mark.parametrize("size", [0, 1, 3, 3000])
    def test_a_version_has_two_bytes(self, tmp_path, size):
        """Thousands would be a number that Python refuses to print."""
        path = tmp_path / "k"
        key_file.write(path, "kind", [b"one"])
        path.write_bytes(frame("kind", b"\xff" * size, b"one"))
        with pytest.raises(UserError, match=rf"k is damaged.*a version of {size} bytes.*; restore"):
            key_file.read(path, "kind", 1)

    @pytest.mark.parametrize("step", ["fstat", "read"])
    def test_a_disk_that_fails_is_named(self, tmp_path, monkeypatch, step):
        path = tmp_path / "k"
        key_file.write(path, "kind", [b"one"])

        def broken(*_, **__):
            raise OSError(5, "Input/output error")

        class Broken(io.BytesIO):
            read = broken

        with monkeypatch.context() as patched:
            if step == "fstat":
                patched.setattr(os, "fstat", broken)
            else:
                patched.setattr(key_file, "open", lambda *_, **__: Broken(), raising=False)
            with pytest.raises(UserError) as caught:
                key_file.read(path, "kind", 1)
        assert f"{path} (Input/output error); mend its disk, or restore it" in str(caught.value)

    def test_a_write_that_fails_leaves_the_file_of_before(self, tmp_path, monkeypatch):
        path = tmp_path / "k"
        key_file.write(path, "kind", [b"one"])
        for step in ("fsync", "replace"):
            with monkeypatch.context() as patched:

                def full(*_):
                    raise OSError(28, "No space left on device")

                patched.setattr(os, step, full)
                with pytest.raises(UserError, match="k \\(No space left"):
                    key_file.write(path, "kind", [b"two"])
            assert key_file.read(path, "kind", 1) == [b"one"]
            assert os.listdir(tmp_path) == ["k"]
        with pytest.raises(UserError, match="cannot write"):
            key_file.write(tmp_path / "no" / "k", "kind", [])

    def test_one_holder_at_a_time(self, tmp_path):
        first = key_file.Lock(tmp_path / "k")
        with pytest.raises(UserError, match="k is in use"):
            key_file.Lock(tmp_path / "k")
        first.close()
        first.close()
        second = key_file.Lock(tmp_path / "k")
        del second
        key_file.Lock(tmp_path / "k").close()

    def test_a_killed_write_leaves_nothing_for_the_next_holder(self, tmp_path):
        path = tmp_path / "k[1]*.key"
        lock = key_file.Lock(path)
        child = forked()
        if child == 0:
            os.replace = lambda *_: os._exit(9)
            key_file.write(path, "kind", [b"old share"])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        (left,) = (name for name in os.listdir(tmp_path) if name.endswith(".part"))
        others = {  # of files whose names begin or end alike, which are someone else's to remove
            f".k1.key.{'a' * 16}.part",
            f".k[1]*.key.{'a' * 16}.key.{'a' * 16}.part",
            f".k[1]*.key.{'a' * 15}.part",
            f".k[1]*.key.{'a' * 16}.part.key",
        }
        for name in others:
            (tmp_path / name).touch()
        with pytest.raises(UserError, match="in use"):
            key_file.Lock(path)
        assert (tmp_path / left).exists()  # it may be the holder's, about to be renamed
        lock.close()
        key_file.Lock(path).close()
        assert set(os.listdir(tmp_path)) == others | {f".{path.name}.lock"}

    def test_a_rest_that_cannot_be_removed_is_named(self, tmp_path):
        rest = tmp_path / f".k.{'0' * 16}.part"
        rest.mkdir()
        for _ in range(2):  # the lock is let go of
            with pytest.raises(UserError, match=rf"cannot remove {rest}, .*; remove it, it holds"):
                key_file.Lock(tmp_path / "k")


def forked():
    """``os.fork``, whose warning about threads does not matter to a child that soon ends.

    Python's own and JAX's, which is there once another test has computed something.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork")
        return os.fork()


class TestCloud:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_change_is_found(self, scheme, cloud_file, tmp_path_factory, data):
        """A bit in any region, every field's lengths among them, or a cut anywhere."""
        path = tmp_path_factory.getbasetemp() / "east.key"
        small = st.integers(0, 2000) | st.integers(len(cloud_file) - 1000, len(cloud_file) - 1)
        at = data.draw(small | st.integers(0, len(cloud_file) - 1))
        if data.draw(st.booleans()):
            changed = bytearray(cloud_file)
            changed[at] ^= data.draw(st.integers(1, 255))
        else:
            changed = cloud_file[:at]
        path.write_bytes(changed)
        path.chmod(0o600)
        with pytest.raises(UserError, match=r"east\.key.*; restore it"):
            CloudParty.load(path, scheme)
        path.write_bytes(cloud_file)
        CloudParty.load(path, scheme).close()  # a failed load has let go of the file

    @pytest.mark.parametrize("field", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11])
    def test_fields_that_do_not_belong_together_are_found(
        self, scheme, cloud_file, tmp_path, field
    ):
        """Even with a correct digest: fields of two clouds, or cut ones, are no cloud."""
        path = tmp_path / "east.key"
        path.write_bytes(cloud_file)
        path.chmod(0o600)
        fields = key_file.read(path, "cloud key file", 12)
        fields[field] = fields[field][:-1] + bytes([fields[field][-1] ^ 0x80]) + b"\0"
        key_file.write(path, "cloud key file", fields)
        with pytest.raises(UserError, match=r"east\.key"):
            CloudParty.load(path, scheme)

    @pytest.mark.parametrize(
        ("field", "content"),
        [
            (3, bytes(8)),
            (3, b""),
            (3, b"\2"),
            (3, b"\2" + bytes(4999)),
            (3, b"\xff" * 5000),
            (11, b""),
            (11, byte_lists.join([b"one"])),
            (11, byte_lists.join([b"one"] * 4)),
        ],
    )
    def test_fields_of_another_size_are_found(self, scheme, cloud_file, tmp_path, field, content):
        path = tmp_path / "east.key"
        path.write_bytes(cloud_file)
        path.chmod(0o600)
        fields = key_file.read(path, "cloud key file", 12)
        fields[field] = content
        key_file.write(path, "cloud key file", fields)
        with pytest.raises(UserError, match=r"east\.key is damaged or foreign.*; restore it"):
            CloudParty.load(path, scheme)

    def test_one_confirmation_too_many_is_found(self, scheme, cloud_file, tmp_path):
        path = tmp_path / "east.key"
        path.write_bytes(cloud_file)
        path.chmod(0o600)
        fields = key_file.read(path, "cloud key file", 12)
        fields[11] += byte_lists.join([b"one"])
        key_file.write(path, "cloud key file", fields)
        with pytest.raises(UserError, match="4 confirmations of 3 clouds"):
            CloudParty.load(path, scheme)

    def test_other_parameters_are_refused(self, cloud_file, tmp_path):
        path = tmp_path / "east.key"
        path.write_bytes(cloud_file)
        path.chmod(0o600)
        with pytest.raises(UserError, match="made for other parameters"):
            CloudParty.load(path, open_bfv(choose(2**20, 4, 3, count=100)))

    def test_a_restarted_cloud_goes_on(self, scheme, holders, tmp_path, c1):
        holders.decrypt(3, ["x", "y"], b"c_0", c1, 1, CLOUDS, Costs())
        shares = {name: holders.parties[name]._held.share_1LN for name in CLOUDS}
        epoch, seed = holders.key.epoch, holders.key.seed
        with pytest.raises(UserError, match="in use by another"):
            KeyHolders.open(scheme, tmp_path)
        holders.close()
        with pytest.raises(Refused, match="is closed"):
            holders.parties["east"].agree(statement_of_epoch(epoch, 4, c1).to_bytes())
        again = KeyHolders.open(scheme, tmp_path)
        assert again.clouds == CLOUDS and (again.key.epoch, again.key.seed) == (epoch, seed)
        assert again.threshold == 2 and again.minimum_clients == 2
        for name in CLOUDS:
            assert np.array_equal(again.parties[name]._held.share_1LN, shares[name])
        again.decrypt(4, ["x", "y"], b"c_0", c1, 1, ["west", "a/b .."], Costs())
        again.close()

    def test_a_restarted_cloud_answers_for_no_second_total(self, scheme, holders, tmp_path, c1):
        first = statement_of(holders, 5, c1)
        request = request_of(holders, first, c1)
        answer = holders.parties["east"].partial_decryption(request)
        other = statement_of(holders, 5, c1, clients=("x", "z"))
        epoch = holders.key.epoch
        holders.close()
        again = KeyHolders.open(scheme, tmp_path)
        for later in (other, statement_of_epoch(epoch, 4, c1)):
            with pytest.raises(Refused, match="bound to one sum of round 5"):
                again.parties["east"].agree(later.to_bytes())
        # West had only signed, and is bound as well.
        with pytest.raises(Refused, match="bound to one sum of round 5"):
            again.parties["west"].agree(other.to_bytes())
        # The same total may be finished: two fresh answers are left, of three.
        fresh = again.parties["east"].partial_decryption(request)
        assert fresh != answer
        for _ in range(2):
            assert again.parties["east"].partial_decryption(request) == fresh
        last = statement_of(again, 5, c1, ("east", "a/b .."))
        assert again.parties["east"].partial_decryption(request_of(again, last, c1))
        with pytest.raises(Refused, match="has answered 3 times for round 5"):
            again.parties["east"].partial_decryption(request)
        again.close()

    def test_nothing_leaves_before_it_is_on_the_disk(
        self, scheme, holders, tmp_path, c1, monkeypatch
    ):
        party, path = holders.parties["east"], file_of(tmp_path, "east")

        def full(*_):
            raise UserError("disk full")

        statement = statement_of(holders, 7, c1)
        before = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(cloud_party.cloud_state, "save", full)
            with pytest.raises(UserError, match="disk full"):
                party.agree(statement.to_bytes())
        assert path.read_bytes() == before and party._journal.round_number == -1
        request = request_of(holders, statement, c1)
        signed = cloud_state.load(path, scheme)[2]
        assert (signed.round_number, signed.answers) == (7, 0)
        with monkeypatch.context() as patched:
            patched.setattr(cloud_party.cloud_state, "save", full)
            with pytest.raises(UserError, match="disk full"):
                party.partial_decryption(request)
        assert party.partial_decryption(request)
        answered = cloud_state.load(path, scheme)[2]
        assert (answered.round_number, answered.answers) == (7, 1)
        assert answered.total == statement.total.digest()

    def test_a_rotation_replaces_the_files(self, scheme, holders, tmp_path, c1):
        holders.decrypt(8, ["x", "y"], b"c_0", c1, 1, CLOUDS, Costs())
        old = holders.key.epoch
        holders.rotate()
        new = holders.key.epoch
        holders.close()
        again = KeyHolders.open(scheme, tmp_path)
        assert new == again.key.epoch != old
        with pytest.raises(Refused, match="bound to one sum of round 8"):
            again.decrypt(8, ["x", "y"], b"c_0", c1, 1, CLOUDS, Costs())
        again.close()

    def test_a_closed_party_does_not_touch_the_file(self, scheme, holders, tmp_path, c1):
        """It is another object's by then: here the one that has answered for round 6."""
        request = request_of(holders, statement_of(holders, 5, c1), c1)
        party = holders.parties["east"]
        party.rotate()
        later = statement_of(holders, 7, c1)
        holders.close()
        again = KeyHolders.open(scheme, tmp_path)
        again.decrypt(6, ["x", "y"], b"c_0", c1, 1, CLOUDS, Costs())
        before = {path: path.read_bytes() for path in tmp_path.glob("*.key")}
        for call in (
            holders.rotate,
            party.rotate,
            lambda: party.finish({}),
            lambda: party.agree(later.to_bytes()),
            lambda: party.partial_decryption(request),
            lambda: party.key,
            lambda: party.ceremony,
        ):
            with pytest.raises(Refused, match=r"cloud 'east' is closed; open its key file again"):
                call()
        assert {path: path.read_bytes() for path in tmp_path.glob("*.key")} == before
        again.close()

    def test_a_party_that_cannot_be_set_up_lets_go_of_its_file(self, scheme, holders, tmp_path):
        folder = tmp_path / "other"
        folder.mkdir()
        member = replace(holders.parties["east"].member, identity=Identity.generate("east"))
        with pytest.raises(Refused, match="other keys in its name") as caught:
            CloudParty(scheme, member, folder)
        assert caught.tb  # which holds on to the object
        key_file.Lock(file_of(folder, "east")).close()

    def test_a_forked_child_does_not_rewrite_the_journal(self, scheme, holders, tmp_path, c1):
        """It has the parent's shares and, by inheritance, its lock."""
        party = holders.parties["east"]
        mine, childs = (
            statement_of(holders, 5, c1, clients=clients) for clients in (("x", "y"), ("x", "z"))
        )
        party.agree(mine.to_bytes())
        written = file_of(tmp_path, "east").read_bytes()
        child = forked()
        if child == 0:
            party._journal = Journal()  # as it was, had the fork been a moment earlier
            try:
                party.agree(childs.to_bytes())
            except Refused as err:
                os._exit(3 if "before this process was forked" in str(err) else 4)
            except BaseException:
                os._exit(5)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert file_of(tmp_path, "east").read_bytes() == written

    def test_a_forked_child_is_refused_everything(self, holders, c1, monkeypatch):
        party = holders.parties["east"]
        request = request_of(holders, statement_of(holders, 5, c1), c1)
        answer = party.partial_decryption(request)
        party.rotate()
        with monkeypatch.context() as patched:
            patched.setattr("os.getpid", lambda: -1)
            for call in (
                party.rotate,
                lambda: party.finish({}),
                lambda: party.agree(statement_of(holders, 6, c1).to_bytes()),
                lambda: party.partial_decryption(request),  # the same bytes again
            ):
                with pytest.raises(Refused, match="'east' was set up before this process was fork"):
                    call()
        assert party.partial_decryption(request) == answer

    def test_a_folder_is_of_one_ceremony(self, scheme, holders, tmp_path):
        with pytest.raises(UserError, match="in use by another"):
            KeyHolders(scheme, CLOUDS, 2, folder=tmp_path)
        holders.close()
        with pytest.raises(UserError, match="holds keys already"):
            KeyHolders(scheme, CLOUDS, 2, folder=tmp_path)
        east = file_of(tmp_path, "east")
        mixed = east.read_bytes()
        aside = tmp_path / "aside"
        aside.mkdir()
        KeyHolders(scheme, CLOUDS, 2, folder=aside).close()
        east.write_bytes(file_of(aside, "east").read_bytes())
        with pytest.raises(UserError, match="another group or ceremony"):
            KeyHolders.open(scheme, tmp_path)
        east.unlink()
        with pytest.raises(UserError, match="no key file of east"):
            KeyHolders.open(scheme, tmp_path)
        east.write_bytes(mixed)
        with pytest.raises(UserError, match="chmod 600"):
            KeyHolders.open(scheme, tmp_path)
        east.chmod(0o600)
        KeyHolders.open(scheme, tmp_path).close()
        east.rename(tmp_path / "north.key")
        with pytest.raises(UserError, match="renamed"):
            KeyHolders.open(scheme, tmp_path)
        with pytest.raises(UserError, match="holds no key files"):
            KeyHolders.open(scheme, tmp_path / "absent")

    def test_at_makes_keys_once(self, scheme, tmp_path, c1):
        for folder in (None, tmp_path / "new" / "keys"):
            made = KeyHolders.at(scheme, CLOUDS, 2, 3, folder)
            epoch = made.key.epoch
            assert (made.clouds, made.threshold, made.minimum_clients) == (CLOUDS, 2, 3)
            assert min(made.ceremony_bytes_up.values()) > 0
            made.decrypt(4, ["x", "y", "z"], b"c_0", c1, 1, CLOUDS, Costs())
            made.close()
        again = KeyHolders.at(scheme, CLOUDS, 2, 3, folder)
        assert again.key.epoch == epoch and not any(again.ceremony_bytes_up.values())
        with pytest.raises(Refused, match="bound to one sum of round 4"):
            again.decrypt(4, ["x", "y", "w"], b"c_0", c1, 1, CLOUDS, Costs())
        again.close()

    def test_at_opens_only_what_was_asked_for(self, scheme, holders, tmp_path):
        with pytest.raises(UserError, match="in use by another"):
            KeyHolders.at(scheme, CLOUDS, 2, 2, tmp_path)
        holders.close()
        before = {path: path.read_bytes() for path in tmp_path.glob("*.key")}
        others = [
            (CLOUDS, 3, 2, "any 3 of the clouds east, west, a/b .. for sums of 2 or"),
            (CLOUDS, 2, 3, "any 2 of the clouds east, west, a/b .. for sums of 3 or"),
            (CLOUDS[::-1], 2, 2, "any 2 of the clouds a/b .., west, east for"),
            (CLOUDS[:2], 2, 2, "any 2 of the clouds east, west for"),
            (("north", "south"), 2, 2, "any 2 of the clouds north, south for"),
        ]
        for clouds, threshold, minimum, described in others:
            with pytest.raises(
                UserError,
                match=rf"{tmp_path} holds keys of any 2 of the clouds east, west, a/b \.\. for sums"
                rf" of 2 or more clients, this run is of {described}.*; use the run file",
            ) as caught:
                KeyHolders.at(scheme, clouds, threshold, minimum, tmp_path)
            assert caught.tb  # which holds on to the objects, but not to the files
            key_file.Lock(file_of(tmp_path, "east")).close()
        with pytest.raises(UserError, match="made for other parameters"):
            KeyHolders.at(open_bfv(choose(2**20, 4, 3, count=100)), CLOUDS, 2, 2, tmp_path)
        with pytest.raises(Refused, match="one cloud alone could decrypt"):
            KeyHolders.at(scheme, CLOUDS, 1, 2, tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.glob("*.key")} == before
        file_of(tmp_path, "west").unlink()
        with pytest.raises(UserError, match="no key file of west"):
            KeyHolders.at(scheme, CLOUDS, 2, 2, tmp_path)
        file_of(tmp_path, "west").write_bytes(before[file_of(tmp_path, "west")])
        file_of(tmp_path, "west").chmod(0o600)
        KeyHolders.at(scheme, list(CLOUDS), 2, folder=tmp_path).close()  # nothing holds a lock
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot make the key folder"):
            KeyHolders.at(scheme, CLOUDS, 2, 2, tmp_path / "file")

    def test_answers_of_reopened_clouds_open(self, scheme, holders, tmp_path, c1):
        statement = statement_of(holders, 9, c1)
        request = request_of(holders, statement, c1)
        roster = holders.roster
        holders.close()
        again = KeyHolders.open(scheme, tmp_path)
        answers = {n: again.parties[n].partial_decryption(request) for n in statement.clouds}
        assert set(open_answers(statement, answers, roster)) == {"east", "west"}
        again.close()


def statement_of_epoch(epoch, round_number, c1):
    return Statement(Total.of(epoch, round_number, ("x", "y"), b"c_0", c1), ("east", "west"))
