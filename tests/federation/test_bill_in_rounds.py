"""The bill of a timeline and the rounds that really ran agree on bytes and dollars."""

import dataclasses

import pytest

from fedjax_llm.clouds import Cloud, Compute, Egress, Link, Prices
from fedjax_llm.federation import Federation, Threshold

PRICES = Prices(36.0, internet=Egress((90.0, 50.0), (0.0, 1e-5)))
# Names, digests and signatures in the messages that open a sum, of each holder and way.
FRAMES = 1000


@pytest.fixture
def priced(federate, make_participants):
    """A federation whose clouds and server pay."""

    def made(**changes) -> Federation:
        participants = [
            dataclasses.replace(
                own,
                cloud=Cloud(
                    own.cloud.name,
                    Link(50.0, 50.0),
                    Compute(tokens_per_second=1000.0),
                    prices=PRICES,
                    server=PRICES,
                ),
            )
            for own in make_participants()
        ]
        return federate(participants=participants, **changes)

    return made


@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "threshold"])
def test_where_nothing_fails_the_bill_has_the_bytes_of_the_rounds(priced, hidden):
    federation = priced(sum_mode=Threshold(2)) if hidden else priced()
    reports = [report for _, report in federation.rounds(federation.init(), 2)]
    bill = federation.calendar.bill
    for number, report in enumerate(reports):
        slack = 2 * FRAMES if hidden else 0
        assert abs(bill.up_NxC[number].sum() - report.uplink_bytes) <= slack
        assert abs(bill.down_NxC[number].sum() - report.downlink_bytes) <= slack
        assert report.dollars == pytest.approx(
            bill.clouds_NxC[number].sum() + bill.server_N[number]
        )
        own = [cloud.dollars for cloud in report.clouds.values()]
        assert own == pytest.approx(bill.clouds_NxC[number].tolist())
        assert report.dollars_server == pytest.approx(bill.server_N[number]) and min(own) > 0
