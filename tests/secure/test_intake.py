"""All of an upload or nothing of it: in memory, on disk, and whatever the sender does."""

import errno
import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import intake as module
from fedjax_llm.secure.channels import (
    ClientChannel,
    ServerChannels,
    SimulatedChannels,
    channel_key,
    new_run,
)
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.intake import Intake
from fedjax_llm.secure.sums import BadMessage, Costs
from fedjax_llm.secure.wire import Header, UploadWriter

SIZES = (1000, 0, 700, 1000, 1)
CHANNELS = SimulatedChannels()


def header_for(client):
    return Header("plain", bytes(16), bytes(16), 5, 9, client)


def payloads(seed):
    return [bytes((seed + i + at) % 251 for at in range(size)) for i, size in enumerate(SIZES)]


def upload(client="bob", seed=0, contents=None):
    contents = payloads(seed) if contents is None else contents
    writer = UploadWriter(header_for(client), CHANNELS.key(client), len(contents))
    return [writer.write(payload) for payload in contents]


def intake(**options):
    return Intake(header_for, CHANNELS, SIZES, options.pop("summands", 3), **options)


def accept(server, client="bob"):
    with server.adding(client, upload(client)):
        pass


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize("budget", [0, 1, 1000, 1001, 2000, 10**6])
def test_payloads_come_back_as_often_as_asked_wherever_they_waited(budget, tmp_path):
    before = open_files()
    with intake(memory_budget=budget, folder=tmp_path).receive("bob", upload()) as received:
        for _ in range(2):
            assert [bytes(p) for p in received.payloads()] == payloads(0)
        both = zip(received.payloads(), received.payloads(), strict=True)
        assert [bytes(p) + bytes(q) for p, q in both] == [p + p for p in payloads(0)]
        assert list(tmp_path.iterdir()) == []  # no name leads to what waits on the disk
        assert (open_files() > before) == (budget < sum(SIZES))
    assert open_files() == before
    assert list(received.payloads()) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_sequence_of_chunks_than_the_written_one_passes(data):
    """Missing, repeated, reordered, of another upload or client, in any mixture."""
    good = upload()
    pool = [*good, *upload(), *upload("eve"), b"", b"garbage"]
    chosen = data.draw(st.lists(st.sampled_from(range(len(pool))), max_size=7))
    if chosen == list(range(len(SIZES))):
        return
    server = intake()
    # The second upload's own order is an upload of bob's as well.
    if chosen == list(range(len(SIZES), 2 * len(SIZES))):
        return
    with pytest.raises(BadMessage, match="'bob' refused"):
        server.receive("bob", [pool[i] for i in chosen])
    assert server.participants == ()
    server.receive("bob", good).close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c[:-1], "it ended after 4 of 5 chunks"),
        (lambda c: [], "it ended after 0 of 5 chunks"),
        (lambda c: [*c, c[-1]], "it goes on after its 5 chunks"),
        (lambda c: [*c, b""], "it goes on after its 5 chunks"),
        (lambda c: [c[0], c[0], *c[2:]], "chunk 0 came where 1"),
        (lambda c: [c[0], *c[2:]], "chunk 2 came where 1"),
        (lambda c: [c[0], c[1], c[3], c[2], c[4]], "chunk 3 came where 2"),
        (lambda c: [c[0], upload()[1], *c[2:]], "another upload"),
        (lambda c: upload("eve"), "written by 'eve'"),
        (lambda c: b"".join(c), "it is no chunk"),
        (lambda c: [b"".join(c)], "truncated or too long"),
    ],
)
def test_what_is_wrong_is_named_and_the_client_is_heard_again(change, reason):
    server = intake()
    with pytest.raises(BadMessage, match=reason) as caught:
        server.receive("bob", change(upload()))
    assert caught.value.sender == "bob"
    with server.receive("bob", upload(seed=3)) as received:
        assert [bytes(p) for p in received.payloads()] == payloads(3)


@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("error", [ConnectionError("gone"), KeyboardInterrupt(), MemoryError()])
def test_an_upload_that_breaks_off_leaves_nothing_behind(budget, error, tmp_path):
    def breaks_off():
        yield from upload()[:3]
        raise error

    server, before = intake(memory_budget=budget, folder=tmp_path), open_files()
    with pytest.raises(type(error)) as caught:
        server.receive("bob", breaks_off())
    assert caught.value is error
    assert (open_files(), server.participants, list(tmp_path.iterdir())) == (before, (), [])
    server.receive("bob", upload()).close()


def test_content_that_the_mode_refuses_stops_the_upload_at_that_chunk():
    taken = []

    def check(number, payload):
        taken.append((number, bytes(payload)))
        if number == 2:
            raise BadMessage("bob", "no residues")

    chunks = iter(upload())
    with pytest.raises(BadMessage, match="no residues"):
        intake().receive("bob", chunks, check)
    assert taken == list(enumerate(payloads(0)))[:3]
    assert len(list(chunks)) == 2


def test_once_and_no_more_than_planned_and_not_late():
    server = intake(summands=2)
    for name in ("x", "a"):
        accept(server, name)
        with pytest.raises(BadMessage, match=f"'{name}' refused: a second upload"):
            server.receive(name, upload(name))
    assert server.participants == ("a", "x")
    with pytest.raises(Refused, match="client 'bob' is one too many: the sum is exact up to 2"):
        server.receive("bob", upload())
    late = intake()
    late.close()
    with pytest.raises(Refused, match="client 'bob' is too late: the total of 0 clients"):
        late.receive("bob", upload())
    with pytest.raises(Refused, match="too late"):
        accept(late)


def test_an_upload_that_sends_another_one_meanwhile_is_noticed():
    server = intake()

    def twice():
        yield from upload()
        accept(server)

    with pytest.raises(BadMessage, match="second upload"):
        server.receive("bob", twice())


BREAKS = "round 5 broke off while adding 'bob'; start it anew"


@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), BadMessage("bob", "x")])
def test_a_round_whose_adding_breaks_off_refuses_everything(budget, error, tmp_path):
    server, before = intake(memory_budget=budget, folder=tmp_path), open_files()
    accept(server, "ann")
    with pytest.raises(type(error)) as caught, server.adding("bob", upload()):
        raise error
    assert caught.value is error
    assert (server.participants, open_files()) == (("ann",), before)
    for client in ("bob", "cat", "ann"):
        for call in (server.receive, lambda *sent: server.adding(*sent).__enter__()):
            with pytest.raises(Refused, match=BREAKS):
                call(client, upload(client))
    with pytest.raises(Refused, match=BREAKS):
        server.require_whole()


def test_an_interruption_just_before_the_end_of_adding_breaks_the_round():
    """The mark is set beforehand: no error has to be seen for it."""

    class Interrupted(set):
        def add(self, client):
            raise KeyboardInterrupt

    server = intake()
    server._accepted = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        accept(server)
    with pytest.raises(Refused, match=BREAKS):
        server.require_whole()


def test_an_upload_meanwhile_which_another_one_breaks_off_does_not_mend_the_round():
    server = intake()

    def meanwhile():
        yield from upload("ann")
        with pytest.raises(OSError, match="disk"), server.adding("bob", upload()):
            raise OSError("disk")

    with pytest.raises(Refused, match=BREAKS):
        server.adding("ann", meanwhile()).__enter__()
    with pytest.raises(Refused, match=BREAKS):
        server.require_whole()


def test_an_upload_that_is_refused_leaves_the_round_whole():
    server = intake()
    with pytest.raises(BadMessage, match="ended after"):
        server.adding("bob", upload()[:-1]).__enter__()
    server.require_whole()
    accept(server)
    server.require_whole()
    assert server.participants == ("bob",)


def test_no_room_on_the_disk_is_a_user_s_error(tmp_path, monkeypatch):
    class Full:
        def __init__(self, **_):
            self.closed = False

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            self.closed = True

    made = []
    monkeypatch.setattr(
        module.tempfile, "TemporaryFile", lambda **options: made.append(Full()) or made[0]
    )
    with pytest.raises(UserError, match=r"finds no room in .*No space left"):
        intake(memory_budget=0, folder=tmp_path).receive("bob", upload())
    assert made[0].closed


class Disk:
    """A file that keeps nothing, and gives back what it is told to."""

    def __init__(self, reads):
        self.reads = iter(reads)

    def write(self, data):
        return len(data)

    def seek(self, at):
        pass

    def readinto(self, buffer):
        found = next(self.reads)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        pass


@pytest.mark.parametrize(
    ("reads", "reason"),
    [
        ([0], "1000 bytes are missing"),
        ([999, 0], "1 bytes are missing"),
        ([1000, None], "700 bytes are missing"),
        ([10, OSError(errno.EIO, os.strerror(errno.EIO))], os.strerror(errno.EIO)),
    ],
)
def test_a_disk_that_does_not_give_back_what_it_took_is_a_user_s_error(
    reads, reason, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **_: Disk(reads))
    server = intake(memory_budget=0, folder=tmp_path)
    with (
        pytest.raises(UserError, match=f"cannot be read back from {tmp_path} .{reason}"),
        server.adding("bob", upload()) as received,
    ):
        list(received.payloads())
    with pytest.raises(Refused, match=BREAKS):
        server.require_whole()


def test_a_read_may_give_less_than_it_was_asked_for():
    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(buffer[:7])

    with intake(memory_budget=0).receive("bob", upload()) as received:
        file = received._file
        received._file = Slow(file.fileno(), closefd=False)
        assert [bytes(p) for p in received.payloads()] == payloads(0)
        received._file = file


def test_time_spent_waiting_for_chunks_is_not_counted(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    def slow():
        for data in upload():
            for _ in range(10):
                next(clock)
            yield data

    costs = Costs()
    intake(costs=costs).receive("bob", slow()).close()
    assert costs.seconds == {"add": len(SIZES)}


def test_client_and_server_agree_on_a_key_of_their_own():
    server = Identity.generate("server")
    clients = {name: Identity.generate(name) for name in ("ann", "bob")}
    run = new_run()
    channels = ServerChannels(server, Roster([c.public for c in clients.values()]), run)
    for name, client in clients.items():
        own = ClientChannel(client, server.public, run)
        assert own.key(name) == channels.key(name) == channel_key(server, client.public, run)
        assert len(own.key(name)) == 32
        with pytest.raises(BadMessage, match="stranger"):
            own.key("eve")
    assert channels.key("ann") != channels.key("bob")
    with pytest.raises(BadMessage, match="stranger"):
        channels.key("eve")


def test_a_client_that_only_claims_a_name_is_refused():
    server, ann, eve = (Identity.generate(name) for name in ("server", "ann", "eve"))
    run = new_run()
    channels = ServerChannels(server, Roster([ann.public, eve.public]), run)
    claimed = Identity.generate("ann")  # the name, without the key
    own = ClientChannel(eve, server.public, run).key("eve")
    for key in (channel_key(claimed, server.public, run), own):
        writer = UploadWriter(header_for("ann"), key, 1)
        with pytest.raises(BadMessage, match="'ann' refused: chunk 0 is damaged or forged"):
            Intake(header_for, channels, [3], 2).receive("ann", [writer.write(b"abc")])


def test_an_upload_of_an_earlier_run_is_refused_in_this_one():
    """Under the same identities, in a round of the same number, without an epoch."""
    server, ann = (Identity.generate(name) for name in ("server", "ann"))
    runs = new_run(), new_run()
    assert runs[0] != runs[1] and {len(run) for run in runs} == {16}
    chunks = []
    for run in runs:
        channels = ServerChannels(server, Roster([ann.public]), run)
        own = ClientChannel(ann, server.public, run)
        if chunks:
            with pytest.raises(BadMessage, match="'ann' refused: chunk 0 is damaged or forged"):
                Intake(header_for, channels, [3], 2).receive("ann", chunks)
        chunks = [UploadWriter(header_for("ann"), own.key("ann"), 1).write(b"abc")]
        Intake(header_for, channels, [3], 2).receive("ann", chunks).close()


@pytest.mark.parametrize("run", [b"", bytes(15), bytes(17)])
def test_a_run_is_named_by_16_bytes(run):
    server, ann = (Identity.generate(name) for name in ("server", "ann"))
    with pytest.raises(Refused, match=f"named by 16 bytes, got {len(run)}"):
        ClientChannel(ann, server.public, run)
    with pytest.raises(Refused, match=f"named by 16 bytes, got {len(run)}"):
        ServerChannels(server, Roster([ann.public]), run).key("ann")


def test_simulated_channels_stay_and_differ():
    other = SimulatedChannels()
    assert CHANNELS.key("ann") == CHANNELS.key("ann") != CHANNELS.key("bob")
    assert CHANNELS.key("ann") != other.key("ann")
