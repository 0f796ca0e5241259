"""`benchmarks/bench_trl_step.py` at its smallest: every contender runs, and what computes something else is refused."""

import pytest
import torch

from benchmarks.bench_trl_step import HALF, MIXED, OPTIONS, QUICK, SINGLE, Agreement, Stepper, case, cases
from benchmarks.harness import measure
from v05.integrations.trl import V05Config, V05Trainer

pytestmark = pytest.mark.trl
CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", [SINGLE, MIXED, HALF], ids=lambda precision: precision.name)
def test_all_contenders_take_the_same_step(precision):
    made = case(QUICK[0], precision, CPU)
    assert [contender.name for contender in made.contenders] == [*OPTIONS, "TRL"]
    for contender in made.contenders:
        assert contender.run is not None, contender.why_missing
        loss, *gradients = contender.run()
        assert float(loss) != 0
        assert all(gradient.dtype == precision.weights and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_runs_what_it_asks_for(options):
    trainer = Stepper(V05Trainer, V05Config, QUICK[0], SINGLE, CPU, **options).trainer
    asked = trainer.args.loss_backend, trainer.args.logprob_backend
    assert (trainer._loss_code, trainer._logprob_code) == asked


def test_another_loss_is_refused():
    agreement = Agreement(QUICK[0], SINGLE, CPU)
    agreement.run_of("TRL", Stepper(V05Trainer, V05Config, QUICK[0], SINGLE, CPU))
    other = Stepper(V05Trainer, V05Config, QUICK[0], SINGLE, CPU, loss_type="grpo")
    with pytest.raises(ValueError, match=r"trl_step: grpo differs from TRL by .*; allowed: 0.0001"):
        agreement.run_of("grpo", other)


def test_it_is_measured():
    rows = list(measure(next(cases(CPU, quick=True)), "run", seconds=0.01))
    assert [row.contender for row in rows] == [*OPTIONS, "TRL"]
    assert all(float(row.p50_ms) > 0 and float(row.peak_mib) > 0 and "differs" not in row.note for row in rows)
