"""The ceremony: a key whose secret nobody holds, and a relay that can do nothing but stop it."""

import functools
import itertools

import numpy as np
import pytest

from fedjax_llm.errors import Refused
from fedjax_llm.secure import byte_lists, shamir
from fedjax_llm.secure.bfv import open_bfv
from fedjax_llm.secure.frames import frame, unframe
from fedjax_llm.secure.identity import Identity, Roster
from fedjax_llm.secure.joint_key import JointKey, check_confirmations
from fedjax_llm.secure.key_ceremony import Ceremony, Group
from fedjax_llm.secure.parameters import choose
from fedjax_llm.secure.residues import add, pack
from fedjax_llm.secure.sums import BadMessage

CLOUDS = ("p", "q", "r")
GROUP = Group(CLOUDS, 2)
STEPS = ("hello", "seed", "commit", "share", "deal", "confirm", "finish")
IDENTITIES = {name: Identity.generate(name) for name in (*CLOUDS, "mallory")}
ROSTER = Roster(identity.public for identity in IDENTITIES.values())


@pytest.fixture(scope="session")
def scheme():
    return open_bfv(choose(100, 4, 3, count=100))


def begin(scheme, group=GROUP, identities=IDENTITIES, roster=ROSTER):
    return {name: Ceremony(scheme, group, identities[name], roster) for name in group.clouds}


def for_cloud(dealt, name):
    return {sender: deals[name] for sender, deals in dealt.items() if sender != name}


def step(ceremonies, name, sent, number):
    """What one cloud makes of the messages of the step before."""
    method = getattr(ceremonies[name], STEPS[number])
    if number == 0:
        return method()
    return method(for_cloud(sent, name) if STEPS[number] == "confirm" else sent)


def advance(ceremonies, last):
    """The messages of step ``last``, everything relayed faithfully."""
    sent = None
    for number in range(STEPS.index(last) + 1):
        sent = {name: step(ceremonies, name, sent, number) for name in ceremonies}
    return sent


@pytest.fixture(scope="session")
def outcomes(scheme):
    return advance(begin(scheme), "finish")


def test_all_clouds_hold_shares_of_the_secret_of_one_key(scheme):
    ceremonies = begin(scheme)
    shares = advance(ceremonies, "share")
    secrets = [ceremony._secret for ceremony in ceremonies.values()]
    dealt = {name: ceremony.deal(shares) for name, ceremony in ceremonies.items()}
    sent = {name: c.confirm(for_cloud(dealt, name)) for name, c in ceremonies.items()}
    outcomes = {name: c.finish(sent) for name, c in ceremonies.items()}
    joint = functools.reduce(lambda x, y: add(x, y, scheme.moduli), secrets)
    for chosen in itertools.combinations(CLOUDS, 2):
        for limb, modulus in enumerate(scheme.moduli):
            weights = shamir.lagrange_at_zero([GROUP.point(name) for name in chosen], modulus)
            parts = [
                shamir.scale(outcomes[n].share_1LN[0, limb], weights[GROUP.point(n)], modulus)
                for n in chosen
            ]
            found = sum(part.astype(object) for part in parts) % modulus
            assert np.array_equal(found.astype(np.uint64), joint[0, limb])
    assert len({outcome.key.digest for outcome in outcomes.values()}) == 1
    for one, other in itertools.permutations(CLOUDS, 2):
        assert outcomes[one].mask_keys[other] == outcomes[other].mask_keys[one]
    assert len({key for o in outcomes.values() for key in o.mask_keys.values()}) == 3


def test_no_key_or_share_stands_in_what_was_relayed(scheme):
    ceremonies = begin(scheme)
    relayed = []
    sent = None
    secrets = {}
    for number in range(len(STEPS)):
        if STEPS[number] == "deal":
            secrets = {name: ceremony._secret for name, ceremony in ceremonies.items()}
        sent = {name: step(ceremonies, name, sent, number) for name in ceremonies}
        if STEPS[number] == "deal":
            relayed += [data for deals in sent.values() for data in deals.values()]
        elif STEPS[number] != "finish":
            relayed += sent.values()
    everything = b"".join(relayed)
    for name, outcome in sent.items():
        kept = (secrets[name], outcome.share_1LN)
        assert not np.array_equal(*kept)  # the share is of the joint secret, not of one's own part
        for secret in kept:
            packed = pack(secret, scheme.moduli)
            assert packed[:64] not in everything and packed[-64:] not in everything
        assert not any(key in everything for key in outcome.mask_keys.values())
        left = vars(ceremonies[name])
        assert left["_secret"] is left["_share"] is left["_exchange"] is None
        assert "share_1LN" not in repr(outcome) and "mask_keys" not in repr(outcome)


def test_the_epoch_names_key_group_scheme_and_seed(scheme, outcomes):
    key = outcomes["p"].key
    assert len(key.epoch) == 16 and len(key.seed) == 32
    made = [
        JointKey.of(key.residues_2LN, key.seed, group, scheme)
        for group in (GROUP, Group(CLOUDS, 3), Group(("q", "p", "r"), 2), Group(("p", "q"), 2))
    ]
    made.append(JointKey.of(key.residues_2LN, bytes(32), GROUP, scheme))
    made.append(JointKey.of(key.residues_2LN[::-1], key.seed, GROUP, scheme))
    other_scheme = open_bfv(choose(101, 4, 3, count=100))
    made.append(JointKey.of(key.residues_2LN, key.seed, GROUP, other_scheme))
    assert made[0].epoch == key.epoch
    assert len({one.epoch for one in made}) == len(made)


def test_two_ceremonies_share_nothing(scheme, outcomes):
    again = advance(begin(scheme), "finish")
    for name in CLOUDS:
        one, two = outcomes[name], again[name]
        assert one.key.epoch != two.key.epoch and one.key.seed != two.key.seed
        assert (one.key.residues_2LN == two.key.residues_2LN).mean() < 0.001
        assert (one.share_1LN == two.share_1LN).mean() < 0.001
        assert not set(one.mask_keys.values()) & set(two.mask_keys.values())


def test_a_client_with_the_roster_can_check_the_key_it_is_given(scheme, outcomes):
    key, words = outcomes["q"].key, outcomes["q"].confirmations
    check_confirmations(key, GROUP, scheme, ROSTER, words)
    clouds_only = Roster(IDENTITIES[name].public for name in CLOUDS)
    check_confirmations(key, GROUP, scheme, clouds_only, words)
    own = JointKey.of(key.residues_2LN, bytes(32), GROUP, scheme)
    with pytest.raises(BadMessage, match="'p' refused: its signature"):
        check_confirmations(own, GROUP, scheme, ROSTER, words)
    with pytest.raises(Refused, match="not the one that its epoch names"):
        check_confirmations(
            JointKey(own.residues_2LN, key.digest, own.seed), GROUP, scheme, ROSTER, words
        )
    with pytest.raises(Refused, match="not the one that its epoch names"):
        check_confirmations(key, Group(CLOUDS, 3), scheme, ROSTER, words)
    with pytest.raises(Refused, match="no 'confirm' message from r"):
        check_confirmations(key, GROUP, scheme, ROSTER, {n: words[n] for n in "pq"})
    with pytest.raises(BadMessage, match="'q' refused"):
        check_confirmations(key, GROUP, scheme, ROSTER, words | {"q": words["p"]})
    with pytest.raises(BadMessage, match="'mallory' refused: no 'confirm' message is expected"):
        check_confirmations(key, GROUP, scheme, ROSTER, words | {"mallory": words["p"]})


def test_confirmations_show_neither_whose_group_nor_which_epoch(scheme, outcomes):
    """Why the guarantee of ``check_confirmations`` asks for group and epoch besides the roster."""
    mallory = Group(("mallory", "p"), 2)
    theirs = advance(begin(scheme, mallory), "finish")["mallory"]
    check_confirmations(theirs.key, mallory, scheme, ROSTER, theirs.confirmations)
    with pytest.raises(Refused, match="not the one that its epoch names"):
        check_confirmations(theirs.key, GROUP, scheme, ROSTER, theirs.confirmations)
    later = advance(begin(scheme), "finish")["p"].key
    old = outcomes["p"]
    assert old.key.epoch != later.epoch
    check_confirmations(old.key, GROUP, scheme, ROSTER, old.confirmations)


def test_changing_one_s_mind_after_committing_is_refused(scheme):
    """By a cloud that signs whatever it sends: the commitment is what holds it."""

    def signed(ceremonies, name, kind, body):
        ceremony = ceremonies[name]
        return frame(kind, body, IDENTITIES[name].sign(f"ceremony {kind}", ceremony._before, body))

    for kind, reason in (("seed", "its seed is not"), ("share", "its key share is not")):
        ceremonies = begin(scheme)
        before = STEPS[STEPS.index(kind) - 1]
        sent = advance(ceremonies, before)
        number = STEPS.index(kind)
        sent = {name: step(ceremonies, name, sent, number) for name in CLOUDS}
        ceremonies["q"]._before = ceremonies["q"]._transcript
        body = unframe(kind, 2, sent["q"], "q")[0]
        sent["q"] = signed(ceremonies, "q", kind, body[::-1])
        with pytest.raises(BadMessage, match=f"'q' refused: {reason} the one it had committed"):
            step(ceremonies, "p", sent, number + 1)


class TestRelay:
    """The server in the middle, at every step. Somebody always notices before a share is kept."""

    @pytest.mark.parametrize("kind", STEPS[:-1])
    def test_leaving_out_a_message(self, scheme, kind):
        ceremonies = begin(scheme)
        sent = advance(ceremonies, kind)
        less = {name: sent[name] for name in "pq"}
        with pytest.raises(Refused, match=f"no '{kind}' message from r"):
            step(ceremonies, "p", less, STEPS.index(kind) + 1)

    @pytest.mark.parametrize("kind", STEPS[:-1])
    def test_a_replayed_message_of_another_ceremony(self, scheme, kind):
        """Same clouds, same step, correctly signed then: no cloud finishes."""
        old, new = begin(scheme), begin(scheme)
        replayed = advance(old, kind)["q"]
        sent = advance(new, kind) | {"q": replayed}
        number = STEPS.index(kind) + 1
        if kind == "hello":  # signed over nothing yet: the next step shows it
            sent = {name: step(new, name, sent, number) for name in "pr"} | {
                "q": step(new, "q", advance_own(new, sent), number)
            }
            number += 1
            with pytest.raises(BadMessage, match="'q' refused: the signature of its 'seed'"):
                step(new, "p", sent, number)
        else:
            with pytest.raises(BadMessage, match="'q' refused"):
                step(new, "p", sent, number)

    @pytest.mark.parametrize("kind", STEPS[:-1])
    def test_exchanging_two_clouds_messages(self, scheme, kind):
        ceremonies = begin(scheme)
        sent = advance(ceremonies, kind)
        with pytest.raises(BadMessage, match="'q' refused"):
            step(ceremonies, "p", sent | {"q": sent["r"], "r": sent["q"]}, STEPS.index(kind) + 1)

    @pytest.mark.parametrize("kind", ["hello", "seed", "commit", "share"])
    def test_showing_a_cloud_another_message_in_its_own_name(self, scheme, kind):
        old, ceremonies = begin(scheme), begin(scheme)
        replayed = advance(old, kind)["p"]
        sent = advance(ceremonies, kind) | {"p": replayed}
        with pytest.raises(BadMessage, match=f"'p' refused: not the '{kind}' that it sent"):
            step(ceremonies, "p", sent, STEPS.index(kind) + 1)

    @pytest.mark.parametrize("kind", STEPS[:-1])
    def test_a_damaged_message(self, scheme, kind):
        ceremonies = begin(scheme)
        sent = advance(ceremonies, kind)
        number = STEPS.index(kind) + 1
        name = "q"
        data = sent[name]["p"] if kind == "deal" else sent[name]
        fields = {"hello": 3, "deal": 3, "confirm": 1}.get(kind, 2)
        *bodies, signature = unframe(kind, fields, data, name)
        body = bodies[-1] if bodies else signature
        changed = [*bodies, signature]
        changed[max(len(bodies) - 1, 0)] = bytes([body[0] ^ 1]) + body[1:]
        forged = frame(kind, *changed)
        wrong = sent[name] | {"p": forged} if kind == "deal" else forged
        with pytest.raises(BadMessage, match=r"'q' refused: (the|its) signature"):
            step(ceremonies, "p", sent | {name: wrong}, number)
        ceremonies = begin(scheme)
        sent = advance(ceremonies, kind)
        cut = sent[name] | {"p": b""} if kind == "deal" else b""
        with pytest.raises(BadMessage, match=r"'q' refused: no .* message"):
            step(ceremonies, "p", sent | {name: cut}, number)

    def test_a_stranger_among_the_messages(self, scheme):
        ceremonies = begin(scheme)
        sent = advance(ceremonies, "hello")
        with pytest.raises(BadMessage, match="'mallory' refused: no 'hello' message is expected"):
            ceremonies["p"].seed(sent | {"mallory": sent["q"]})

    def test_standing_between_two_clouds(self, scheme):
        """The classical attack: own keys in the others' names. The roster ends it at step 1."""
        fakes = {name: Identity.generate(name) for name in CLOUDS}
        fake_roster = Roster([IDENTITIES["p"].public, fakes["q"].public, fakes["r"].public])
        among_fakes = {name: fakes[name] for name in "qr"} | {"p": IDENTITIES["p"]}
        theirs = begin(scheme, identities=among_fakes, roster=fake_roster)
        honest = begin(scheme)
        deceived = begin(scheme, identities=among_fakes, roster=fake_roster)
        hellos = {"p": honest["p"].hello()} | {name: theirs[name].hello() for name in "qr"}
        with pytest.raises(BadMessage, match="'q' refused: the signature of its 'hello'"):
            honest["p"].seed(hellos)
        # Without an authentic roster nothing helps: what it is worth is said in ``identity``.
        assert len(advance(deceived, "finish")) == 3

    def test_deals_of_one_recipient_given_to_another(self, scheme):
        ceremonies = begin(scheme)
        dealt = advance(ceremonies, "deal")
        with pytest.raises(BadMessage, match="'q' refused: its share was not dealt to 'p'"):
            ceremonies["p"].confirm({"q": dealt["q"]["r"], "r": dealt["r"]["p"]})

    def test_clouds_that_disagree_on_the_threshold(self, scheme):
        """A relay that tells them different groups: their first signatures already differ."""
        two, three = begin(scheme), begin(scheme, Group(CLOUDS, 3))
        hellos = {"p": two["p"].hello(), "q": three["q"].hello(), "r": two["r"].hello()}
        with pytest.raises(BadMessage, match="'q' refused: the signature of its 'hello'"):
            two["p"].seed(hellos)

    def test_a_cloud_that_confirms_another_key(self, scheme, outcomes):
        ceremonies = begin(scheme)
        sent = advance(ceremonies, "confirm")
        old = outcomes["q"].confirmations["q"]
        with pytest.raises(BadMessage, match="'q' refused: its signature \\(joint key\\)"):
            ceremonies["p"].finish(sent | {"q": old})


def advance_own(ceremonies, sent):
    """The messages as cloud q saw them when it was not deceived itself."""
    return sent | {"q": ceremonies["q"]._sent}


def test_steps_come_once_and_in_order(scheme):
    ceremonies = begin(scheme)
    with pytest.raises(Refused, match="step 'seed' out of order, expected hello"):
        ceremonies["p"].seed({})
    hellos = advance(ceremonies, "hello")
    with pytest.raises(Refused, match="step 'hello' out of order, expected seed"):
        ceremonies["p"].hello()
    ceremonies["p"].seed(hellos)
    with pytest.raises(Refused, match="out of order"):
        ceremonies["p"].seed(hellos)
    done = begin(scheme)
    advance(done, "finish")
    with pytest.raises(Refused, match="out of order, expected none"):
        done["p"].finish({})


def test_a_failed_step_ends_the_ceremony(scheme):
    """A relay may not try until something fits."""
    ceremonies = begin(scheme)
    hellos = advance(ceremonies, "hello")
    with pytest.raises(BadMessage):
        ceremonies["p"].seed(hellos | {"q": b""})
    with pytest.raises(Refused, match="out of order"):
        ceremonies["p"].seed(hellos)


def test_only_a_cloud_of_the_group_with_its_own_keys_takes_part(scheme):
    with pytest.raises(Refused, match="'mallory' is not of the group p, q, r"):
        Ceremony(scheme, GROUP, IDENTITIES["mallory"], ROSTER)
    with pytest.raises(Refused, match="roster has other keys in its name"):
        Ceremony(scheme, GROUP, Identity.generate("p"), ROSTER)
    with pytest.raises(BadMessage, match="'r' refused: a stranger"):
        Ceremony(scheme, GROUP, IDENTITIES["p"], Roster(IDENTITIES[n].public for n in "pq"))


@pytest.mark.parametrize(
    ("clouds", "threshold"),
    [(("a", "b"), 1), (("a",), 1), (("a", "b"), 3), (("a", "a"), 2), (("a\nb", "c"), 2)],
)
def test_one_cloud_alone_is_never_a_threshold(clouds, threshold):
    with pytest.raises(Refused):
        Group(clouds, threshold)


@pytest.mark.parametrize("size", [4_000, 0, 1, 7, 9])
def test_a_group_s_threshold_has_eight_bytes(size):
    """Thousands would be a number that Python refuses to print."""
    wrong = b"\xff" * size if size > 9 else b"\2".ljust(size, b"\0")[:size]
    data = frame("group", wrong, byte_lists.join_names(GROUP.clouds))
    with pytest.raises(BadMessage, match=f"'x' refused: no group .a threshold of {size} bytes"):
        Group.from_bytes(data, "x")


def test_groups_come_back():
    assert Group.from_bytes(GROUP.to_bytes(), "x") == GROUP
    for wrong in (b"", GROUP.to_bytes()[:-1], frame("group", bytes(8), b"")):
        with pytest.raises(BadMessage, match="'x' refused"):
            Group.from_bytes(wrong, "x")
