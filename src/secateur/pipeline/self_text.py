"""Calibration text that the model itself writes, for when no corpus is at hand.

Williams, Chrysostomou, Aletras: Self-calibration for Language Model Quantization and Pruning, NAACL 2025,
https://arxiv.org/abs/2410.17170. Here every token is drawn at temperature 1 from all of the vocabulary. A row begins
with the config's beginning-of-text token, or with any token if it names none, and goes on beyond an end of text, as
rows of training text do. This is the one thing for which a model from disk is in memory as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError
from ..models.disk_host import DiskHost
from ..models.live_host import LiveHost, resident
from ..models.source import load_model
from ..progress import Progress
from .calibration import DEFAULT_SAMPLES, Tokens, calibration_tokens, check_draw, choose_seqlen
from .sources import SELF
from .stream import MICRO_BATCH_TOKENS

log = logging.getLogger("secateur")

CACHED_TOKENS = 16384  # of rows that are written at once: SmolLM2 keeps 46 kB for each, a 7B model up to 1 MB
CHECKED_TOKENS = 12


def tokens_for(
    host: DiskHost | LiveHost,
    calibration: Any,
    tokenizer: Any,
    samples: int | None,
    seqlen: int | None,
    seed: int,
    progress: Progress,
) -> Tokens:
    """Return the calibration rows for a model: its own text for ``self``, else as `calibration_tokens`."""
    if isinstance(calibration, str) and calibration == SELF:
        return self_generated(host, samples, seqlen, seed, progress)
    return calibration_tokens(calibration, tokenizer, host.model.config, samples, seqlen, seed)


def self_generated(
    host: DiskHost | LiveHost, samples: int | None, seqlen: int | None, seed: int, progress: Progress
) -> Tokens:
    """Let a model write calibration rows.

    A row depends on `seed`, `samples`, `seqlen` and its own place; rows that are written together are kept apart.

    Args:
        host: the model.
        samples: how many rows; None is 128.
        seqlen: tokens of a row; None is min(2048, context).
        seed: of the draws.
        progress: hears of every token.

    Raises:
        OptionError: `samples`, `seqlen` or `seed` is out of range.
        NumericsError: the model's predictions are not finite.
    """
    check_draw(samples, seed)
    config = host.model.config
    length = choose_seqlen(seqlen, config)
    generator = torch.Generator().manual_seed(seed)
    uniform_RT = torch.rand(samples or DEFAULT_SAMPLES, length, generator=generator, dtype=torch.float64)
    with _whole(host) as model, torch.no_grad():
        writer = _Writer(model, min(length, CHECKED_TOKENS))
        progress.start("writing calibration text", uniform_RT.numel())
        at_once = max(1, (CACHED_TOKENS if writer.caches else MICRO_BATCH_TOKENS) // length)
        rows = [row for part in uniform_RT.split(at_once) for row in writer.write(part, progress)]
        progress.finish()
    return Tokens(rows, SELF, uniform_RT.numel())


@contextmanager
def _whole(host: DiskHost | LiveHost) -> Iterator[Any]:
    """The whole model in memory for a while, on a CPU in float32."""
    on_cpu = host.device.type == "cpu"
    if isinstance(host, LiveHost):
        with resident(host.model.modules(), torch.float32 if on_cpu else None):
            yield host.model
        return
    checkpoint = host.checkpoint
    dtype = torch.float32 if on_cpu else "auto"
    yield load_model(checkpoint.directory, dtype, checkpoint.trust_remote_code).to(host.device).eval()


class _Writer:
    """A model that draws one token after another, with a cache if it can."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.config = model, model.config.get_text_config()
        self.vocabulary: int = self.config.vocab_size
        self.caches = self._caches_rightly(length)
        if not self.caches:
            log.info("calibration: this model writes without a cache of what it has read, which takes longer")

    def write(self, uniform_BT: Tensor, progress: Progress) -> Tensor:
        """Draw rows [B, T], each token by its number in [0, 1)."""
        ids_BT = torch.empty(uniform_BT.shape, dtype=torch.long)
        ids_BT[:, 0] = self._first(uniform_BT[:, 0])
        progress.advance(len(ids_BT))
        cache = None
        for end in range(1, ids_BT.shape[1]):
            logits_BV, cache = self._read(ids_BT[:, :end], cache)
            ids_BT[:, end] = draw(logits_BV, uniform_BT[:, end])
            progress.advance(len(ids_BT))
        return ids_BT

    def _first(self, uniform_B: Tensor) -> Tensor:
        token = self.config.bos_token_id
        if isinstance(token, int) and 0 <= token < self.vocabulary:
            return torch.full_like(uniform_B, token, dtype=torch.long)
        return (uniform_B * self.vocabulary).long()

    def _read(self, ids_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits [B, V] of the next token, and the cache of a model that has one."""
        known = {} if cache is None else {"past_key_values": cache}
        new = ids_BT if cache is None else ids_BT[:, -1:]
        out = self.model(input_ids=new.to(self.model.device), use_cache=self.caches, **known)
        return out.logits[:, -1, : self.vocabulary], getattr(out, "past_key_values", None) if self.caches else None

    def _caches_rightly(self, length: int) -> bool:
        """Whether the model predicts with its cache what it predicts without: a few families do not."""
        ids_BT = (torch.arange(2 * length).view(2, length) * 7 + 3) % self.vocabulary
        own_BTV = self.model(input_ids=ids_BT.to(self.model.device), use_cache=False).logits[..., : self.vocabulary]
        self.caches, cache = True, None
        rounding = (1e-3 if own_BTV.dtype == torch.float32 else 0.05) * float(own_BTV.abs().max())
        for end in range(1, length + 1):
            try:
                logits_BV, cache = self._read(ids_BT[:, :end], cache)
            except Exception:  # whatever the model's own code raises
                return False
            if cache is None or float((logits_BV - own_BTV[:, end - 1]).abs().max()) > rounding:
                return False
        return True


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return for each row the token [B] at which the sum of probabilities exceeds the row's number in [0, 1).

    >>> draw(torch.tensor([[0.5, 0.25, 0.25]] * 3).log(), torch.tensor([0.4, 0.6, 0.9], dtype=torch.float64)).tolist()
    [0, 1, 2]

    Raises:
        NumericsError: the logits hold NaN.
    """
    sums_BV = torch.softmax(logits_BV.double().cpu(), dim=-1).cumsum(-1)
    if sums_BV[:, -1].isnan().any():
        raise NumericsError("the model's predictions hold NaN or Inf; its weights are damaged")
    found_B1 = torch.searchsorted(sums_BV, uniform_B[:, None] * sums_BV[:, -1:], right=True)
    return found_B1[:, 0].clamp(max=sums_BV.shape[1] - 1)
