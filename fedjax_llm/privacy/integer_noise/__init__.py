"""Distributed integer noise: shares that clients add before a secure sum, so that nobody, the
server included, sees the sum without its noise.

| symbol | name in code | meaning |
|---|---|---|
| N | `clients` | clients that are asked for a message and a share in every round |
| - | `dropouts` | most clients of a round whose message, and share with it, may be lost |
| - | `colluding` | clients that may tell the server their shares, which then hide nothing |
| n | `counted` | N - dropouts - colluding, the shares that privacy rests on |
| sigma | `total_stddev_in_steps` | noise that the sum of n shares promises, in fixed-point steps |
| sigma^2 / n | `share_variance` | variance (parameter) of one share |
| Delta_2 | `l2_sensitivity_in_steps` | l2 norm of one client's encoded message, in steps |
| d | `dimension` | coordinates of a message |
| T | `rounds` | sums that are composed |
| M | `max_int` | largest absolute value of a coordinate of a message |
| B | `NoiseTable.bound` | largest absolute value of a share's coordinate |

Assumptions, under which `epsilon` is a guarantee towards the server, the other clients (at most
`colluding` of whom pool what they know with it) and the public:

1. Neighbours differ in one client's *data*: its messages of all rounds become zeros, or zeros
   become its messages. Its noise share is drawn on both sides. Whether a client took part is
   public, as it is in a secure sum. So both sides carry the same shares, at least n of them
   secret. Nothing is certified for a removal that takes the share away too: in many coordinates
   the variance of the noise would tell.
2. A message is an integer vector of l2 norm at most Delta_2, all that one client sends in a round
   taken together. Shares are added after it is bounded, and are not clipped.
3. Each client that keeps to the protocol draws its share by itself with `draw_secret`, afresh for
   every round, and releases it through the secure sum alone. A round with fewer than
   N - dropouts messages is abandoned without being decrypted.
4. Who drops out does not depend on the messages or the shares. Clients that stay beyond the
   smallest number only add independent noise, which is post-processing.
5. Every client takes part in every round: no amplification by sampling is claimed.

Nothing wraps: a coordinate of a message plus its share is at most M + B in absolute value, and
their sum at most N (M + B); see `sum_bound`.
"""

from .sampling import draw as draw
from .sampling import draw_secret as draw_secret
from .shares import DiscreteGaussianShares as DiscreteGaussianShares
from .shares import SkellamShares as SkellamShares
from .tables import NoiseTable as NoiseTable

__all__ = ["DiscreteGaussianShares", "NoiseTable", "SkellamShares", "draw", "draw_secret"]
