"""The choices of a policy loss by name, and their checks. The numbers are those of csrc/formulas.h."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels import segments

LOG_RATIO_BOUND = 20.0  # nats beyond which a log-ratio is cut off, so that no ratio overflows
HIGHEST_TAU, TAU_RULE = 40.0, "1e-6 to 40"

# Every metric is a sum over unmasked tokens, but for `sequences`: sequences with an unmasked token.
METRICS = (
    "tokens",
    "sequences",
    "ratio_sum",
    "log_ratio_sum",
    "clipped_low",
    "clipped_high",
    "dual_clipped",
    "kl_sum",
    "sampler_weight_sum",
    "sampler_masked",
    "covariance_selected",
)
FIELDS = 1 + len(METRICS)  # the loss, then the metrics


class Surrogate(IntEnum):
    """What a token's loss is."""

    PPO = 0
    CISPO = 1
    SAPO = 2
    GPG = 3
    CLIP_COV = 4
    KL_COV = 5


class Kl(IntEnum):
    """How the KL to the reference is estimated; a + has the gradient of k2."""

    NONE = 0
    K1 = 1
    K2 = 2
    K3 = 3
    K1_PLUS = 4
    K3_PLUS = 5


class Correction(IntEnum):
    """How the sampler's own log-probabilities are corrected for."""

    NONE = 0
    TOKEN_TRUNCATE = 1
    TOKEN_MASK = 2
    SEQUENCE_TRUNCATE = 3
    SEQUENCE_MASK = 4


LEVELS = ("token", "sequence")
SURROGATES = {kind.name.lower(): kind for kind in Surrogate} | {"reinforce": Surrogate.GPG}
KLS = {kind.name.lower().replace("_plus", "+"): kind for kind in Kl}
CORRECTIONS = {kind.name.lower(): kind for kind in Correction}
BY_COVARIANCE = (Surrogate.CLIP_COV, Surrogate.KL_COV)


class Inputs(NamedTuple):
    """Packed tokens: `[T]` each, but for advantages `[N]` or `[T]` and offsets `[N+1]`; selected is bool."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    offsets: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    selected: Tensor | None

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.logprobs.numel()

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return self.offsets.numel() - 1

    @property
    def per_token(self) -> bool:
        """Whether there is an advantage for each token; where N is T there is one for each sequence."""
        return self.advantages.numel() != self.sequences

    def cast(self, dtype: torch.dtype) -> Inputs:
        """The same in one dtype; only the log-probs of the policy in training keep their gradient."""
        logprobs, old, advantages, weights, offsets, ref, sampler, selected = self
        return Inputs(
            segments.cast(logprobs, dtype),
            segments.constant(old, dtype),
            segments.constant(advantages, dtype),
            segments.constant(weights, dtype),
            offsets,
            None if ref is None else segments.constant(ref, dtype),
            None if sampler is None else segments.constant(sampler, dtype),
            selected,
        )

    def contiguous(self) -> Inputs:
        """The same with every tensor contiguous."""
        return Inputs(*(None if values is None else values.contiguous() for values in self))  # type: ignore[arg-type]

    def addresses(self) -> tuple[int, ...]:
        """Addresses in the order of the native modules, 0 for what is absent."""
        ordered = (*self[:4], self.ref_logprobs, self.sampler_logprobs, self.selected, self.offsets)
        return tuple(map(segments.address, ordered))


class Kinds(NamedTuple):
    """What is computed; `level` 1 is by sequence."""

    surrogate: int
    level: int
    kl: int
    correction: int


class Numbers(NamedTuple):
    """What it is computed with, in the order of `PolicyNumbers` in csrc/formulas.h."""

    clip_low: float
    clip_high: float
    dual_clip: float
    tau_pos: float
    tau_neg: float
    covariance_coef: float
    kl_coef: float
    sampler_floor: float
    sampler_cap: float


def whole_sequences(kinds: Kinds) -> bool:
    """Whether an option works on whole sequences."""
    return kinds.level == 1 or kinds.correction >= Correction.SEQUENCE_TRUNCATE


def make_kinds(surrogate: str, level: str, kl: str, correction: str) -> Kinds:
    """The choices behind four names.

    Raises:
        ValueError: an unknown name; the message says which are allowed.
    """
    segments.choice("surrogate", surrogate, SURROGATES)
    segments.choice("level", level, LEVELS)
    segments.choice("kl", kl, KLS)
    segments.choice("sampler_correction", correction, CORRECTIONS)
    return Kinds(int(SURROGATES[surrogate]), LEVELS.index(level), int(KLS[kl]), int(CORRECTIONS[correction]))


def _within(name: str, value: float, low: float, high: float, rule: str) -> float:
    if not (low <= value <= high and -math.inf < value < math.inf):
        raise ValueError(f"{name} is {value}; allowed: {rule}")
    return float(value)


def make_numbers(
    kinds: Kinds,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    taus: tuple[float, float],
    covariance_coef: float,
    kl_coef: float,
    sampler_floor: float | None,
    sampler_cap: float,
) -> Numbers:
    """Builds checked `Numbers`; no dual clip is infinite, and no floor is 1 / cap.

    Raises:
        ValueError: a number out of its range, or a dual clip beside a surrogate that has none.
    """
    if dual_clip is not None:
        if kinds.surrogate != Surrogate.PPO:
            raise ValueError(f"dual_clip is {dual_clip}; allowed: None, or a number above 1 with surrogate 'ppo'")
        _within("dual_clip", dual_clip, math.nextafter(1.0, 2.0), math.inf, "None, or a finite number above 1")
    cap = _within("sampler_cap", sampler_cap, 1e-30, math.inf, "a finite number above 0")
    floor = min(1 / cap, cap) if sampler_floor is None else sampler_floor
    return Numbers(
        _within("clip_low", clip_low, 0, math.inf, "a finite number, 0 or above"),
        _within("clip_high", clip_high, 0, math.inf, "a finite number, 0 or above"),
        math.inf if dual_clip is None else float(dual_clip),
        _within("sapo_tau_pos", taus[0], 1e-6, HIGHEST_TAU, TAU_RULE),
        _within("sapo_tau_neg", taus[1], 1e-6, HIGHEST_TAU, TAU_RULE),
        _within("covariance_coef", covariance_coef, -math.inf, math.inf, "a finite number"),
        _within("kl_coef", kl_coef, -math.inf, math.inf, "a finite number"),
        _within("sampler_floor", floor, 0, cap, "0 to sampler_cap"),
        cap,
    )


def check_companion(name: str, values: Tensor | None, needed: bool, because: str) -> None:
    """Raises where an optional tensor is missing though needed, or given though unused."""
    if needed != (values is not None):
        given = "missing" if values is None else "given"
        raise ValueError(f"{name} is {given}; {because} needs {'it' if needed else 'none'}")


def check_companions(
    kinds: Kinds, kl: str, correction: str, surrogate: str, ref: Tensor | None, sampler: Tensor | None, selected: bool
) -> None:
    """Raises where a choice lacks the tensor that it needs, or has one that it does not use."""
    check_companion("ref_logprobs", ref, kinds.kl != Kl.NONE, f"kl {kl!r}")
    corrects = kinds.correction != Correction.NONE
    check_companion("sampler_logprobs", sampler, corrects, f"sampler_correction {correction!r}")
    if selected and kinds.surrogate not in BY_COVARIANCE:
        raise ValueError(f"covariance_selected is given; surrogate {surrogate!r} needs none")


def check_selected(selected: Tensor | None, like: Tensor) -> None:
    """Raises where a selection is not one bool per token."""
    if selected is not None:
        segments.check_tensor("covariance_selected", selected)
    if selected is not None and (selected.dtype != torch.bool or selected.shape != like.shape):
        shape = f"{selected.dtype} of shape {list(selected.shape)}"
        raise ValueError(f"covariance_selected is {shape}; allowed: torch.bool of shape {list(like.shape)}")
    if selected is not None and selected.device != like.device:
        given = f"covariance_selected is on {selected.device}"
        raise ValueError(f"{given}; allowed: {like.device}, where the other inputs are")


def check_token_shapes(logprobs: Tensor, advantages: Tensor, offsets: Tensor, **per_token: Tensor | None) -> None:
    """Raises where the tensors do not fit together, without reading values."""
    segments.check_vector("logprobs", logprobs)
    segments.check_offsets("sequence_offsets", offsets, logprobs)
    for name, values in per_token.items():
        if values is not None:
            segments.check_vector(name, values, logprobs, logprobs.numel())
    segments.check_vector("advantages", advantages, logprobs)
    sequences, tokens = offsets.numel() - 1, logprobs.numel()
    if advantages.numel() != sequences and advantages.numel() != tokens:  # `not in` is evaluated wrongly by dynamo
        raise ValueError(
            f"advantages has {advantages.numel()} elements; "
            f"allowed: {sequences}, one per sequence, or {tokens}, one per token"
        )


def _check_kept(name: str, values: Tensor, bad: Tensor, offsets: Tensor, allowed: str) -> None:
    where = bad.nonzero()
    if where.numel():
        i = int(where[0])
        sequence = int(torch.searchsorted(offsets, i, right=True)) - 1
        raise ValueError(f"{name}[{i}] is {float(values[i].detach()):g} (sequence {sequence}); allowed: {allowed}")


def check_token_values(given: Inputs, kinds: Kinds) -> None:
    """Raises at the first value of an unmasked token that is not allowed, saying where; waits for the device."""
    logprobs, old_logprobs, advantages, weights, offsets, ref_logprobs, sampler_logprobs, _ = given
    segments.check_offset_values("sequence_offsets", offsets, logprobs.numel())
    _check_kept("weights", weights, ~weights.isfinite(), offsets, "finite")
    keep = weights != 0
    per_token = advantages
    if not given.per_token:
        per_token = advantages[segments.segment_ids(offsets, logprobs.numel())]
    bad = keep & ~per_token.isfinite()
    if advantages is per_token:
        _check_kept("advantages", advantages, bad, offsets, "finite")
    elif bad.any():
        i = int(torch.searchsorted(offsets, int(bad.nonzero()[0]), right=True)) - 1
        raise ValueError(f"advantages[{i}] is {float(advantages[i]):g}; allowed: finite")
    finite = kinds.surrogate in (Surrogate.CISPO, Surrogate.GPG)
    for name, values in dict(
        logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, sampler_logprobs=sampler_logprobs
    ).items():
        if values is not None:
            strict = finite and name == "logprobs"
            bad = keep & (~values.isfinite() if strict else ~(values < math.inf))
            rule = "finite, because the surrogate multiplies by it" if strict else "below inf, -inf included"
            _check_kept(name, values, bad, offsets, rule)
    if ref_logprobs is not None and kinds.kl != Kl.K3:
        gap = ref_logprobs - logprobs
        bad = keep & (ref_logprobs != logprobs) & ~gap.isfinite()
        rule = "a finite distance from logprobs; k3 alone bounds it"
        _check_kept("ref_logprobs", ref_logprobs, bad, offsets, rule)
