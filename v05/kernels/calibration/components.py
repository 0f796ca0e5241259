"""The mixture that calibrated fusion fits: how strong a prior may be. The numbers are those of csrc/calibration.h."""

from __future__ import annotations

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # rollouts that a prior is worth
IGNORING = 1.0  # strength of the last component, which is centred in the middle of the reward range instead
COMPONENTS = len(STRENGTHS) + 1
STEPS = 30  # of expectation maximisation
PRIOR_COUNT = 0.5  # groups that each component counts for beside the batch and the state
EDGE = 0.02  # nearest that a prior comes to the ends of the reward range, in units of the range
NEAR = 1e-6  # of the range: how near to an end a reward of two values lies
