"""What mode threshold adds to the contract: its ring layer, its keys, its one accumulator."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import Refused
from fedjax_llm.secure import BadMessage, ThresholdSum, WrongSum, collect
from fedjax_llm.secure.ring_message import RingLayout
from fedjax_llm.secure.ring_table import choose
from fedjax_llm.secure.wire import UploadWriter, read_chunk
from fedjax_llm_kernels import ring as kernel

CLOUDS = ("medical", "finance", "general")
BOUND, COUNT, SUMMANDS = 2**15 - 1, 900_000, 40


@pytest.fixture(scope="module")
def secure_sum():
    """Several chunks, the last one not full."""
    made = ThresholdSum(CLOUDS, 2, COUNT, BOUND, SUMMANDS)
    assert made.client.layout.chunks > 1
    assert made.client.layout.chunks * made.client.layout.per_chunk > COUNT
    return made


@pytest.fixture(scope="module")
def new_round():
    numbers = itertools.count()
    return lambda: next(numbers)


def vector(seed):
    ints = np.random.default_rng(seed).integers(-BOUND, BOUND + 1, COUNT, dtype=np.int32)
    ints[:2] = ints[-2:] = BOUND, -BOUND
    return ints


def payloads(secure_sum, client, round_number, chunks):
    """What stands in the chunks of an upload."""
    public, upload_id, found = secure_sum.client, None, []
    header, key = public.header(client, round_number), secure_sum._channels.key(client)
    for number, (size, data) in enumerate(zip(public.payload_bytes, chunks, strict=True)):
        payload, upload_id = read_chunk(
            header, key, upload_id, number, len(public.payload_bytes), size, data
        )
        found.append(bytes(payload))
    return found


def written(secure_sum, client, round_number, bodies):
    """An upload with these payloads, under this client's own channel key."""
    header = secure_sum.client.header(client, round_number)
    writer = UploadWriter(header, secure_sum._channels.key(client), len(bodies))
    return [writer.write(body) for body in bodies]


def test_many_chunks_and_many_clients_are_exact_in_one_accumulator(secure_sum, new_round):
    """40 clients: more additions than the words take without a reduction in between."""
    assert secure_sum.client.layout.ring.lazy_additions >= 31
    round_number, vectors = new_round(), [vector(seed) for seed in range(3)]
    server = secure_sum.begin(round_number)
    shapes = [total.shape for total in server._totals]
    for k in range(SUMMANDS):
        server.add(f"c{k}", secure_sum.upload(f"c{k}", round_number, vectors[k % 3]))
    assert [total.shape for total in server._totals] == shapes
    times = [len(range(k, SUMMANDS, 3)) for k in range(3)]
    expected = sum(n * v.astype(np.int64) for n, v in zip(times, vectors, strict=True))
    pieces = list(server.pieces(CLOUDS))
    assert len(pieces) == secure_sum.client.layout.chunks
    assert np.array_equal(np.concatenate(pieces), expected)
    # A second look gives the same; it is the same sum.
    assert np.array_equal(collect(server, CLOUDS[1:]).total_P, expected)


def test_words_stay_exact_across_reductions():
    """As many additions as there is room for, then one more after a reduction: no word wraps."""
    ring = choose(BOUND, 8, COUNT).ring
    every_bit = np.full(2 * ring.payload_bytes_per_element, 255, np.uint8)
    total = jnp.zeros((2, ring.limbs, ring.size), jnp.uint32)
    for _ in range(ring.lazy_additions):
        total = kernel.add(ring, total, every_bit)
    total = kernel.add(ring, kernel.reduce(ring, total), every_bit)
    reduced = np.asarray(kernel.reduce(ring, total))
    for limb, prime in enumerate(ring.primes):
        most = (1 << prime.bit_length()) - 1
        assert (reduced[:, limb] == (ring.lazy_additions + 1) * most % prime).all()


def test_clients_may_stream_their_values(secure_sum, new_round):
    round_number, ints = new_round(), vector(0)
    server = secure_sum.begin(round_number)
    pieces = [ints[:1], ints[1:400_001], jnp.asarray(ints[400_001:]), ints[:0]]
    key = secure_sum._channels.key("x")
    server.add("x", secure_sum.client.upload("x", key, round_number, pieces))
    server.add("y", secure_sum.upload("y", round_number, ints))
    assert np.array_equal(collect(server, CLOUDS).total_P, 2 * ints.astype(np.int64))


def test_a_stream_that_turns_out_wrong_adds_nothing(secure_sum, new_round):
    round_number, ints = new_round(), vector(0)
    server = secure_sum.begin(round_number)
    late = ints.copy()
    late[-1] = BOUND + 1
    key = secure_sum._channels.key("x")
    for pieces, reason in (
        ([late], "'x': entry 899999 is 32768"),
        ([ints[:-1]], "must send 900000 integers, got 899999"),
        ([ints, ints[:1]], "must send 900000 integers, got more"),
    ):
        with pytest.raises(Refused, match=reason):
            server.add("x", secure_sum.client.upload("x", key, round_number, pieces))
    for name in "yz":
        server.add(name, secure_sum.upload(name, round_number, ints))
    assert np.array_equal(collect(server, CLOUDS).total_P, 2 * ints.astype(np.int64))
    assert server.participants == ("y", "z")


def test_what_leaves_a_client_is_uniform_and_never_twice_the_same(secure_sum, new_round):
    ring, round_number = secure_sum.client.layout.ring, new_round()
    zeros = np.zeros(COUNT, np.int32)
    bodies = [
        payloads(secure_sum, "x", round_number, list(secure_sum.upload("x", round_number, ints)))
        for ints in (zeros, zeros, np.full(COUNT, BOUND, np.int32))
    ]
    assert len({len(body) for body in bodies[0][1:]}) == 1
    for first, second in itertools.combinations(bodies, 2):
        for one, two in zip(first, second, strict=True):
            same = np.frombuffer(one, np.uint8) == np.frombuffer(two, np.uint8)
            assert same.mean() < 0.02  # 1/256 by chance
    for body in bodies:
        total = kernel.add(
            ring,
            jnp.zeros((secure_sum.client.layout.elements, ring.limbs, ring.size), jnp.uint32),
            np.frombuffer(body[1], np.uint8),
        )
        residues = np.asarray(total)
        for limb, prime in enumerate(ring.primes):
            bins = np.bincount((residues[:, limb] / prime * 64).astype(int).reshape(-1))
            expected = residues[:, limb].size / 64
            # Chi-square with 63 degrees of freedom: 160 is beyond the 1 - 1e-9 quantile.
            assert ((bins - expected) ** 2 / expected).sum() < 160


def test_garbage_under_a_valid_mac_reaches_no_result(secure_sum, new_round):
    """A hostile client may send any ring elements; the canary of its chunk shows them."""
    ints = vector(0)
    for broken in (1, secure_sum.client.layout.chunks):
        round_number = new_round()
        server = secure_sum.begin(round_number)
        server.add("x", secure_sum.upload("x", round_number, ints))
        bodies = payloads(
            secure_sum, "eve", round_number, list(secure_sum.upload("eve", round_number, ints))
        )
        bodies[broken] = bodies[broken][::-1]
        server.add("eve", written(secure_sum, "eve", round_number, bodies))
        with pytest.raises(WrongSum, match=f"canary of chunk {broken} of"):
            list(server.pieces(CLOUDS))


def test_a_secret_that_does_not_belong_to_the_message_reaches_no_result(secure_sum, new_round):
    round_number, ints = new_round(), vector(0)
    server = secure_sum.begin(round_number)
    server.add("x", secure_sum.upload("x", round_number, ints))
    one, two = (
        payloads(
            secure_sum, "eve", round_number, list(secure_sum.upload("eve", round_number, ints))
        )
        for _ in range(2)
    )
    server.add("eve", written(secure_sum, "eve", round_number, [one[0], *two[1:]]))
    with pytest.raises(WrongSum, match="canary of chunk 1"):
        next(server.pieces(CLOUDS))


def test_a_key_ciphertext_with_a_wrong_canary_reaches_no_result(secure_sum, new_round):
    layer, round_number, ints = secure_sum.client.key_layer, new_round(), vector(0)
    server = secure_sum.begin(round_number)
    server.add("x", secure_sum.upload("x", round_number, ints))
    bodies = payloads(
        secure_sum, "eve", round_number, list(secure_sum.upload("eve", round_number, ints))
    )
    # Added twice by eve herself: canary 2 in one message.
    doubled = layer.seal(secure_sum.client._public_key, np.zeros(layer.size, np.int32))
    server.add("eve", written(secure_sum, "eve", round_number, [bodies[0], *bodies[1:]]))
    server._key_sum.add(doubled)
    with pytest.raises(WrongSum, match=rf"round {round_number}.*canary 3"):
        list(server.pieces(CLOUDS))


def test_residues_of_the_key_ciphertext_are_checked_by_name(secure_sum, new_round):
    round_number, ints = new_round(), vector(0)
    server = secure_sum.begin(round_number)
    bodies = payloads(
        secure_sum, "eve", round_number, list(secure_sum.upload("eve", round_number, ints))
    )
    bodies[0] = b"\xff" * len(bodies[0])
    with pytest.raises(BadMessage, match="'eve' refused: a residue is not below"):
        server.add("eve", written(secure_sum, "eve", round_number, bodies))
    assert server.participants == ()


def test_without_the_clouds_the_server_sees_noise(secure_sum, new_round):
    """The accumulator, unmasked with any other secret, is uniform: the canaries are wrong."""
    round_number, ints = new_round(), np.zeros(COUNT, np.int32)
    server = secure_sum.begin(round_number)
    for name in "xy":
        server.add(name, secure_sum.upload(name, round_number, ints))
    ring = secure_sum.client.layout.ring
    guess = kernel.transform_secret(ring, jnp.zeros(ring.size, jnp.int32))
    with pytest.raises(WrongSum, match="does not open"):
        server._opened(0, server._totals[0], guess)


def test_rotation_gives_new_keys_and_refuses_the_old(new_round):
    made = ThresholdSum(CLOUDS, 2, 100, BOUND, 4)
    ints = np.arange(100)
    before, epoch = list(made.upload("x", 0, ints)), made.client.key.epoch
    begun = made.begin(0)
    begun.add("x", made.upload("x", 0, ints))
    begun.add("y", made.upload("y", 0, ints))
    made.rotate()
    assert made.client.key.epoch != epoch
    server = made.begin(0)
    with pytest.raises(BadMessage, match="'x' refused: it is encrypted under other keys"):
        server.add("x", before)
    for name in "xyz":
        server.add(name, made.upload(name, 0, ints))
    assert np.array_equal(collect(server, CLOUDS).total_P, 3 * ints)
    # What had been added under the old key has nobody left to decrypt it.
    with pytest.raises(Refused, match="rotated after round 0 began"):
        collect(begun, CLOUDS)


def test_chunks_are_alike_and_small():
    for count in (1, 20_479, 20_480, 10**6, 10**8):
        layout = RingLayout(choose(BOUND, 8, count), count)
        assert layout.chunk_bytes <= 2**21
        assert layout.chunks * layout.per_chunk >= count
        # Padding stays below one element per chunk.
        spare = layout.chunks * layout.per_chunk - count
        assert spare < layout.chunks * layout.parameters.per_element


def test_keys_in_a_folder_outlive_the_process(tmp_path):
    ints, options = np.arange(100), (CLOUDS, 2, 100, BOUND, 4)
    first = ThresholdSum(*options, folder=tmp_path / "keys")
    epoch = first.client.key.epoch
    server = first.begin(5)
    for name in "xy":
        server.add(name, first.upload(name, 5, ints))
    assert np.array_equal(collect(server, CLOUDS).total_P, 2 * ints)
    first.holders.close()
    again = ThresholdSum(*options, folder=tmp_path / "keys")
    assert again.client.key.epoch == epoch
    for round_number, outcome in ((5, "refused"), (6, "exact")):
        server = again.begin(round_number)
        for name in "xy":
            server.add(name, again.upload(name, round_number, ints))
        if outcome == "refused":  # the clouds remember what they have answered
            with pytest.raises(Refused, match="round 5"):
                collect(server, CLOUDS)
        else:
            assert np.array_equal(collect(server, CLOUDS).total_P, 2 * ints)
