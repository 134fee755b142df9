"""[secure]: how updates are summed, and which settings would protect nobody."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedjax_llm.runs.sections.problem import problem
from fedjax_llm.runs.sections.types import (
    BUILTIN_PREFIX,
    Count,
    MappingSection,
    Positive,
    Section,
    Text,
    Texts,
    check_sources,
)

MAP_FORMATS = (".npy", ".safetensors")


class SelectiveSection(Section):
    """[secure.selective]: encrypt a part of each update; the rest travels in the clear.

    What is encrypted is chosen by `layers`, shell-style patterns over the names of trained
    parameters such as `layers.3.self_attn.o_proj.lora_B`, or by `fraction`: the most sensitive
    parameters by a `map` from a file, or by one measured on the sources of `measure_on`.

    It makes the uploads of bfv and ckks smaller. With masked and threshold a parameter in the clear
    takes as many bytes as a hidden one, and there is nothing to gain but time.

    Everybody can see which parameters are encrypted. So the map must follow from public data: one
    that was measured on private data tells about them, and no epsilon covers that.
    """

    layers: Texts | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    map: Text | None = None
    measure_on: Texts | None = None
    measure_rows: Count = 64
    mapping: MappingSection | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.layers is None) == (self.fraction is None):
            given = "neither" if self.layers is None else "both"
            raise problem((), f"[secure.selective] takes either layers or fraction, {given} given")
        if self.layers is not None:
            for key in ("map", "measure_on", "mapping"):
                if getattr(self, key) is not None:
                    raise problem(
                        (key,), "goes with fraction, not with layers; remove it", got=False
                    )
            return self
        if (self.map is None) == (self.measure_on is None):
            given = "neither" if self.map is None else "both"
            raise problem(
                (),
                "[secure.selective] fraction needs either map, a file, or measure_on, public text; "
                f"{given} given",
            )
        if self.map is not None:
            if self.mapping is not None:
                raise problem(
                    ("mapping",), "goes with measure_on, not with map; remove it", got=False
                )
            if not self.map.endswith(MAP_FORMATS):
                raise problem(("map",), f"must be a file in {' or '.join(MAP_FORMATS)} format")
        if self.measure_on is not None:
            check_sources(("measure_on",), self.measure_on, self.mapping)
        return self


class SecureSection(Section):
    """[secure]: how the updates are summed.

    | sum | the server reads | what it takes to open a sum |
    |---|---|---|
    | plain | every update | nothing |
    | masked | the sum: masks cancel in it | `threshold` clouds, to mend the masks of others |
    | threshold | the sum: ring-LWE, fast | any `threshold` clouds |
    | bfv | the sum: OpenFHE alone, exact | any `threshold` clouds |
    | ckks | the sum: OpenFHE alone, approximate | any `threshold` clouds |

    All end in the same bytes; for ckks the run prints error and caveat. `threshold` left out is
    more than half of the clouds, and in mode masked it must be that. No sum of fewer than
    `minimum_clients` is opened, 2 if left out. Neither has an effect with plain. `update_bound` is
    the largest l2 norm of one client's update; larger ones are clipped to it, which proves that
    the fixed-point sum cannot overflow. `bits` left out lets the run choose.
    """

    sum: Literal["plain", "masked", "threshold", "bfv", "ckks"] = "plain"
    threshold: Count | None = None
    minimum_clients: Count | None = None
    bits: Annotated[int, Field(ge=4, le=24)] | None = None
    update_bound: Positive = 1.0
    selective: SelectiveSection | None = None


def check_secure(secure: SecureSection, clouds: int, unit: str, noise_multiplier: float) -> None:
    """Refuses settings under which a sum would not hide what it is asked to hide.

    Args:
      secure: the section.
      clouds: how many there are.
      unit: [privacy] unit.
      noise_multiplier: [privacy] noise_multiplier.
    """
    if secure.sum == "plain":
        # A threshold may stay, so that one `--set secure.sum=plain` compares the two.
        if secure.selective is not None:
            raise problem(
                ("secure", "selective"),
                'means nothing with sum = "plain", which encrypts nothing; remove it',
                got=False,
            )
        return
    if clouds < 2:
        raise problem(
            ("secure", "sum"),
            "needs at least 2 clouds to share the key, the run has 1"
            if secure.sum != "masked"
            else "needs at least 2 clouds to mask each other, the run has 1",
        )
    _check_threshold(secure, clouds)
    if secure.minimum_clients is not None:
        if secure.minimum_clients < 2:
            raise problem(
                ("secure", "minimum_clients"),
                f"must be between 2 and {clouds}: the sum of one cloud is its update",
                refused=True,
            )
        if secure.minimum_clients > clouds:
            raise problem(
                ("secure", "minimum_clients"),
                f"must be between 2 and {clouds}, the number of clouds",
            )
    if secure.selective is not None:
        _check_selective(unit, noise_multiplier)


def _check_threshold(secure: SecureSection, clouds: int) -> None:
    threshold, least = secure.threshold, 2
    if threshold is None:
        return
    if secure.sum == "masked":
        least = clouds // 2 + 1
    if threshold > clouds:
        raise problem(
            ("secure", "threshold"), f"must be between {least} and {clouds}, the number of clouds"
        )
    if threshold < 2:
        raise problem(
            ("secure", "threshold"),
            f"must be between {least} and {clouds}: with 1, every cloud could decrypt alone",
            refused=True,
        )
    if threshold < least:
        raise problem(
            ("secure", "threshold"),
            f'must be between {least} and {clouds} with sum = "masked": two groups of half the '
            "clouds could unmask two sums, whose difference is an update",
            refused=True,
        )


def _check_selective(unit: str, noise_multiplier: float) -> None:
    why = {
        "none": "without noise the server would read exact values in what stays in the clear",
        "client": "the noise of unit client is added after the sum, so that the server would read "
        "exact values in what stays in the clear",
    }
    if unit in why:
        raise problem(
            ("secure", "selective"),
            f'needs [privacy] unit = "example" or "user", got "{unit}": {why[unit]}',
            refused=True,
            got=False,
        )
    if noise_multiplier == 0:
        raise problem(
            ("secure", "selective"),
            "needs [privacy] noise_multiplier above 0: what stays in the clear has no other cover",
            refused=True,
            got=False,
        )


def private_source(
    selective: SelectiveSection, private: Mapping[str, Sequence[str]]
) -> tuple[int, str] | None:
    """The first of the sources to measure on that holds, or lies in, a cloud's own files.

    Embedded corpora are public whoever trains on them.

    Args:
      selective: with absolute paths.
      private: absolute sources by cloud.

    Returns:
      Its place in `measure_on` and the cloud's name; None if there is none.
    """
    for index, source in enumerate(selective.measure_on or ()):
        if source.startswith(BUILTIN_PREFIX):
            continue
        public = Path(source)
        for cloud, sources in private.items():
            for path in (Path(own) for own in sources if not own.startswith(BUILTIN_PREFIX)):
                if path == public or path in public.parents or public in path.parents:
                    return index, cloud
    return None
