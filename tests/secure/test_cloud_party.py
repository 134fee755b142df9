"""What a cloud answers, what it refuses, and what its answers show."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.errors import Refused, UserError
from fedjax_llm.secure import byte_lists
from fedjax_llm.secure.bfv import open_bfv
from fedjax_llm.secure.cloud_party import CloudParty
from fedjax_llm.secure.cloud_state import Journal
from fedjax_llm.secure.decryption import (
    MAX_ANSWERS,
    Statement,
    Total,
    open_agreement,
    open_answers,
    open_request,
    request_bytes,
)
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import Identity
from fedjax_llm.secure.keyholders import KeyHolders
from fedjax_llm.secure.masks import mask
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import add, pack, unpack
from fedjax_llm.secure.sums import BadMessage, BelowThreshold, Costs, NoAnswer

CLIENTS = ("x", "y", "z")


@pytest.fixture(scope="session")
def scheme():
    return open_bfv(choose(2**10, 4, 4, count=1000))


@pytest.fixture(scope="session")
def two_of_three(scheme):
    return KeyHolders(scheme, ("medical", "finance", "general"), 2)


@pytest.fixture(scope="session")
def three_of_four(scheme):
    return KeyHolders(scheme, ("a", "b", "c", "d"), 3)


@pytest.fixture(scope="session")
def slots(scheme):
    rng = np.random.default_rng(5)
    values = rng.integers(-(2**10), 2**10, (len(CLIENTS), scheme.ring_dimension))
    values[:, 0] = 1
    return values


class Round:
    """The server's sum of a round."""

    def __init__(self, scheme, holders, number, slots, clients=CLIENTS):
        self.scheme, self.holders, self.clients = scheme, holders, clients
        self.number = number
        key = scheme.public_key(holders.key.residues_2LN)
        sent = [scheme.encrypt(key, row) for row in slots[: len(clients)]]
        self.sum_2LN = functools.reduce(lambda x, y: add(x, y, scheme.moduli), sent)
        self.c0 = pack(self.sum_2LN[:1], scheme.moduli)
        self.c1 = pack(self.sum_2LN[1:], scheme.moduli)
        self.total = Total.of(holders.key.epoch, number, clients, self.c0, self.c1)

    def statement(self, clouds, **changed):
        return Statement(replace(self.total, **changed), tuple(clouds))

    def request(self, clouds):
        statement = self.statement(clouds)
        return request_bytes(statement, self.signatures(statement), self.c1)

    def signatures(self, statement):
        found = {}
        for name in statement.clouds:
            agreed = self.holders.parties[name].agree(statement.to_bytes())
            found[name] = open_agreement(statement, name, agreed, self.holders.roster)
        return found

    def answers(self, clouds):
        request = self.request(clouds)
        return {name: self.holders.parties[name].partial_decryption(request) for name in clouds}

    def fused(self, clouds, answers):
        opened = open_answers(self.statement(clouds), answers, self.holders.roster)
        return self.decoded(unpack_all(self.scheme, opened).values())

    def decoded(self, partials):
        moduli = self.scheme.moduli
        total = functools.reduce(lambda x, y: add(x, y, moduli), [self.sum_2LN[:1], *partials])
        return self.scheme.decode(total)


def unpack_all(scheme, bodies):
    return {n: unpack(b, 1, scheme.moduli, scheme.ring_dimension, n) for n, b in bodies.items()}


@pytest.fixture
def new_round(scheme, slots):
    """A server's sum under the next unused round number of these clouds."""

    def make(holders, clients=CLIENTS, number=None):
        used = max(party._journal.round_number for party in holders.parties.values())
        return Round(scheme, holders, used + 1 if number is None else number, slots, clients)

    return make


class TestRules:
    def test_the_same_request_gets_the_same_bytes(self, two_of_three, new_round, slots):
        round_sum = new_round(two_of_three)
        clouds = ("medical", "finance")
        request = round_sum.request(clouds)
        party = two_of_three.parties["medical"]
        answer = party.partial_decryption(request)
        assert party.partial_decryption(request) == answer
        assert party._journal.answers == 1
        other = two_of_three.parties["finance"].partial_decryption(request)
        fused = round_sum.fused(clouds, {"medical": answer, "finance": other})
        assert np.array_equal(fused, slots.sum(axis=0))

    def test_two_totals_of_a_round_are_refused(self, two_of_three, new_round):
        """Also if the first was only signed: other clients, other bytes, other digests."""
        round_sum = new_round(two_of_three)
        clouds = ("medical", "finance")
        statement = round_sum.statement(clouds)
        party = two_of_three.parties["medical"]
        party.agree(statement.to_bytes())
        for changed in (
            {"participants": ("x", "y")},
            {"participants": ("x", "y", "zz")},
            {"c0_digest": bytes(32)},
            {"c1_digest": bytes(32)},
            {"round_number": round_sum.number - 1},
        ):
            other = round_sum.statement(clouds, **changed)
            with pytest.raises(Refused, match="two would reveal differences"):
                party.agree(other.to_bytes())
        again = new_round(two_of_three, number=round_sum.number)  # fresh encryptions, same numbers
        with pytest.raises(Refused, match="bound to one sum"):
            party.agree(again.statement(clouds).to_bytes())
        assert party.agree(statement.to_bytes()) == party.agree(statement.to_bytes())

    def test_an_answer_needs_no_signing_before_to_bind(self, two_of_three, new_round):
        """The rules hold for requests too, whatever signatures they carry."""
        first, second = new_round(two_of_three), new_round(two_of_three)
        party = two_of_three.parties["medical"]
        clouds = ("medical", "finance")
        statement = second.statement(clouds)
        signatures = {
            name: two_of_three.parties[name].member.identity.sign("statement", statement.digest())
            for name in clouds
        }
        party.agree(first.statement(clouds).to_bytes())
        with pytest.raises(Refused, match="bound to one sum"):
            party.partial_decryption(request_bytes(statement, signatures, second.c1))

    def test_every_cloud_of_the_set_must_have_signed_this_statement(self, two_of_three, new_round):
        round_sum = new_round(two_of_three)
        statement = round_sum.statement(("medical", "finance"))
        signatures = round_sum.signatures(statement)
        party = two_of_three.parties["medical"]
        other_set = round_sum.statement(("medical", "general"))
        forger = Identity.generate("finance")
        for wrong in (
            bytes(64),
            b"",
            signatures["medical"],
            round_sum.signatures(other_set)["general"],
            forger.sign("statement", statement.digest()),
            two_of_three.parties["finance"].member.identity.sign("p", statement.digest()),
        ):
            request = request_bytes(statement, signatures | {"finance": wrong}, round_sum.c1)
            with pytest.raises(BadMessage, match="'finance' refused: its signature"):
                party.partial_decryption(request)
        less = frame("decrypt", statement.to_bytes(), byte_lists.join([bytes(64)]), round_sum.c1)
        with pytest.raises(BadMessage, match="not every cloud of the set has signed"):
            party.partial_decryption(less)
        with pytest.raises(BadMessage, match="c_1 is not the one"):
            party.partial_decryption(request_bytes(statement, signatures, round_sum.c0))
        assert party._journal.answers == 0
        assert party.partial_decryption(request_bytes(statement, signatures, round_sum.c1))

    def test_sets_outside_of_the_agreement_are_refused(self, three_of_four, new_round):
        party = three_of_four.parties["a"]
        round_sum = new_round(three_of_four)
        for clouds in (["a", "b"], ["b", "c", "d"], ["a", "b", "eve"], ["a", "a", "b"], []):
            with pytest.raises(Refused, match="decrypts with 3 or more of a, b, c, d, itself"):
                party.agree(round_sum.statement(clouds).to_bytes())
        for clients in ((), ("x",)):
            few = replace(round_sum.total, participants=clients)
            with pytest.raises(
                Refused, match=f"2 or more clients, asked for one of {len(clients)}"
            ):
                party.agree(Statement(few, ("a", "b", "c")).to_bytes())
        assert party._journal.total != round_sum.total.digest()  # nothing of this has bound it

    def test_clients_counted_twice_are_no_statement(self, two_of_three, new_round):
        total = new_round(two_of_three).total
        for clients in (("x", "x"), ("y", "x")):
            with pytest.raises(Refused, match="sorted and distinct"):
                replace(total, participants=clients)
            names = byte_lists.join_names(clients)
            number = total.round_number.to_bytes(8, "little")
            raw = frame("total", total.epoch, number, names, total.c0_digest, total.c1_digest)
            clouds = byte_lists.join_names(("medical", "finance"))
            with pytest.raises(BadMessage, match="'the server' refused: participants"):
                two_of_three.parties["medical"].agree(frame("statement", raw, clouds))

    def test_other_keys_are_refused(self, scheme, two_of_three, new_round):
        round_sum = new_round(two_of_three)
        other = round_sum.statement(("medical", "finance"), epoch=bytes(16))
        with pytest.raises(BadMessage, match="other keys than this run's"):
            two_of_three.parties["medical"].agree(other.to_bytes())
        fresh = CloudParty(scheme, two_of_three.parties["medical"].member)
        with pytest.raises(Refused, match="holds no key share; run the key ceremony"):
            fresh.agree(round_sum.statement(("medical", "finance")).to_bytes())
        with pytest.raises(UserError, match="minimum_clients must be at least 1, got 0"):
            CloudParty(scheme, replace(fresh.member, minimum_clients=0))

    def test_two_totals_at_once_get_one_signature(self, two_of_three, new_round):
        round_sum = new_round(two_of_three)
        party = two_of_three.parties["medical"]
        asked = [
            round_sum.statement(("medical", "finance"), participants=clients).to_bytes()
            for clients in (("x", "y"), ("x", "z"), ("y", "z"))
        ]

        def signed(statement):
            try:
                return bool(party.agree(statement))
            except Refused:
                return False

        with ThreadPoolExecutor(3) as pool:
            assert sum(pool.map(signed, asked)) == 1

    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=300), st.integers(0, 2**20))
    def test_any_bytes_are_answered_or_refused(self, two_of_three, data, at):
        party = two_of_three.parties["medical"]
        total = Total(bytes(16), 1, ("x", "y"), bytes(32), bytes(32))
        changed = bytearray(Statement(total, ("medical", "finance")).to_bytes())
        changed[at % len(changed)] ^= 1 + at % 255
        for wrong in (data, bytes(changed)):
            for call in (party.agree, party.partial_decryption):
                with pytest.raises(BadMessage, match="'the server' refused"):
                    call(wrong)
        nested = frame("statement", data, data)
        with pytest.raises(BadMessage):
            Statement.from_bytes(nested)

    @pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
    def test_round_numbers_of_numpy_are_numbers(self, two_of_three, new_round, kind):
        total = new_round(two_of_three).total
        statement = Statement(replace(total, round_number=kind(7)), ("medical", "finance"))
        same = Statement(replace(total, round_number=7), ("medical", "finance"))
        assert type(statement.total.round_number) is int
        assert statement == same and statement.to_bytes() == same.to_bytes()
        for wrong in (kind(7) - kind(8) if kind is not np.uint8 else 2**63, 7.0, "7", None):
            with pytest.raises(Refused, match="a round number must be in"):
                replace(total, round_number=wrong)

    def test_the_last_round_number_closes_a_cloud_as_the_module_says(self, scheme):
        """Through rotations too; ``decryption`` names what that costs and asks for a channel."""
        holders = KeyHolders(scheme, ("a", "b"), 2)
        for number, answer in ((2**63 - 1, True), (2**63 - 2, False), (0, False)):
            total = Total(holders.key.epoch, number, ("x", "y"), bytes(32), bytes(32))
            asked = Statement(total, ("a", "b")).to_bytes()
            if answer:
                assert holders.parties["a"].agree(asked)
                holders.rotate()
                continue
            with pytest.raises(Refused, match=f"bound to one sum of round {2**63 - 1}"):
                holders.parties["a"].agree(asked)

    def test_statements_come_back(self, two_of_three, new_round):
        statement = new_round(two_of_three).statement(("medical", "general"))
        assert Statement.from_bytes(statement.to_bytes()) == statement


class TestAttempts:
    def test_another_set_finishes_a_round_whose_cloud_has_died(
        self, two_of_three, new_round, slots
    ):
        round_sum = new_round(two_of_three)
        lost = round_sum.request(("medical", "finance"))
        unfinished = two_of_three.parties["medical"].partial_decryption(lost)
        clouds = ("medical", "general")
        answers = round_sum.answers(clouds)
        assert np.array_equal(round_sum.fused(clouds, answers), slots.sum(axis=0))
        # The late answer finishes the first set too: the same total, not a second one.
        late = two_of_three.parties["finance"].partial_decryption(lost)
        first = {"medical": unfinished, "finance": late}
        assert np.array_equal(round_sum.fused(("medical", "finance"), first), slots.sum(axis=0))

    def test_answers_of_an_unfinished_set_show_nothing(self, scheme, two_of_three, new_round):
        """Of one and the same c_1: uniform on its own, and no help to another set's."""
        round_sum = new_round(two_of_three)
        parts = {}
        for clouds in (("medical", "finance"), ("medical", "general")):
            request = round_sum.request(clouds)
            answer = two_of_three.parties["medical"].partial_decryption(request)
            (parts[clouds],) = unpack_all(scheme, opened_alone(answer)).values()
        other = two_of_three.parties["general"].partial_decryption(request)
        parts["general"] = unpack_all(scheme, opened_alone(other))[""]
        for part in parts.values():
            for row, modulus in zip(part[0], scheme.moduli, strict=True):
                bins = np.bincount((row / np.float64(modulus) * 64).astype(int), minlength=64)
                expected = row.size / 64
                # Chi-square with 63 degrees of freedom: 160 is beyond the 1 - 1e-9 quantile.
                assert ((bins - expected) ** 2 / expected).sum() < 160
        mixed = round_sum.decoded([parts[("medical", "finance")], parts["general"]])
        assert mixed[0] != len(CLIENTS)

    def test_three_fresh_answers_and_no_more(self, three_of_four, new_round, slots):
        round_sum = new_round(three_of_four)
        sets = [("a", "b", "c"), ("a", "b", "d"), ("a", "c", "d"), ("a", "b", "c", "d")]
        party = three_of_four.parties["a"]
        requests = [round_sum.request(clouds) for clouds in sets]
        answers = [party.partial_decryption(request) for request in requests[:MAX_ANSWERS]]
        assert MAX_ANSWERS == 3 == len(set(answers))
        with pytest.raises(Refused, match=r"has answered 3 times for round \d+; repeat the upl"):
            party.partial_decryption(requests[3])
        assert party.partial_decryption(requests[2]) == answers[2]
        with pytest.raises(Refused, match="has answered 3 times"):
            party.partial_decryption(requests[0])  # its bytes are gone: it would be a fresh one
        # All four together, had they answered, would have given the same sum.
        later = new_round(three_of_four)
        for clouds in sets[1:]:
            fused = later.fused(clouds, later.answers(clouds))
            assert np.array_equal(fused, slots.sum(axis=0))

    def test_floodings_of_one_c1_are_independent(self, scheme, three_of_four, new_round):
        """Finished sets of a round differ by as much as the errors are wide, not by less."""
        moduli = scheme.moduli
        width = math.prod(moduli) // moduli[0]
        apart = {(0, 1): [], (0, 2): [], (1, 2): []}
        for _ in range(6):
            round_sum = new_round(three_of_four)
            seen = []
            for clouds in ("abc", "bcd", "abd"):
                answers = round_sum.answers(clouds)
                opened = open_answers(round_sum.statement(clouds), answers, three_of_four.roster)
                parts = [round_sum.sum_2LN[:1], *unpack_all(scheme, opened).values()]
                fused = functools.reduce(lambda x, y: add(x, y, moduli), parts)
                seen.append(coefficient_0(scheme, fused[0]))
            for one, two in apart:
                apart[one, two].append(abs(seen[one] - seen[two]))
        for found in apart.values():
            # Differences of sums of three uniform errors: all six below 1/16 has odds of 1e-7.
            assert width // 16 < max(found) < 3.1 * width


class Silent:
    """A cloud that dies after so many calls."""

    def __init__(self, party, calls):
        self._party, self._left = party, calls

    def _alive(self):
        if not self._left:
            raise NoAnswer(self._party.cloud)
        self._left -= 1
        return self._party

    def agree(self, statement):
        return self._alive().agree(statement)

    def partial_decryption(self, request):
        return self._alive().partial_decryption(request)


class TestExchange:
    @pytest.fixture
    def dying(self, three_of_four, monkeypatch):
        """Lets clouds die after so many calls."""

        def make(**calls):
            for name, number in calls.items():
                party = three_of_four.parties[name]
                monkeypatch.setitem(three_of_four.parties, name, Silent(party, number))
            return three_of_four

        return make

    def decrypt(self, round_sum, alive="abcd", costs=None):
        costs = costs or Costs()
        partials = round_sum.holders.decrypt(
            round_sum.number, CLIENTS, round_sum.c0, round_sum.c1, 1, alive, costs
        )
        return partials, costs

    def test_the_first_t_alive_decrypt_and_bytes_are_counted(self, three_of_four, new_round, slots):
        for alive, expected in (("abcd", "abc"), ("dcb", "bcd"), ("adc", "acd")):
            round_sum = new_round(three_of_four)
            partials, costs = self.decrypt(round_sum, alive)
            assert set(partials) == set(expected)
            assert np.array_equal(round_sum.decoded(partials.values()), slots.sum(axis=0))
            assert {n for n, size in costs.bytes_up.items() if size} == set(expected)
            assert {n for n, size in costs.bytes_down.items() if size} == set(expected)
            assert set(costs.bytes_up) == set("abcd") and costs.seconds["decrypt"] > 0
            half = len(round_sum.c1)
            assert all(half < costs.bytes_up[n] < half + 1000 for n in expected)
            assert all(half < costs.bytes_down[n] < half + 2000 for n in expected)

    @pytest.mark.parametrize("calls", [0, 1])
    @pytest.mark.parametrize("dead", "abc")
    def test_a_cloud_dead_before_signing_or_before_answering(
        self, three_of_four, new_round, dying, slots, dead, calls
    ):
        round_sum = new_round(three_of_four)
        dying(**{dead: calls})
        partials, _ = self.decrypt(round_sum)
        assert set(partials) == set("abcd") - {dead}
        assert np.array_equal(round_sum.decoded(partials.values()), slots.sum(axis=0))

    def test_too_many_dead_names_them(self, three_of_four, new_round, dying):
        round_sum = new_round(three_of_four)
        dying(a=0, c=1)
        with pytest.raises(BelowThreshold, match=r"needs 3 clouds, 2 left \(.*'a'.*; .*'c'"):
            self.decrypt(round_sum)

    def test_below_the_threshold_nobody_is_asked(self, three_of_four, new_round):
        round_sum = new_round(three_of_four)
        with pytest.raises(BelowThreshold, match="needs 3 of 4 clouds, 2 alive, missing b, d"):
            self.decrypt(round_sum, ["a", "c", "stranger"])
        partials, _ = self.decrypt(round_sum)  # once a cloud is back
        assert len(partials) == 3

    def test_three_sets_that_fail_end_the_round(self, scheme):
        holders = KeyHolders(scheme, tuple("abcdefg"), 2)
        c1 = bytes(len(pack(holders.key.residues_2LN[:1], scheme.moduli)))
        for name in "acd":  # each signs, and dies before it answers
            holders.parties[name] = Silent(holders.parties[name], 1)
        with pytest.raises(BelowThreshold, match=r"three sets failed .*'a'.*'c'.*'d'"):
            holders.decrypt(0, ["x", "y"], b"", c1, 1, "abcdefg", Costs())
        assert holders.parties["b"]._journal.answers == 3

    def test_garbage_from_a_cloud_names_it(self, three_of_four, new_round, monkeypatch):
        class Garbled:
            def __init__(self, party, agree, answer):
                self._party, self._agree, self._answer = party, agree, answer

            def agree(self, statement):
                return self._agree(self._party.agree(statement))

            def partial_decryption(self, request):
                return self._answer(self._party.partial_decryption(request))

        def same(data):
            return data

        def foreign(data):
            return frame("agreed", Identity.generate("b").sign("statement", bytes(32)))

        for agree, answer in ((lambda data: data[:-1], same), (foreign, same), (same, foreign)):
            round_sum = new_round(three_of_four)
            with monkeypatch.context() as patched:
                garbled = Garbled(three_of_four.parties["b"], agree, answer)
                patched.setitem(three_of_four.parties, "b", garbled)
                with pytest.raises(BadMessage, match="message of 'b' refused"):
                    self.decrypt(round_sum)

    def test_answers_are_of_exactly_the_set(self, three_of_four, new_round, slots):
        """Missing, from a stranger, repeated under another name, of another round, or damaged."""
        roster = three_of_four.roster
        earlier = new_round(three_of_four)
        old = earlier.answers("abd")
        round_sum = new_round(three_of_four)
        answers = round_sum.answers("abd")
        statement = round_sum.statement("abd")
        with pytest.raises(NoAnswer, match="no answer from 'd': its part of round") as caught:
            open_answers(statement, {n: answers[n] for n in "ab"}, roster)
        assert caught.value.cloud == "d"
        body = unframe("partial", 3, answers["b"], "b")[1]
        digest = statement.digest()
        eve = Identity.generate("eve")
        unsigned = frame("partial", digest, body, eve.sign("partial decryption", digest, body))
        for changed, reason in (
            ({"c": answers["a"]}, "'c' refused: a stranger"),
            ({"eve": answers["a"]}, "'eve' refused: a stranger"),
            ({"d": answers["a"]}, "'d' refused: its signature"),
            ({"b": old["b"]}, "'b' refused: its answer is for another statement"),
            ({"b": answers["b"][:-1]}, "'b' refused: truncated or damaged"),
            ({"b": b""}, "'b' refused"),
            ({"b": unsigned}, "'b' refused: its signature"),
        ):
            with pytest.raises(BadMessage, match=reason):
                open_answers(statement, answers | changed, roster)
        assert np.array_equal(round_sum.fused("abd", answers), slots.sum(axis=0))

    def test_there_is_no_lead_to_be_missing(self, three_of_four, new_round, slots):
        """Every cloud does the same; c_0 is added by the server, once, whichever clouds answer."""
        round_sum = new_round(three_of_four)
        answers = round_sum.answers("bcd")
        for order in ("bcd", "dcb", "cbd"):
            shuffled = {name: answers[name] for name in order}
            assert np.array_equal(round_sum.fused("bcd", shuffled), slots.sum(axis=0))


class TestWhatAnswersShow:
    def test_flooding_is_as_wide_as_the_argument_assumes(self, scheme, two_of_three):
        """Of c_1 = 0 only the error is left; its coefficient 0 is the mean of its evaluations."""
        product = math.prod(scheme.moduli)
        zero = np.zeros((1, len(scheme.moduli), scheme.ring_dimension), np.uint64)
        share = two_of_three.parties["medical"]._held.share_1LN
        errors = [
            coefficient_0(scheme, scheme.decrypt_partially(share, zero)[0]) for _ in range(24)
        ]
        half = product // scheme.moduli[0] // 2
        assert half > 2**118  # the width is twice that
        assert max(map(abs, errors)) <= half + 1
        # 24 uniform draws: each of these fails with a probability below 1e-6.
        assert max(errors) > 0 > min(errors) and max(map(abs, errors)) > half // 2

    def test_an_idle_cloud_and_the_server_learn_nothing_of_the_noise(
        self, scheme, two_of_three, new_round
    ):
        """Cloud 3 knows its share; b's is (s + 2 share_3) / 3: b's answer alone would show E mod 3.

        Only coefficient 0 is looked at. What is left must be uniform, not near multiples of Q / 3.
        """
        clouds = two_of_three.clouds
        product, t = math.prod(scheme.moduli), scheme.parameters.plaintext_modulus
        third = pow(3, -1, product)
        idle = two_of_three.parties[clouds[2]]._held.share_1LN[0]
        near = 0
        for _ in range(8):
            round_sum = new_round(two_of_three)
            opened = open_answers(
                round_sum.statement(clouds[:2]),
                round_sum.answers(clouds[:2]),
                two_of_three.roster,
            )
            parts = unpack_all(scheme, opened)
            c0, c1 = round_sum.sum_2LN[:1], round_sum.sum_2LN[1:]
            fused = functools.reduce(lambda x, y: add(x, y, scheme.moduli), [c0, *parts.values()])
            message = round(coefficient_0(scheme, fused[0]) * t / product) * product // t
            rows = zip(idle, c1[0], scheme.moduli, strict=True)
            own = np.stack([(i.astype(object) * c % q).astype(np.uint64) for i, c, q in rows])
            left = coefficient_0(scheme, parts[clouds[1]][0])
            left += third * (
                2 * coefficient_0(scheme, own) - coefficient_0(scheme, c0[0]) + message
            )
            distance = 3 * left % product
            near += min(distance, product - distance) < product // 2**32
        assert near == 0

    def test_masks_cancel_over_the_set_and_differ_by_statement(self, scheme, three_of_four):
        clouds = ["a", "c", "d"]

        def masks(statement, chunk):
            return [
                mask(n, clouds, keys_of(three_of_four, n), statement, chunk, scheme.moduli, 64)
                for n in clouds
            ]

        first = masks(bytes(32), 0)
        total = functools.reduce(lambda x, y: add(x, y, scheme.moduli), first)
        assert not total.any()
        partial = add(first[0], first[1], scheme.moduli)
        assert partial.any()
        for one in (*masks(bytes(32), 1), *masks(b"\1" * 32, 0)):
            assert all((one == other).mean() < 0.01 for other in first)

    def test_a_request_shows_its_cloud_only_what_the_readme_says(self, two_of_three, new_round):
        """Names of clients and c_1: no c_0, so that no cloud of a set can fuse by itself."""
        round_sum = new_round(two_of_three)
        request = round_sum.request(("medical", "finance"))
        statement, c1 = open_request(request, two_of_three.roster)
        assert statement.total.participants == CLIENTS and c1 == round_sum.c1
        assert round_sum.c0[:64] not in request


def keys_of(holders, name):
    return holders.parties[name]._held.mask_keys


def opened_alone(answer):
    return {"": unframe("partial", 3, answer, "")[1]}


def coefficient_0(scheme, residues_LN):
    """Of an element in evaluation form: the mean of its evaluations, modulo Q, centred."""
    size, product = scheme.ring_dimension, math.prod(scheme.moduli)
    value = 0
    for row, modulus in zip(residues_LN, scheme.moduli, strict=True):
        rest = product // modulus
        value += int(row.astype(object).sum()) * pow(size * rest, -1, modulus) * rest
    return (value + product // 2) % product - product // 2


def test_a_journal_starts_before_the_first_round():
    assert Journal() == Journal(-1, bytes(32), 0)
