"""[schedule] and [compression]: when the server waits for whom, and how messages are shortened."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import Count, NotNegative, Positive, Section

ScheduleName = Literal["synchronous", "deadline", "buffered", "streaming", "decoupled"]
CodecName = Literal[
    "identity",
    "rotation",
    "random-mask",
    "turn-mask",
    "top-mask",
    "sketch",
    "power-sgd",
    "fragment",
]


class ScheduleSection(Section):
    """[schedule]: when the server waits for whom, in virtual time.

    | name | what | keys |
    |---|---|---|
    | synchronous | the server waits for every cloud | |
    | deadline | it takes what is there in time, if a quorum is | seconds, quorum, grace_seconds |
    | buffered | each so many messages make a step (FedBuff) | size, staleness_exponent |
    | streaming | clouds keep replicas and exchange one fragment after the other (DiLoCo) | \
fragments, overlap, mixing |
    | decoupled | nobody waits: a quorum of fragments makes a step | quorum, grace_seconds, \
fragments, mixing |

    Without `grace_seconds`, deadline waits for its quorum for ever, and decoupled until waiting
    would cost a cloud a message.
    """

    name: ScheduleName = "synchronous"
    seconds: Positive | None = None
    quorum: Count | None = None
    grace_seconds: NotNegative | None = None
    size: Count | None = None
    staleness_exponent: NotNegative | None = None
    fragments: Count | None = None
    overlap: bool | None = None
    mixing: Annotated[float, Field(ge=0, lt=1)] | None = None


# Keys that each schedule needs, and those that it may have besides.
_SCHEDULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "synchronous": ((), ()),
    "deadline": (("seconds", "quorum"), ("grace_seconds",)),
    "buffered": (("size",), ("staleness_exponent",)),
    "streaming": ((), ("fragments", "overlap", "mixing")),
    "decoupled": (("quorum",), ("grace_seconds", "fragments", "mixing")),
}


class CompressionSection(Section):
    """[compression]: how messages are shortened before they are summed, encrypted or not.

    | key | what |
    |---|---|
    | codec | a linear map that all clouds share; `compression/README.md` compares them |
    | one_in | of masks and the sketch: so many numbers become one |
    | rank | of power-sgd |
    | fragments | of fragment: in how many parts the layers take turns |
    | explore | of top-mask: the part of the mask that is drawn at random |
    | rotate | a rotation comes after the codec, so that few bits do |
    | error_feedback | what does not arrive is added to the cloud's next message |
    | rounding | nearest, or stochastic to the few bits of [secure] bits |
    | broadcast | adapter, 4 bytes a number; or sum: the opened sum in its own bits |
    """

    codec: CodecName = "identity"
    one_in: Annotated[int, Field(ge=2)] | None = None
    rank: Count | None = None
    fragments: Count | None = None
    explore: Annotated[float, Field(ge=0, le=1)] | None = None
    rotate: bool = False
    error_feedback: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    broadcast: Literal["adapter", "sum"] = "adapter"


# The settings of each codec.
CODEC_KEYS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "rotation": (),
    "random-mask": ("one_in",),
    "turn-mask": ("one_in",),
    "top-mask": ("one_in", "explore"),
    "sketch": ("one_in",),
    "power-sgd": ("rank",),
    "fragment": ("fragments",),
}


def check_schedule(schedule: ScheduleSection, clouds: int) -> None:
    """Refuses keys that a schedule needs and has not, or has and does not read.

    Args:
      schedule: the section.
      clouds: how many there are.
    """
    needed, free = _SCHEDULES[schedule.name]
    for key in needed:
        if getattr(schedule, key) is None:
            raise problem(("schedule",), f'name = "{schedule.name}" needs {key}; set it', got=False)
    _check_unread("schedule", schedule, "name", schedule.name, _SCHEDULES, (*needed, *free))
    for key in ("quorum", "size"):
        value = getattr(schedule, key)
        if value is not None and value > clouds:
            raise problem(("schedule", key), f"must be at most {clouds}, the number of clouds")


def check_compression(compression: CompressionSection | None, bits: int | None) -> None:
    """Refuses settings that the codec does not read, and rounding at random to many bits.

    Args:
      compression: the section, if there is one.
      bits: [secure] bits.
    """
    if compression is None:
        return
    own = CODEC_KEYS[compression.codec]
    _check_unread("compression", compression, "codec", compression.codec, CODEC_KEYS, own)
    if compression.rotate and compression.codec in ("identity", "rotation"):
        raise problem(
            ("compression", "rotate"),
            f'goes after another codec, not after "{compression.codec}"; remove it, or use '
            'codec = "rotation"',
            got=False,
        )
    if compression.rounding == "stochastic" and (bits is None or bits > 16):
        raise problem(
            ("compression", "rounding"),
            "at random is for few bits; set [secure] bits to 16 or fewer, such as 8",
            got=False,
        )


def _check_unread(
    section: str,
    values: Section,
    chooser: str,
    chosen: str,
    table: Mapping[str, object],
    read: tuple[str, ...],
) -> None:
    """Raises for a key that is set and that what was chosen does not read."""
    optional = {name for name, field in type(values).model_fields.items() if field.default is None}
    for key in sorted(optional - set(read)):
        if getattr(values, key) is not None:
            others = [name for name, keys in table.items() if key in str(keys)]
            raise problem(
                (section, key),
                f'goes with {chooser} = {" or ".join(others)}, not with "{chosen}"; remove it',
                got=False,
            )
