"""What the user asked `shrink` for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, nearest
from ..pipeline.plan import MOST_THREADS, PROPAGATE, written_dtype
from ..pruning import Method
from ..pruning.structured import structured
from . import depth

OF = ("heads", "neurons", "layers")
SHRINK = "shrink"  # in the place of a method's name
OPTIONS = ("of", "criterion", "depth", "compensate", "round", "propagate")  # which may follow it
ANSWERS = {"yes": True, "no": False}


@dataclass(frozen=True, kw_only=True)
class ShrinkRequest:
    """The options of one cut, as `secateur.shrink` documents them."""

    neurons: float | None = None
    heads: float | None = None
    layers: int | str | Sequence[int] | None = None
    experts: float | None = None
    target: float | None = None
    of: str | Sequence[str] = ("heads", "neurons")
    round: int = 64
    criterion: str = "obs"
    depth: str = "kl"
    compensate: bool = True
    calibration: Any = "c4"
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    propagate: str = "sequential"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    evaluate: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise OptionError for what can be refused before a model is opened."""
        given = [
            name for name in ("neurons", "heads", "layers", "experts", "target") if getattr(self, name) is not None
        ]
        if not given:
            raise OptionError("nothing to remove: give neurons, heads, layers, experts or target")
        if self.target is not None and len(given) > 1:
            raise OptionError(f"target and {given[0]}: target decides alone how much goes; leave one of them out")
        for name in ("neurons", "heads", "experts", "target"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < 1):
                shown = f"{value:g}" if isinstance(value, (int, float)) else repr(value)
                raise OptionError(f"{name} {shown}: a fraction that goes, between 0 and 1")
        if self.round < 1:
            raise OptionError(f"round {self.round}: at least 1")
        if not self.parts:
            raise OptionError(f"of is empty: {nearest('', OF)}")
        for part in self.parts:
            if part not in OF:
                raise OptionError(f"unknown part {part!r}: {nearest(part, OF)}")
        if "layers" in self.parts and len(self.parts) > 1:
            raise OptionError("of layers: stands alone; give --layers and --target in two runs for both")
        if self.depth not in depth.BY:
            raise OptionError(f"unknown depth {self.depth!r}: {nearest(self.depth, depth.BY)}")
        structured(self.criterion, compensated=self.compensate)
        if self.propagate not in PROPAGATE:
            raise OptionError(f"unknown propagate {self.propagate!r}: {nearest(self.propagate, PROPAGATE)}")
        written_dtype(self.dtype)
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise OptionError(f"threads {self.threads}: at least 1 is needed, and {MOST_THREADS} are the most")
        self.wanted_layers()

    @property
    def parts(self) -> list[str]:
        """What `target` may take from."""
        return sorted(part.strip() for part in (self.of.split(",") if isinstance(self.of, str) else self.of))

    @property
    def method(self) -> Method:
        """The method that chooses neurons and heads."""
        return structured(self.criterion, compensated=self.compensate, seed=self.seed)

    def wanted_layers(self) -> int | list[int] | None:
        """How many layers go, or which.

        Raises:
            OptionError: neither a number nor a list of numbers.
        """
        if self.layers is None or isinstance(self.layers, int):
            return self.layers
        listed = not isinstance(self.layers, str) or "," in self.layers
        parts = self.layers.removesuffix(",").split(",") if isinstance(self.layers, str) else self.layers
        try:
            numbers = sorted({int(part) for part in parts})
        except (TypeError, ValueError):
            numbers = []
        if not numbers:
            raise OptionError(f"layers {self.layers!r}: a number of layers, or a list of their numbers (3,5 or 3,)")
        return numbers if listed else numbers[0]

    @property
    def _finds_layers(self) -> bool:
        return isinstance(self.wanted_layers(), int) or (self.target is not None and self.parts == ["layers"])

    @property
    def _splits(self) -> bool:
        return self.target is not None and self.parts != ["layers"]

    @property
    def _narrows(self) -> bool:
        return self.neurons is not None or self.heads is not None or self._splits

    @property
    def needs_tokens(self) -> bool:
        """Whether anything is to be observed."""
        return (
            self.experts is not None
            or (self._finds_layers and self.depth != "random")
            or (self._narrows and bool(self.method.needs))
            or (self._splits and len(self.parts) > 1)
        )

    @property
    def by_chance(self) -> bool:
        """Whether the seed decides what goes, and not only which text is read."""
        return (self._finds_layers and self.depth == "random") or (self._narrows and self.criterion == "random")

    @property
    def record(self) -> dict[str, Any]:
        """The options that decide the result, for the plan."""
        left_out = ("calibration", "samples", "seqlen", "device", "threads", "evaluate", "trust_remote_code")
        found = {name: value for name, value in vars(self).items() if name not in left_out}
        return found | {"layers": self.wanted_layers(), "of": self.parts}


def parse_shrink(text: str) -> dict[str, Any]:
    """Read ``shrink[:OPTION=VALUE]...``, which stands in the place of a pruning method, as options of a request.

    Parts of ``of`` are joined by ``+``, since commas separate methods.

    >>> parse_shrink("shrink:compensate=no:of=neurons+heads")
    {'compensate': False, 'of': ['heads', 'neurons']}

    Raises:
        OptionError: an option is unknown, or a value does not fit; `ShrinkRequest.check` looks at the rest.
    """
    name, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in OPTIONS or not equals:
            hint = nearest(key, OPTIONS)
            raise OptionError(f"method {name!r}: cannot read option {pair!r} (OPTION=VALUE); {hint}")
        options[key] = _value(key, value)
    return options


def _value(key: str, value: str) -> Any:
    if key == "of":
        if "," in value:
            raise OptionError(f"method {SHRINK!r}: of takes parts joined by +, such as heads+neurons, not {value!r}")
        return sorted(set(value.split("+")))
    if key == "compensate":
        if value not in ANSWERS:
            raise OptionError(f"method {SHRINK!r}: compensate takes yes or no, not {value!r}")
        return ANSWERS[value]
    if key == "round":
        try:
            return int(value)
        except ValueError:
            raise OptionError(f"method {SHRINK!r}: round takes int, not {value!r}") from None
    return value
