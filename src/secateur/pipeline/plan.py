"""What the user asked for -> a frozen plan: what happens to each matrix, and all that a rerun needs."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import OptionError, nearest
from ..models.formats import MAX_M
from ..models.hosts import Host, block_matrices
from ..models.matrices import unreadable
from ..pruning import NM, Method, Statistics, allocate, mean_sparsity, parse_method, parse_pattern
from ..pruning.allocation import MatrixInfo, Rules, default_target
from ..pruning.depth import check_target
from ..pruning.methods import Composition
from .calibration import Tokens
from .loop import Job, check_left_out
from .machine import software
from .presets import DEFAULT_METHOD
from .reconstruct import Reconstruction, with_enough_tokens
from .rules import CALIBRATED, allocation_name, allocation_rules
from .selection import of_matrices, select
from .stream import MICRO_BATCH_TOKENS

log = logging.getLogger("secateur")

MOST_THREADS = 1024
PROPAGATE = ("block", "dense", "sequential")
FORMATS = ("dense", "bitmask", "nm")
DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of one run, as `secateur.prune` documents them."""

    method: str | Method = DEFAULT_METHOD
    preset: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    calibration: Any = "c4"
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    allocation: str | Rules = "uniform"
    propagate: str = "block"
    reconstruct: bool | Reconstruction = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    evaluate: str | None = None
    trust_remote_code: bool = False
    format: str = "dense"
    values: str | None = None
    search: Mapping[str, Any] | None = None
    allocation_found: Mapping[str, Any] | None = None
    allocation_seconds: float = 0.0

    def check(self) -> None:
        """Raise OptionError for what can be refused before a model is opened."""
        for name in ("pattern", "evaluate", "include", "exclude"):
            value = getattr(self, name)
            if value is not None and "" in (value if isinstance(value, (list, tuple)) else [value]):
                raise OptionError(f"{name} is empty; leave it out or give a value")
        method = self.parsed_method
        target = default_target(self.sparsity, parse_pattern(self.pattern or method.pattern))
        if isinstance(self.method, str):
            example = torch.eye(8, dtype=torch.float32)  # running the method once checks its options
            method(example, Statistics.of(example), target.sparsity, target.pattern)
        written_dtype(self.dtype)
        if self.propagate not in PROPAGATE:
            raise OptionError(f"unknown propagate {self.propagate!r}: {nearest(self.propagate, PROPAGATE)}")
        if not isinstance(self.reconstruct, (bool, Reconstruction)):
            raise OptionError(f"reconstruct {self.reconstruct!r}: is True, False or a secateur.Reconstruction")
        if self.reconstruction:
            self.reconstruction.check()
            if self.propagate != "block":
                raise OptionError(f"reconstruct (and preset best) goes with propagate block, not {self.propagate}")
        check_format(self.format, self.values)
        if self.format == "nm" and not (isinstance(target.pattern, NM) and target.pattern.m <= MAX_M):
            raise OptionError(f"format nm: holds N:M patterns with M up to {MAX_M}, not {target.pattern}; use bitmask")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise OptionError(f"threads {self.threads}: at least 1 is needed, and {MOST_THREADS} are the most")
        for name in ("include", "exclude"):
            for text in listed(getattr(self, name)):
                try:
                    re.compile(text)
                except re.error as error:
                    raise OptionError(f"{name} {text!r} is no regular expression ({error})") from None
        if allocation := allocation_name(self.allocation):
            check_target(allocation, target)
        else:
            allocation_rules(self.allocation)

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens are needed: by the method, to reconstruct, or by the allocation."""
        return bool(self.parsed_method.needs or self.reconstruct) or allocation_name(self.allocation) in CALIBRATED

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How blocks are to be reconstructed; None if they are not."""
        how = Reconstruction() if self.reconstruct is True else self.reconstruct or None
        return replace(how, seed=self.seed) if how and how.seed is None else how

    @property
    def parsed_method(self) -> Method:
        """The method, parsed if it is a name."""
        return self.method if isinstance(self.method, Method) else parse_method(self.method)


@dataclass(frozen=True)
class Plan:
    """A request, resolved for one model: what happens to each matrix, and the record of it.

    Attributes:
        job: what the loop is to do.
        matrices: that were selected.
        unreadable: fused weights that were selected too and stay dense, because their layout is unknown.
        record: the frozen plan, as it is written.
        allocation_seconds: what finding the allocation took.
    """

    job: Job
    matrices: list[MatrixInfo]
    unreadable: list[MatrixInfo]
    record: dict[str, Any]
    allocation_seconds: float

    @property
    def mean_sparsity(self) -> float:
        """Mean of the targets, weighted by the matrices' weights."""
        return mean_sparsity(self.matrices, self.job.targets)


def make_plan(request: Request, host: Host, model: Mapping[str, Any], tokens: Tokens | None) -> Plan:
    """Resolve a request for a model.

    Args:
        request: the options; already checked.
        host: the model, for its matrices.
        model: name and digest, for the record.
        tokens: the calibration tokens, or None for a method that needs none.

    Raises:
        OptionError: include, exclude or allocation do not fit the model.
    """
    method = request.parsed_method
    default = default_target(request.sparsity, parse_pattern(request.pattern or method.pattern))
    every: list[MatrixInfo] = []
    closed: set[str] = set()
    for index, block in enumerate(host.skeleton.real):
        every += [MatrixInfo(name, index, matrix.weights) for name, matrix in block_matrices(host, index).items()]
        fused = unreadable(block, f"{host.skeleton.path}.{index}")
        every += [MatrixInfo(name, index, weights) for name, weights in fused.items()]
        closed |= fused.keys()
    others = [name for name, _ in host.model.named_modules() if name not in {matrix.name for matrix in every}]
    chosen = select(every, listed(request.include), listed(request.exclude), others)
    check_left_out(
        closed & {m.name for m in chosen},
        {m.name: m.weights for m in chosen},
        "a fused weight that transformers does not run through its experts interface, so its layout is unknown",
    )
    rules = of_matrices(allocation_rules(request.allocation), every, others)
    how = with_enough_tokens(request.reconstruction, tokens.rows if tokens else ())
    record = {
        "model": dict(model),
        "preset": request.preset,
        "method": request.method if isinstance(request.method, str) else method_name(method),
        "pattern": str(default.pattern),
        "sparsity": default.sparsity,
        "calibration": None if tokens is None else calibration_record(tokens, request.seed),
        "allocation": "uniform" if rules is None else (dict(rules) if isinstance(rules, Mapping) else list(rules)),
        "allocation_found": request.allocation_found,
        "propagate": request.propagate,
        "reconstruct": None if how is None else asdict(how),
        "include": listed(request.include),
        "exclude": listed(request.exclude),
        "format": request.format,
        "values": request.values,
        "dtype": request.dtype,
        "device": str(host.device),
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": how.batch_tokens if how else MICRO_BATCH_TOKENS,
        "evaluate": {"source": request.evaluate, "seqlen": request.seqlen} if request.evaluate else None,
        "search": request.search,
        "software": software(),
    }
    readable = [m for m in chosen if m.name not in closed]
    targets = allocate(readable, default, rules)
    job = Job(method, targets, request.propagate, reconstruct=how)
    return Plan(job, readable, [m for m in chosen if m.name in closed], record, request.allocation_seconds)


def announce(plan: Plan) -> None:
    """Say before the work begins what is going to be pruned, and what that is known to cost."""
    if plan.record["preset"]:
        found = plan.record["allocation_found"]
        after = f", allocation {found['name']}" if found else ""
        after += ", blocks reconstructed" if plan.record["reconstruct"] else ""
        log.info("preset %s: method %s%s", plan.record["preset"], plan.record["method"], after)
    if plan.record["allocation"] != "uniform":
        for block in sorted({m.block for m in plan.matrices}):
            inside = [m for m in plan.matrices if m.block == block]
            spread = sorted({f"{t.sparsity:g} ({t.pattern})" for t in (plan.job.targets[m.name] for m in inside)})
            log.info(
                "block %d: mean sparsity %.4f: %s", block, mean_sparsity(inside, plan.job.targets), ", ".join(spread)
            )
        log.info("mean sparsity of all pruned matrices: %.4f", plan.mean_sparsity)
    weights = sum(m.weights for m in plan.matrices)
    pattern = parse_pattern(plan.record["pattern"])
    if isinstance(pattern, NM) and pattern.m <= 4 and plan.mean_sparsity >= 0.5 and weights < 1e9:
        log.warning(
            "pattern %s below 1 billion weights costs much quality: SmolLM2-135M goes from perplexity 29 to 102 with "
            "wanda+pcg and 64 with --preset best at 2:4, to 63 and 50 at 8:16 (WikiText-2, window 512)",
            pattern,
        )
    elif not isinstance(pattern, NM) and round(plan.mean_sparsity, 6) > 0.6:
        log.warning(
            "sparsity %.2f in one shot costs much quality: LLaMA-2-7B goes from perplexity 5.5 to 10.8 with Wanda "
            "and 9.4 with ALPS at 0.6, and to 76 and 19 at 0.7 (published, WikiText-2, window 2048)",
            plan.mean_sparsity,
        )


def calibration_record(tokens: Tokens, seed: int) -> dict[str, Any]:
    """What identifies calibration tokens."""
    return {
        "source": tokens.source,
        "samples": len(tokens.rows),
        "seqlen": tokens.seqlen,
        "tokens": tokens.tokens,
        "seed": seed,
        "digest": tokens.digest,
    }


def method_name(method: Method) -> str:
    """A caller's own method, by its function's name, and the stages that follow it."""
    if isinstance(method.prune, Composition):
        stages = [name + option_text(options) for name, options in method.prune.stages]
        return "+".join([method_name(method.prune.method), *stages])
    function = inspect.unwrap(method.prune)
    return getattr(function, "__qualname__", type(function).__name__) + option_text(method.options)


def option_text(options: Mapping[str, Any]) -> str:
    """Options as a method's text has them."""
    return "".join(f":{key}={value}" for key, value in sorted(options.items()))


def listed(texts: str | Sequence[str]) -> list[str]:
    """One text or several, as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def check_format(format: str, values: str | None) -> None:
    """Raise OptionError for an unknown format, or values that it does not have."""
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}: {nearest(format, FORMATS)}")
    if values is not None and values != "int8":
        raise OptionError(f"unknown values {values!r}: int8, or leave it out to keep them exactly")
    if values is not None and format == "dense":
        raise OptionError("values int8: a dense checkpoint keeps its values; use --format bitmask or nm")


def written_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of written tensors; None for the source's.

    Raises:
        OptionError: the name is unknown.
    """
    if name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}: {nearest(name, DTYPES)}")
    return DTYPES[name]
